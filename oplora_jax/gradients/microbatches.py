"""Gradients of a batch, gathered over its parts one after the other."""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from oplora_jax._jax import Tracer
from oplora_jax.matrix import OuterProduct
from oplora_jax.products import compute_dtype
from oplora_jax.sharding import entries, partition, under_auto_sharding


def accumulate(
    differentiate: Callable[..., Any], microbatches: int, weight: Callable[..., Any] | None
) -> Callable[..., Any]:
    """A gradient function of (params, state, args, kwargs, share), applied to k microbatches in a scan.

    It returns (value, (aux, state), gradients), of a microbatch's share of the mean, and so does the result:
    values and gradients are added up, outer products put side by side, aux is stacked, and the state goes
    from each microbatch to the next.
    """
    is_outer = lambda node: isinstance(node, OuterProduct)
    counted = (lambda share, added: added) if weight is None else _without_nothing

    def accumulated(params, state, args, kwargs):
        parts, rebuild = split(args, microbatches)

        # Traced once: for the shapes of the sums, and for the scan.
        @jax.jit
        def one(params, state, part, share):
            return differentiate(params, state, rebuild(part), kwargs, share)

        shares = _shares(weight, microbatches, parts, rebuild, kwargs)
        first = jax.tree.map(lambda z: jax.lax.index_in_dim(z, 0, keepdims=False), (parts, shares))
        *_, gradients = jax.eval_shape(one, params, state, *first)
        nodes, treedef = jax.tree.flatten(gradients, is_leaf=is_outer)

        def body(carry, part):
            (state, sums), (part, share) = carry, part
            value, (aux, state), gradients = one(params, state, part, share)
            value, new = counted(share, value), treedef.flatten_up_to(gradients)
            new = [(g.x, counted(share, g.dy)) if is_outer(g) else counted(share, g) for g in new]
            sums = [None if s is None else s + g.astype(s.dtype) for s, g in zip(sums, new, strict=True)]
            return (state, sums), (value, aux, [g for g in new if isinstance(g, tuple)])

        start = [None if is_outer(node) else _zeros(node) for node in nodes]
        (state, sums), (values, aux, outers) = jax.lax.scan(body, (state, start), (parts, shares))
        _warn_of_nan(values)
        outers = iter(outers)
        total = [
            OuterProduct(*map(_side_by_side, next(outers))) if s is None else s.astype(node.dtype)
            for s, node in zip(sums, nodes, strict=True)
        ]
        value = jnp.sum(values, dtype=compute_dtype(values)).astype(values.dtype)
        return value, (aux, state), treedef.unflatten(total)

    return accumulated


def _shares(weight: Any, microbatches: int, parts: Any, rebuild: Any, kwargs: Any) -> Array | np.ndarray:
    """Each microbatch's share of the mean, (k,)."""
    if weight is None:
        return np.full(microbatches, 1 / microbatches)
    weights = jax.lax.map(lambda part: jnp.asarray(weight(*rebuild(part), **kwargs)), parts)
    if weights.ndim != 1:
        raise ValueError(f"weight returns an array {weights.shape[1:]} for a microbatch; expected a scalar")
    weights = weights.astype(float)
    return weights / jnp.sum(weights)


def _without_nothing(share: Array, tree: Any) -> Any:
    """What a microbatch adds: if nothing counts in it, which may make 0 / 0, zero for what is not finite."""
    return jax.tree.map(lambda z: jnp.where((share != 0) | jnp.isfinite(z), z, 0), tree)


def _warn_of_nan(values: Array) -> None:
    """Warns of NaN, where the values are known: outside of compiled functions."""
    if not isinstance(values, Tracer) and (places := np.flatnonzero(np.isnan(values)).tolist()):
        warnings.warn(
            f"the loss is NaN in microbatches {places}, counted from 0. If it is a mean over what counts, as "
            "by a mask, and nothing counts there, say with weight= how much does",
            stacklevel=4,
        )


def split(args: Any, microbatches: int) -> tuple[Any, Callable[[Any], Any]]:
    """A tree's arrays in k parts, (k, size / k, ...), and a function that puts one part in their places."""
    is_array = lambda leaf: isinstance(leaf, jax.Array | np.ndarray)
    # The parameters are argument 0.
    name = lambda path: f"argument {path[0].idx + 1}{jax.tree_util.keystr(path[1:])}"
    arrays = [(name(path), leaf) for path, leaf in jax.tree.leaves_with_path(args) if is_array(leaf)]
    sizes = {name: leaf.shape[0] if leaf.ndim else None for name, leaf in arrays}
    listed = ", ".join(f"{name}: {size or 'no axis'}" for name, size in sizes.items())
    batch = "the arrays in the positional arguments behind the parameters"
    whole = "pass what is no part of the batch by keyword, it is not split"
    if any(leaf.ndim == 0 and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for _, leaf in arrays):
        whole += (
            "; a random key would be the same in each part: pass jax.random.split(key, rows), one key a row"
        )
    error = None
    if not sizes:
        error = f", but there is nothing to split: {batch} are the batch"
    elif len(set(sizes.values())) > 1 or None in sizes.values():
        error = f" splits {batch} along their first axis, whose sizes must agree; they are {listed}; {whole}"
    elif next(iter(sizes.values())) % microbatches:
        error = f" does not divide the first axis of the batch ({listed}); {whole}"
    if error:
        raise ValueError(f"microbatches={microbatches}{error}")
    parts = jax.tree.map(lambda z: _parts(jnp.asarray(z), microbatches) if is_array(z) else None, args)
    return parts, lambda part: jax.tree.map(lambda z, one: z if one is None else one, args, part)


def _parts(array: Array, microbatches: int) -> Array:
    """Every k-th row: a batch that is spread over devices then stays where it is."""
    cut = lambda z: jnp.moveaxis(z.reshape(-1, microbatches, *z.shape[1:]), 1, 0)
    return under_auto_sharding(cut, lambda: partition(None, *entries(array)), array)


def _side_by_side(captures: Array) -> Array:
    """(k, *batch, N, n) to (*batch, k N, n), again without moving what is spread over devices."""
    _, *batch, _, size = captures.shape
    join = lambda z: jnp.moveaxis(z, 0, -2).reshape(*batch, -1, size)
    return under_auto_sharding(join, lambda: partition(*entries(captures)[1:]), captures)


def _zeros(like: Any) -> Array:
    """To add gradients to, in float32 at least."""
    mesh = like.sharding and like.sharding.mesh
    device = like.sharding if mesh and mesh.explicit_axes else None
    return jnp.zeros(like.shape, compute_dtype(like.dtype), device=device)
