"""Measured time, in alternation, so that what slows the machine slows both sides."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

WARM_UP = 2  # runs of each side that are not measured


class Times(NamedTuple):
    """A method's steps, and what they took in the baseline's."""

    seconds: Float[np.ndarray, " pairs"]
    ratios: Float[np.ndarray, " pairs"]


def runner(compiled: Callable[..., tuple[Any, Any]], state: Any, *arguments: Any) -> Callable[[], float]:
    """A function that takes one step, from the state the last one left, and returns its seconds.

    Args:
      compiled: of (state, *arguments), returns (state, loss). It may overwrite the state it is given.
      state: before the first step.
      *arguments: the same ones at every step.
    """

    def run() -> float:
        nonlocal state
        began = time.perf_counter()
        state, loss = jax.block_until_ready(compiled(state, *arguments))
        del loss
        return time.perf_counter() - began

    return run


def alternate(
    baseline: Callable[[], float], method: Callable[[], float], pairs: int, notify: Callable[[int], None]
) -> Times:
    """Runs the baseline and the method in turn.

    Args:
      baseline: takes a step, or compiles it, and returns its seconds.
      method: likewise.
      pairs: how many of each are measured, after the warm-up.
      notify: called with the pairs that are done.
    """
    for run in (baseline, method) * WARM_UP:
        run()
    seconds = np.empty((pairs, 2))
    for pair in range(pairs):
        seconds[pair] = baseline(), method()
        notify(pair + 1)
    return Times(seconds[:, 1], seconds[:, 1] / seconds[:, 0])
