"""LoRA parameters whose names have the roles of their kernels' axes, such as `lora_oio`.

So they were called before `LowRank` had its field `roles`; the name is `lora` now. Trees with such names are
refused, with the code that renames them.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from oplora_jax.matrix import LowRank


def refuse_old_names(params: Any, above: Sequence[str] = ()) -> None:
    """Raises ValueError where a tree of parameters, at the path `above`, has such names."""
    old = {}
    for path, node in jax.tree.leaves_with_path(params, is_leaf=_is_factors):
        keys = [jax.tree_util.keystr((key,), simple=True) for key in path]
        keys = *above, *(keys[:-1] if keys[-1:] == ["value"] else keys)  # out of its box
        roles = _roles(keys[-1], node) if keys else None
        if roles is not None and isinstance(node, LowRank):
            old[keys] = f"dataclasses.replace(old, roles={roles!r})"
        elif roles is not None:
            old[keys] = f"oplora_jax.LowRank(**old, scale=alpha / rank, roles={roles!r})"
    if old:
        _refuse(old, "params")


def refuse_old_state(state: Mapping[str, Any], path: str) -> None:
    """Raises ValueError where one level of a dict of arrays, at a path such as "./params", has such names."""
    names = [name for name, node in state.items() if _roles(name, node) is not None]
    if names:
        _refuse({(*path.split("/")[1:], name): "old" for name in names}, "state")


def _refuse(old: dict[tuple[str, ...], str], tree: str) -> None:
    """Says of parameters at these paths what new ones are made of them."""
    code = []
    for (*above, name), new in old.items():
        at = tree + "".join(f"[{key!r}]" for key in above)
        code.append(f"old = {at}.pop({name!r}); {at}['lora'] = {new}")
    raise ValueError(
        f"{', '.join(map('/'.join, old))}: the roles of a kernel's axes are no part of the name any more. "
        "Rename it:\n" + "\n".join(code)
    )


def _roles(name: str, node: Any) -> str | None:
    """The roles in a parameter's name; None if it has none, or the node is no LoRA parameter."""
    match = re.fullmatch("lora_([bio]{2,})", name)
    return match[1] if match and _is_factors(node) else None


def _is_factors(node: Any) -> bool:
    """Whether a node has the factors of a LoRA parameter, or has lost them to `optax.masked`."""
    return isinstance(node, LowRank) or (isinstance(node, Mapping) and set(node) <= {"a", "b"})
