"""Paths of parameters, as users write them and as patterns match them."""

import difflib
import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import jax

Targets: TypeAlias = str | re.Pattern | Sequence[str | re.Pattern]


def path_name(path: Any) -> str:
    """A key path as "encoder/layer_0/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def leaf_name(path: Any) -> str:
    """A leaf's path, without the box that Flax keeps it in, an `nnx.Variable` or `nn.Partitioned`.

    `nnx.Optimizer` shows a transformation boxes at init and arrays at update.
    """
    boxed = path and isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name == "value"
    return path_name(path[:-1] if boxed else path)


def weight_name(path: str) -> str:
    """The path of the weight that a LoRA parameter is beside: "query/kernel" of "query/lora".

    And "query/w" of "query/lora/w", where a module has weights of several names.
    """
    *above, last = path.split("/")
    if last == "lora":
        return "/".join([*above, "kernel"])
    return "/".join([*above[:-1], last]) if above and above[-1] == "lora" else path


def patterns_of(targets: Targets) -> tuple[str | re.Pattern, ...]:
    """The patterns of an argument `targets`; raises ValueError for none, or for what is no pattern."""
    several = isinstance(targets, Iterable) and not isinstance(targets, str | Mapping)
    patterns = tuple(targets) if several else (targets,)
    if not patterns or not all(isinstance(p, str | re.Pattern) for p in patterns):
        expected = "expected a path, a glob or a re.compile(...), or several of them"
        raise ValueError(f"targets is {targets!r}; {expected}")
    return patterns


def matches(path: str, patterns: Sequence[str | re.Pattern]) -> bool:
    """Whether one of the patterns matches a path: see `init_lora`."""
    return any(_matches(path, pattern) for pattern in patterns)


def _matches(path: str, pattern: str | re.Pattern) -> bool:
    if isinstance(pattern, re.Pattern):
        return pattern.search(path) is not None
    return fnmatch.fnmatchcase(path, pattern) or f"/{pattern}/" in f"/{path}/"


def check_patterns(patterns: Sequence[str | re.Pattern], paths: Sequence[str], what: str) -> None:
    """Raises ValueError, with the paths that come close, for a pattern that matches none of them."""
    for pattern in patterns:
        if any(_matches(path, pattern) for path in paths):
            continue
        text, hint, some = pattern, "", "the paths are"
        if isinstance(pattern, re.Pattern):
            text = pattern.pattern
        elif any(_matches(path, f"*/{pattern}") for path in paths):
            hint = f"a glob is for the whole path: {f'*/{pattern}'!r} would; "
        elif _is_regular_expression(pattern, paths):
            hint = f"as a regular expression it would: re.compile({pattern!r}); "
        if len(paths) > 10:
            some = f"of {len(paths)} paths the closest are"
            paths = sorted(paths, key=lambda path: _closeness(path, text), reverse=True)[:5]
        listed = ", ".join(map(repr, paths)) or "none"
        raise ValueError(f"no {what} matches {pattern!r}; {hint}{some}: {listed}")


def _is_regular_expression(pattern: str, paths: Sequence[str]) -> bool:
    """Whether a pattern that matches no path would, compiled."""
    try:
        return any(re.search(pattern, path) for path in paths)
    except re.error:
        return False


def _closeness(path: str, pattern: str) -> float:
    """How alike a pattern and a path are, or the part of it that has as many components."""
    parts, length = path.split("/"), pattern.count("/") + 1
    runs = {path, *("/".join(parts[i : i + length]) for i in range(len(parts) - length + 1))}
    return max(difflib.SequenceMatcher(None, run, pattern).ratio() for run in runs)
