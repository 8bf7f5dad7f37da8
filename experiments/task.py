"""What a task is to the training loop, and what most of them have in common."""

from typing import Any

import jax
import numpy as np
from jaxtyping import Int


class Task:
    """The parts of the training loop that a task may change.

    Besides, a task has a name, a protocol, epochs, batch_size, rank, momentum, loss_reduction, metrics and
    seeds, and the methods `load`, `init`, `loss` and `evaluate`.
    """

    evaluations = 1  # in an epoch
    decay = False  # whether the learning rate falls linearly to zero at the end of training
    max_norm: float | None = None  # that gradients are clipped to

    def lengths(self, data: Any) -> Int[np.ndarray, " N"] | None:
        """The lengths of the examples, if batches are to be of similar ones."""
        del data

    def take(self, data: Any, indices: Int[np.ndarray, " B"]) -> Any:
        """A batch of the data."""
        return jax.tree.map(lambda z: np.asarray(z)[indices], data)
