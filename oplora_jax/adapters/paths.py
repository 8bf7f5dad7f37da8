"""Paths of parameters, as users write them and as patterns match them."""

import fnmatch
import re
from collections.abc import Sequence
from typing import Any

import jax


def path_name(path: Any) -> str:
    """A key path as "encoder/layer_0/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def matches(path: str, patterns: str | Sequence[str]) -> bool:
    """Whether one of the patterns, as a glob, is the path, or as a regular expression is found in it."""
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if fnmatch.fnmatchcase(path, pattern):
            return True
        try:
            if re.search(pattern, path):
                return True
        except re.error:
            continue  # a glob such as "*/kernel" need not be a regular expression
    return False
