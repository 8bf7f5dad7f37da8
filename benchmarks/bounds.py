"""What bounds a program: its operations or its bytes, at the rates of programs that do little else."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import alternate, runner

SIZE = 2048  # of the square matrices that are multiplied
NUMBERS = 2**24  # that are copied: 64 MiB


class Rates(NamedTuple):
    """What the machine does in the time of one step of the baseline."""

    flops: float  # operations, in a product of two large matrices
    bytes: float  # read and written, in a copy of a large array

    def bound(self, flops: float, accessed: float) -> tuple[float, str]:
        """The least time for so many operations and bytes, in the baseline's steps, and for which of both."""
        return max((flops / self.flops, "flops"), (accessed / self.bytes, "bytes"))


def measure_rates(baseline: Callable[[], float], pairs: int) -> Rates:
    """Measures both in turn with the baseline's steps, as methods are measured.

    Args:
      baseline: takes a step and returns its seconds.
      pairs: how often.
    """
    random = np.random.default_rng(0)
    matrix = jnp.asarray(random.standard_normal((SIZE, SIZE), np.float32))
    product = _run(lambda _, x, y: (x @ y, None), matrix, matrix, matrix)
    copy = _run(lambda z: (-z, None), jnp.zeros(NUMBERS))
    steps = lambda run: float(np.median(alternate(baseline, run, pairs, lambda _: None).ratios))
    return Rates(flops=2 * SIZE**3 / steps(product), bytes=2 * 4 * NUMBERS / steps(copy))


def _run(function: Callable[..., Any], state: Any, *arguments: Any) -> Callable[[], float]:
    """A runner whose result overwrites its state: no new memory at each run."""
    state = jnp.copy(state)
    compiled = jax.jit(function, donate_argnums=0, keep_unused=True).lower(state, *arguments).compile()
    return runner(compiled, state, *arguments)
