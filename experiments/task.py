"""What a task is to the training loop, and what most of them have in common."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jaxtyping import Int

from oplora_jax import is_low_rank

Trainable = dict[str, dict[str, Any]]


class Task:
    """The parts of the training loop that a task may change.

    Besides, a task has a name, a protocol (whose learning rates are taken), epochs, batch_size, rank, metrics
    (of the test data, the main one first), and these methods:

    - load: seed to (the training data, what to evaluate on, by the prefix of its metrics' names). The test
      data, with "test_", are for the end of training.
    - init: (seed, full) to (what is trained, what is frozen). With an `others_rate` what is trained is a
      dict: "adapted" has what the method trains, the LoRA parameters or, in full training, the kernels that
      they would adapt; "others" has the rest, which is the same for all methods.
    - loss, and evaluate: (trained, frozen, data) to metrics, without their prefix.
    """

    momentum = 0.9  # of the optimizers that take one
    loss_reduction = "mean"  # over a batch's examples
    seeds = (0, 1, 2)
    evaluations = 1  # in an epoch
    decay = False  # whether the learning rates fall linearly to zero at the end of training
    max_norm: float | None = None  # that the gradients of either part are clipped to
    in_backward = False  # whether each LoRA parameter takes its step inside the backward pass
    others_rate: float | None = None  # AdamW's, of the others; None where there are none
    metrics: tuple[str, ...]

    @property
    def selection(self) -> str:
        """The metric that learning rates are chosen by: the main one, on the validation data."""
        return self.metrics[0].replace("test_", "validation_", 1)

    def lengths(self, data: Any) -> Int[np.ndarray, " N"] | None:
        """The lengths of the examples, if batches are to be of similar ones."""
        del data

    def take(self, data: Any, indices: Int[np.ndarray, " B"]) -> Any:
        """A batch of the data."""
        return jax.tree.map(lambda z: np.asarray(z)[indices], data)


def divide(
    flat: dict[str, Any], adapted: Callable[[str], bool], others: Callable[[str], bool]
) -> tuple[Trainable, dict[str, Any]]:
    """(what is trained, what is frozen) of parameters by path."""
    part = lambda keep: {path: leaf for path, leaf in flat.items() if keep(path)}
    frozen = part(lambda path: not (adapted(path) or others(path)))
    return {"adapted": part(adapted), "others": part(others)}, frozen


def join(trainable: Trainable, frozen: dict[str, Any]) -> dict[str, Any]:
    """A model's parameters, as Flax nests them."""
    return traverse_util.unflatten_dict({**frozen, **trainable["adapted"], **trainable["others"]}, sep="/")


def is_full(trainable: Trainable) -> bool:
    """Whether kernels are trained, and not their LoRA."""
    return not any(map(is_low_rank, trainable["adapted"].values()))
