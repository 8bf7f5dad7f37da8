"""Checks of LoRA parameters where they stand: the roles of their kernels' axes, and their names.

The roles were once in the names, such as `lora_oio`. Now `LowRank.roles` has them, and the name is `lora`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax

from oplora_jax.adapters.kernel_axes import kept_roles
from oplora_jax.adapters.paths import matches
from oplora_jax.matrix import LowRank

# Of a layer whose kernel is computed from its parameter, by a normalisation for example.
COMPUTED = (
    "merged weights would compute something else than LoRA beside it. Leave the layer out of the targets, or "
    "put the computed kernel into a plain layer first"
)


def check_roles(lora: LowRank, roles: str, name: str) -> None:
    """Raises ValueError unless a LoRA parameter has the roles that a layer knows of its kernel's axes."""
    if lora.roles != (needed := kept_roles(roles)):
        found = f"the LoRA parameter has roles={lora.roles!r}, its layer needs {needed!r}"
        raise ValueError(f"{name}: {found}; dataclasses.replace(lora, roles={needed!r}) sets them")


def refuse_unsupported(
    patterns: Sequence[Any],
    paths: Iterable[str],
    others: Mapping[str, type],
    supported: Iterable[type],
    library: Any,
) -> None:
    """Raises ValueError for a pattern that matches a module, but no layer of a class that takes LoRA.

    `paths` are those of the layers, `others` the classes of all other modules by path, outer ones first.
    """
    prefix = library.__name__.rpartition(".")[2].replace("linen", "nn")
    name = lambda cls: (
        f"{prefix}.{cls.__name__}" if getattr(library, cls.__name__, None) is cls else cls.__name__
    )
    for pattern in patterns:
        matched = [path for path in others if matches(path, [pattern])]
        if matched and not any(matches(path, [pattern]) for path in paths):
            path = max(matched, key=bool)  # the model itself only if nothing else matches
            classes = ", ".join(map(name, supported))
            raise ValueError(
                f"{path!r}: {name(others[path])} is not supported, expected one of {classes}, or a subclass; "
                "leave it out of the targets, or name layers within it"
            )


def refuse_old_names(tree: Any, above: Sequence[str] = (), variable: str = "params") -> None:
    """Raises ValueError, with code that renames them, where LoRA parameters have the former names.

    `above` is the path of the tree within what the code calls by the variable's name; a "state" has arrays
    alone, to be restored into nodes that have the roles.
    """
    old = {}
    for path, node in jax.tree.leaves_with_path(tree, is_leaf=_is_factors):
        keys = [*above, *(getattr(key, "key", getattr(key, "idx", None)) for key in path)]
        match = re.fullmatch("lora_([bio]{2,})", str(keys[-1])) if keys and _is_factors(node) else None
        if match:
            new = f"oplora_jax.LowRank(**old, scale=alpha / rank, roles={match[1]!r})"
            if variable == "state":
                new = "old"
            elif isinstance(node, LowRank):
                new = f"dataclasses.replace(old, roles={match[1]!r})"
            at = variable + "".join(f"[{key!r}]" for key in keys[:-1])
            old["/".join(map(str, keys))] = f"old = {at}.pop({keys[-1]!r}); {at}['lora'] = {new}"
    if old:
        found = f"{', '.join(old)}: the roles of a kernel's axes are no part of the name any more"
        raise ValueError("\n".join([f"{found}. Rename it:", *old.values()]))


def _is_factors(node: Any) -> bool:
    """Whether a node has the factors of a LoRA parameter, or has lost them to `optax.masked`."""
    return isinstance(node, LowRank) or (isinstance(node, Mapping) and set(node) <= {"a", "b"})
