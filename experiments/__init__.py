"""The papers' experiments: `python -m experiments --help`."""

import os

# OpenBLAS's threads and XLA's own fight over the cores: with few of them an SVD takes many times longer.
# It is read when JAX loads SciPy's LAPACK, so it is set here, before anything imports JAX.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


class ExperimentError(Exception):
    """Something the user can put right: a file, a setting, a package. Its message is all that is shown."""
