"""What a task is to the training loop, and what most of them have in common."""

from typing import Any

import jax
import numpy as np
from jaxtyping import Int


class Task:
    """The parts of the training loop that a task may change.

    Besides, a task has a name, a protocol (whose learning rates are taken), epochs, batch_size, rank, metrics
    (the main one first), and the methods `load`, `init`, `loss` and `evaluate`.
    """

    momentum = 0.9  # of the optimizers that take one
    loss_reduction = "mean"  # over a batch's examples
    seeds = (0, 1, 2)
    evaluations = 1  # in an epoch
    decay = False  # whether the learning rate falls linearly to zero at the end of training
    max_norm: float | None = None  # that gradients are clipped to

    def lengths(self, data: Any) -> Int[np.ndarray, " N"] | None:
        """The lengths of the examples, if batches are to be of similar ones."""
        del data

    def take(self, data: Any, indices: Int[np.ndarray, " B"]) -> Any:
        """A batch of the data."""
        return jax.tree.map(lambda z: np.asarray(z)[indices], data)
