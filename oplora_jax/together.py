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
    launch however many parameters there are.

    Args:
      function: of a kind and a tree of arrays, with any axes in front; returns a tree of such arrays.
      kinds: what the function must know besides the arrays.
      arguments: trees of arrays.
    """
    groups: dict[Any, list[int]] = {}
    for place, (kind, argument) in enumerate(zip(kinds, arguments, strict=True)):
        shapes = ((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(argument))
        groups.setdefault((kind, jax.tree.structure(argument), *shapes), []).append(place)
    results: list[Any] = [None] * len(arguments)
    for (kind, *_), places in groups.items():
        found = function(kind, jax.tree.map(lambda *z: jnp.stack(z), *(arguments[i] for i in places)))
        for index, place in enumerate(places):
            results[place] = jax.tree.map(partial(_entry, index), found)
    return results


def _entry(index: int, stack: Array) -> Array:
    """stack[index], gathered: one kernel for all parameters, where slices would be one each to compile."""
    rows = stack.reshape(-1, stack.shape[-1])
    chosen = np.arange(len(rows)).reshape(len(stack), -1)[index]
    return jnp.take(rows, chosen, axis=0, mode="clip").reshape(stack.shape[1:])
