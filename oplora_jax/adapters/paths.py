"""Paths of parameters, as users write them and as patterns match them."""

import fnmatch
import re
from collections.abc import Sequence
from typing import Any

import jax


def path_name(path: Any) -> str:
    """A key path as "encoder/layer_0/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def leaf_name(path: Any) -> str:
    """A leaf's path, without the box that Flax keeps it in, an `nnx.Variable` or `nn.Partitioned`.

    `nnx.Optimizer` shows a transformation boxes at init and arrays at update.
    """
    boxed = path and isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name == "value"
    return path_name(path[:-1] if boxed else path)


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
