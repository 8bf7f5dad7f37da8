"""The linear task: fit a random matrix by one of low rank."""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from experiments.task import Task
from oplora_jax import LowRank, is_low_rank, lora_dot, svd, to_dense

N, M = 200, 600


@dataclasses.dataclass(frozen=True)
class Linear(Task):
    """Fit a 200 x 600 matrix of normal numbers by one of rank 8.

    The loss is the summed squared error. What is reported is its excess over the best rank-8 error.
    """

    setting: Literal["full_batch", "stochastic"] = "stochastic"
    """All 200 rows at each step without momentum, or batches of 64 rows with momentum 0.75."""
    epochs: int = 100
    """Passes over the rows."""

    rank = 8
    loss_reduction = "sum"
    metrics = ("excess_loss",)
    seeds = (0, 1, 2, 3, 4)

    @property
    def name(self) -> str:
        """Names the task's folder, and its protocol."""
        return f"linear_{self.setting}"

    protocol = name

    @property
    def batch_size(self) -> int:
        """Rows in a batch."""
        return N if self.setting == "full_batch" else 64

    @property
    def momentum(self) -> float:
        """Of the optimizers that take one."""
        return 0.0 if self.setting == "full_batch" else 0.75

    def load(self, seed: int) -> tuple[Any, dict[str, tuple[Float[np.ndarray, "200 600"], float]]]:
        """(inputs and targets to train on, the matrix to find and the best rank-8 error).

        The excess loss has no noise: learning rates are chosen by what is reported.
        """
        target = jax.random.normal(jax.random.fold_in(jax.random.key(seed), 0), (N, M))
        exact = np.asarray(target, np.float64)
        return (jnp.eye(N), target), {"": (exact, best_error(exact, self.rank))}

    def init(self, seed: Any, full: bool) -> tuple[Any, Any]:
        """(what is trained, what is frozen): the increment, and the base weight, which is zero.

        The increment starts at the best rank-8 approximation of a linear layer's usual start.
        """
        bound = 1 / math.sqrt(N)
        layer = jax.random.uniform(
            jax.random.fold_in(jax.random.key(seed), 1), (N, M), minval=-bound, maxval=bound
        )
        weight = svd([(1.0, layer)], self.rank)
        return {"weight": to_dense(weight) if full else weight}, {"base": jnp.zeros((N, M))}

    def loss(
        self, trainable: Any, frozen: Any, batch: Any, weights: Float[Array, " N"], key: Any = None
    ) -> Float[Array, ""]:
        """The squared error, summed over a batch's examples of weight 1."""
        x, y = batch
        weight, base = trainable["weight"], frozen["base"]
        outputs = lora_dot(x, base, weight) if is_low_rank(weight) else x @ (base + weight)
        return jnp.sum(weights[:, None] * (outputs - y) ** 2)

    def evaluate(self, trainable: Any, frozen: Any, data: Any) -> dict[str, float]:
        """The excess loss, in float64: float32 would round it to multiples of 0.008."""
        weight = jax.tree.map(lambda factor: np.asarray(factor, np.float64), trainable["weight"])
        if isinstance(weight, LowRank):
            weight = weight.a @ weight.b
        target, best = data
        return {"excess_loss": float(np.sum((target - weight) ** 2)) - best}


def best_error(matrix: Float[np.ndarray, "n m"], rank: int) -> float:
    """The smallest squared error of a matrix of that rank: the sum of the other squared singular values."""
    return float(np.sum(np.linalg.svd(matrix, compute_uv=False)[rank:] ** 2))
