"""Small arrays of many parameters, computed at once."""

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


def together(function: Callable[..., Any], kinds: Sequence[Hashable], arguments: Sequence[Any]) -> list[Any]:
    """A function of (kind, arrays) for each of many parameters; one call for all of a kind and of one shape.

    The arrays of a group are stacked along a new first axis, so that there are few kernels to compile and to
    launch however many parameters there are. One that is alone stays as it is.

    Args:
      function: of a kind and a tree of arrays, with any axes in front; returns a tree of such arrays.
      kinds: what the function must know besides the arrays.
      arguments: trees of arrays.
    """
    groups: dict[Any, list[int]] = {}
    for place, (kind, argument) in enumerate(zip(kinds, arguments, strict=True)):
        types = map(jax.typeof, jax.tree.leaves(argument))
        groups.setdefault((kind, jax.tree.structure(argument), *types), []).append(place)
    results: list[Any] = [None] * len(arguments)
    for (kind, *_), places in groups.items():
        if len(places) == 1:
            results[places[0]] = function(kind, arguments[places[0]])
            continue
        found = function(kind, jax.tree.map(lambda *z: jnp.stack(z), *(arguments[i] for i in places)))
        for index, place in enumerate(places):
            results[place] = jax.tree.map(partial(_entry, index), found)
    return results


def _entry(index: int, stack: Array) -> Array:
    """stack[index], gathered by the few rows or columns of each: one kernel for all parameters.

    Slices would be one each to compile. What an axis is spread over the devices of a mesh by stays.
    """
    if stack.ndim == 1:
        # A slice would be compiled together with all that the numbers are computed from, once for each.
        return _entry(index, jnp.broadcast_to(stack[:, None], (*stack.shape, 2)))[0]
    axis = min(range(-min(2, stack.ndim - 1), 0), key=lambda axis: stack.shape[axis])
    few = np.arange(stack.shape[axis])
    at = (np.full_like(few, index), *[slice(None)] * (stack.ndim + axis - 1), few)
    return jnp.moveaxis(stack.at[at].get(mode="promise_in_bounds", unique_indices=True), 0, axis)
