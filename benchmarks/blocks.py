"""Blocks of a small transformer with LoRA on all their layers, written out one after the other, as a task."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from benchmarks.layers import inputs_and_targets
from benchmarks.steps import at_least
from experiments import ExperimentError
from experiments.task import Task
from oplora_jax import LowRank, lora_dot

HEADS, SHARED = 4, 2  # heads of queries, and how many of them share their keys and values


@dataclasses.dataclass(frozen=True)
class Blocks(Task):
    """Attention and a gated layer in each block, and the mean squared error of the last one's outputs.

    No two of the seven layers of a block have one shape. So heads have more values than keys, as in
    multi-head latent attention, and each gate opens two of the inner layer's numbers.
    """

    blocks: int
    width: int
    tokens: int
    rank: int

    momentum = 0.9
    loss_reduction = "mean"

    def __post_init__(self):
        at_least(1, blocks=self.blocks, width=self.width, tokens=self.tokens, rank=self.rank)
        if self.width % (2 * HEADS):
            raise ExperimentError(f"width is {self.width}; expected a multiple of {2 * HEADS}")
        if self.rank > self.width // SHARED:
            raise ExperimentError(
                f"rank is {self.rank}; expected at most {self.width // SHARED}, the width of the keys"
            )

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Of a block's kernels."""
        width, values, inner = self.width, 3 * self.width // 2, 5 * self.width // 2
        return {
            "query": (width, width),
            "key": (width, width // SHARED),
            "value": (width, values // SHARED),
            "output": (values, width),
            "gate": (width, inner // 2),
            "up": (width, inner),
            "down": (inner, width),
        }

    def init(self, seed: Any, full: bool) -> tuple[Any, Any]:
        """(what is trained, what is frozen). No factor is zero, as LoRA's b is at its start."""
        random = np.random.default_rng(seed)
        draw = lambda *shape: jnp.asarray(
            random.standard_normal(shape, np.float32) / math.sqrt(shape[0]), jnp.float32
        )
        make = lambda of: [
            {name: of(*shape) for name, shape in self.shapes.items()} for _ in range(self.blocks)
        ]
        kernels = make(draw)
        if full:
            return {"kernels": kernels}, {}
        loras = make(lambda n, m: LowRank(draw(n, self.rank), draw(self.rank, m)))
        return {"loras": loras}, {"kernels": kernels}

    def data(self) -> tuple[Float[Array, "tokens width"], Float[Array, "tokens width"]]:
        """Inputs and targets: one sequence."""
        return inputs_and_targets(self.tokens, self.width)

    def loss(
        self, trainable: Any, frozen: Any, x: Float[Array, "tokens width"], y: Float[Array, "tokens width"]
    ) -> Float[Array, ""]:
        """The mean squared error."""
        kernels = {**frozen, **trainable}["kernels"]
        for kernel, lora in zip(kernels, trainable.get("loras", [None] * self.blocks), strict=True):
            x = _block(x, kernel, lora)
        return jnp.mean((x - y) ** 2)


def _block(x, kernel, lora):
    layer = lambda z, name: z @ kernel[name] if lora is None else lora_dot(z, kernel[name], lora[name])
    groups = HEADS // SHARED
    query = layer(x, "query").reshape(len(x), groups, SHARED, -1)
    key, value = (layer(x, name).reshape(len(x), groups, -1) for name in ("key", "value"))
    scores = jnp.einsum("tgsk,ugk->gstu", query, key) / math.sqrt(key.shape[-1])
    attended = jnp.einsum("gstu,ugv->tgsv", jax.nn.softmax(scores), value)
    x = x + layer(attended.reshape(len(x), -1), "output")
    gate = jax.nn.silu(layer(x, "gate"))
    return x + layer(jnp.repeat(gate, 2, axis=-1) * layer(x, "up"), "down")
