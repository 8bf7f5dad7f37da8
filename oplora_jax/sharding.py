"""Meshes with explicit axes, where a product over a sharded axis must be told how its result is sharded.

Such products run with the compiler in charge. On other meshes, and on none, nothing here does anything.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from oplora_jax._jax import AbstractValue

# How one axis of an array is sharded: None, the name of an axis of the mesh, or several of them.
Entry = Any


def entries(array: Any) -> tuple[Entry, ...]:
    """How each axis of an array, or of its type, is sharded over the explicit axes of its mesh."""
    aval = array if isinstance(array, AbstractValue) else jax.typeof(array)
    spec = tuple(aval.sharding.spec)
    return spec + (None,) * (aval.ndim - len(spec))


def explicit_mesh(tree: Any) -> AbstractMesh | None:
    """The mesh with explicit axes that arrays of a tree are on; None if there is none."""
    meshes = (jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(tree))
    return next((mesh for mesh in meshes if mesh.explicit_axes), None)


def merged(some: Sequence[Entry]) -> Entry:
    """The entry of an axis that several axes are reshaped to."""
    names = [name for entry in some for name in _names(entry)]
    return tuple(names) or None


def partition(*some: Entry) -> PartitionSpec:
    """A specification of these entries. An axis of the mesh that comes twice counts where it comes first."""
    out: list[tuple[str, ...]] = []
    for entry in some:
        taken = merged(out) or ()
        out.append(tuple(name for name in _names(entry) if name not in taken))
    while out and not out[-1]:  # as compiled programs return it
        out.pop()
    return PartitionSpec(*out)


def _names(entry: Entry) -> tuple[str, ...]:
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def under_auto_sharding(function: Callable[..., Any], specs: Callable[[], Any], *arguments: Any) -> Any:
    """Calls a function of trees of arrays, in which Python's numbers stay such, with the compiler in charge.

    On meshes with explicit axes `specs` is called for the specifications of its results, a tree like them.
    """
    mesh = explicit_mesh(arguments)
    if mesh is None:
        return function(*arguments)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs())
    leaves, treedef = jax.tree.flatten(arguments)
    arrays = [None if isinstance(leaf, int | float) else leaf for leaf in leaves]

    def call(arrays):
        known = (leaf if array is None else array for leaf, array in zip(leaves, arrays, strict=True))
        return function(*treedef.unflatten(known))

    return jax.sharding.auto_axes(call, axes=mesh.explicit_axes, out_sharding=shardings)(arrays)


def specs_of(tree: Any) -> Any:
    """The specifications of all arrays, or types of arrays, of a tree."""
    return jax.tree.map(lambda array: partition(*entries(array)), tree)


def zeros(shape: tuple[int, ...], dtype: Any, spec: PartitionSpec, like: Any) -> Array:
    """Zeros sharded by a specification on the explicit mesh of `like`, and varying as its first array."""
    mesh = explicit_mesh(like)
    array = jnp.zeros(shape, dtype, device=None if mesh is None else NamedSharding(mesh, spec))
    return vary_like(array, jax.tree.leaves(like)[0])


def varying(array: Any) -> frozenset[str]:
    """The axes of `jax.shard_map` along which devices have values of their own; none if it does not check."""
    aval = array if isinstance(array, AbstractValue) else jax.typeof(array)
    kind = getattr(aval, "manual_axis_type", None)  # which newer versions of JAX have instead of vma
    return frozenset(getattr(aval, "vma", ())) if kind is None else kind.varying


def vary_like(array: Array, like: Any) -> Array:
    """An array that is the same on all devices, as one of each device where another is."""
    axes = tuple(varying(like) - varying(array))
    return jax.lax.pcast(array, axes, to="varying") if axes else array


def shard_like(array: Array, like: Array) -> Array:
    """An array with the sharding of another of its shape."""
    mesh = explicit_mesh((array, like))
    if mesh is None or entries(array) == entries(like):
        return array
    return jax.sharding.reshard(array, NamedSharding(mesh, partition(*entries(like))))
