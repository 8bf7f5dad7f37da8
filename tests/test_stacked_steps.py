"""A step on stacked parameters ends, for every optimizer: batched decompositions side by side do not."""

import os
import pathlib
import subprocess
import sys

import pytest

from tests.optimizers.cases import OURS

ROOT = pathlib.Path(__file__).parents[1]
PROGRAM = ROOT / "tests" / "stacked_step.py"
SECONDS = 120  # six times what the slowest takes on two cores that eight programs share


@pytest.mark.parametrize("names", [[*OURS][i::4] for i in range(4)], ids=" ".join)
def test_a_step_on_stacked_parameters_ends(names):
    """Seven parameters, each stacked 30 times, on two cores. With XLA's usual flags, as for users."""
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    # The threads of the BLAS library wait actively: beside other tests they would take most of the time.
    environment |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, str(PROGRAM), str(SECONDS), *names]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, f"{ended.stdout}{ended.stderr}"
    assert ended.stdout.count("has ended") == len(names)
