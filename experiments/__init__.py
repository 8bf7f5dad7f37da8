"""The papers' experiments: `python -m experiments --help`."""

import difflib
import os
from collections.abc import Iterable

# OpenBLAS's threads and XLA's own fight over the cores: with few of them an SVD takes many times longer.
# It is read when JAX loads SciPy's LAPACK, so it is set here, before anything imports JAX.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


class ExperimentError(Exception):
    """Something the user can put right: a file, a setting, a package. Its message is all that is shown."""


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """The end of an error about a name that there is not: those that are near it, if there are any."""
    names = list(names)
    *others, last = ([z for z in names if name in z] or difflib.get_close_matches(name, names))[:3] or [None]
    return f"; did you mean {', '.join(others)}{' or ' * bool(others)}{last}?" if name and last else ""
