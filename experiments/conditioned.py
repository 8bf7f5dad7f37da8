"""The ill-conditioned task: a linear regression on features of very different scales."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from experiments.task import Task
from oplora_jax import LowRank, init_lora, is_low_rank, lora_dot

N, M = 64, 32
TRAIN, TEST = 8192, 1024


@dataclasses.dataclass(frozen=True)
class Conditioned(Task):
    """Regress 32 outputs on 64 features of scales from 1e-3 to 1e3, by a matrix of rank 4.

    The features are x = D z with z normal and D the scales, evenly spaced in their logarithm; the targets
    are y = C^T z with C of rank 4, a product of normal matrices. So every feature has the same share in the
    targets, whatever its scale, and the matrix to find, D^-1 C, has entries as unequal as the features. There
    is no noise. The loss is the mean squared error; what is reported is that on the test examples over the
    mean square of their targets: 1 is what zero does, and features never learned cost their share.
    """

    rotated: bool = False
    """Multiply the features by a random rotation, so that no axis has a scale of its own."""
    epochs: int = 20
    """Passes over the 8192 training examples, in batches of 64."""

    rank = 4
    batch_size = 64
    metrics = ("relative_test_loss",)
    protocol = "conditioned"

    @property
    def name(self) -> str:
        """Names the task's folder."""
        return "conditioned_rotated" if self.rotated else "conditioned"

    def load(self, seed: int) -> tuple[Any, Any]:
        """(inputs and targets to train on, those to test on), computed in float64."""
        random = np.random.default_rng(seed)
        target = random.normal(size=(N, self.rank)) @ random.normal(size=(self.rank, M))
        z = random.normal(size=(TRAIN + TEST, N))
        x = z * np.logspace(-3, 3, N)
        if self.rotated:
            x = x @ np.linalg.qr(random.normal(size=(N, N)))[0]
        y = z @ target / math.sqrt(N * self.rank)  # of variance 1
        train, test = ((x[part], y[part]) for part in (slice(TRAIN), slice(TRAIN, None)))
        return tuple(jnp.asarray(z, jnp.float32) for z in train), test

    def init(self, seed: Any, full: bool) -> tuple[Any, Any]:
        """(what is trained, what is frozen): the increment, LoRA's usual start, and the base, zero."""
        base = jnp.zeros((N, M))
        if full:
            return {"weight": base}, {"base": base}
        return init_lora(jax.random.key(seed), {"weight": base}, self.rank, "weight"), {"base": base}

    def loss(
        self, trainable: Any, frozen: Any, batch: Any, weights: Float[Array, " N"], key: Any = None
    ) -> Float[Array, ""]:
        """The mean squared error over a batch's examples of weight 1."""
        x, y = batch
        weight, base = trainable["weight"], frozen["base"]
        outputs = lora_dot(x, base, weight) if is_low_rank(weight) else x @ (base + weight)
        return jnp.sum(weights[:, None] * (outputs - y) ** 2) / (M * jnp.sum(weights))

    def evaluate(self, trainable: Any, frozen: Any, test: Any) -> dict[str, float]:
        """The relative test loss, in float64."""
        weight = jax.tree.map(lambda factor: np.asarray(factor, np.float64), trainable["weight"])
        if isinstance(weight, LowRank):
            weight = weight.scale * weight.a @ weight.b
        x, y = test
        return {"relative_test_loss": float(np.mean((x @ weight - y) ** 2) / np.mean(y**2))}
