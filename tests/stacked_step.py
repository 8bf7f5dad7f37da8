"""One compiled step of each optimizer on stacked parameters, on two cores, as a process of its own.

python stacked_step.py SECONDS NAME ...

The process ends with an error and a traceback if one of them takes longer than that.
"""

import faulthandler
import os
import sys

# XLA's thread pool has as many threads as there are cores when JAX is imported.
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])

import jax
import jax.numpy as jnp
import numpy as np

from oplora_jax import LowRank, OuterProduct
from tests.arrays import normals
from tests.optimizers.cases import make

PARAMETERS, STACK, SIZE, RANK, TOKENS = 7, 30, 256, 8, 2


def main(name):
    normal = normals(0, jnp.float32)
    draw = lambda n, m: normal(STACK, n, m) / 16
    params = [LowRank(draw(SIZE, RANK), draw(RANK, SIZE)) for _ in range(PARAMETERS)]
    gradients = [OuterProduct(draw(TOKENS, SIZE), draw(TOKENS, SIZE)) for _ in range(PARAMETERS)]
    tx = make(name)
    updates, state = jax.jit(tx.update)(gradients, tx.init(params), params)
    assert state.skipped == 0
    assert all(np.any(update.b) for update in updates)


if __name__ == "__main__":
    for name in sys.argv[2:]:
        faulthandler.dump_traceback_later(float(sys.argv[1]), exit=True)
        main(name)
        print(name, "has ended", flush=True)
