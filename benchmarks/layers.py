"""A stack of residual layers with LoRA, as a task."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from benchmarks.steps import at_least
from experiments import ExperimentError
from experiments.task import Task
from oplora_jax import LowRank, lora_dot


@dataclasses.dataclass(frozen=True)
class Layers(Task):
    """Residual layers x + tanh(x (W + a b)), and the mean squared error of the last one's outputs."""

    layers: int
    width: int
    tokens: int
    rank: int
    scan: bool = False  # the layers run in a loop over stacked parameters
    checkpoint: bool = False  # the activations of a layer are computed again in the backward pass
    plain: bool = False  # LoRA is written out, without lora_dot

    momentum = 0.9
    loss_reduction = "mean"

    def __post_init__(self):
        at_least(1, layers=self.layers, width=self.width, tokens=self.tokens, rank=self.rank)
        if self.rank > self.width:
            raise ExperimentError(f"rank is {self.rank}; expected at most the width, {self.width}")

    def init(self, seed: Any, full: bool) -> tuple[Any, Any]:
        """(what is trained, what is frozen). No factor is zero, as LoRA's b is at its start."""
        random = np.random.default_rng(seed)

        def draw(rows, columns):
            stacked = random.standard_normal((self.layers, rows, columns), np.float32) / math.sqrt(rows)
            return jnp.asarray(stacked) if self.scan else [jnp.asarray(z) for z in stacked]

        kernels = draw(self.width, self.width)
        if full:
            return {"kernels": kernels}, {}
        a, b = draw(self.width, self.rank), draw(self.rank, self.width)
        loras = LowRank(a, b) if self.scan else [LowRank(*pair) for pair in zip(a, b, strict=True)]
        return {"loras": loras}, {"kernels": kernels}

    def data(self) -> tuple[Float[Array, "tokens width"], Float[Array, "tokens width"]]:
        """Inputs and targets."""
        return inputs_and_targets(self.tokens, self.width)

    def loss(
        self, trainable: Any, frozen: Any, x: Float[Array, "tokens width"], y: Float[Array, "tokens width"]
    ) -> Float[Array, ""]:
        """The mean squared error."""
        kernels = {**frozen, **trainable}["kernels"]
        loras = trainable.get("loras")
        apply = jax.checkpoint(self._layer) if self.checkpoint else self._layer
        if self.scan:
            x, _ = jax.lax.scan(lambda x, layer: (apply(x, *layer), None), x, (kernels, loras))
        else:
            for layer in zip(kernels, loras or [None] * self.layers, strict=True):
                x = apply(x, *layer)
        return jnp.mean((x - y) ** 2)

    def _layer(self, x, kernel, lora):
        if lora is None:
            return x + jnp.tanh(x @ kernel)
        if self.plain:
            return x + jnp.tanh(x @ kernel + lora.scale * (x @ lora.a) @ lora.b)
        return x + jnp.tanh(lora_dot(x, kernel, lora))


def inputs_and_targets(
    tokens: int, width: int
) -> tuple[Float[Array, "tokens width"], Float[Array, "tokens width"]]:
    """Normal numbers."""
    random = np.random.default_rng(1)
    normal = lambda: jnp.asarray(random.standard_normal((tokens, width), np.float32))
    return normal(), normal()
