"""The type that an optimizer keeps its low-rank state in, apart from that of the parameters."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from oplora_jax.matrix import LowRank, is_low_rank
from oplora_jax.optimizers.finite import Checked


def with_state_dtype(
    tx: optax.GradientTransformation, state_dtype: Any
) -> optax.GradientTransformationExtraArgs:
    """`tx` with the `LowRank` nodes of its state kept in a type; unchanged if that is None.

    `tx` sees parameters and state in the wider type of both, so that a step is computed there and rounded
    once, to the parameters' type. Other arrays of the state are as `tx` makes them for such parameters: the
    average of a second moment with a decay of 0.99 or more would hardly move in bfloat16.

    Args:
      tx: any transformation whose updates have the parameters' structure.
      state_dtype: a floating-point type or None.

    Raises:
      ValueError: a type that is not of floating point.
    """
    tx = optax.with_extra_args_support(tx)
    stored = check_state_dtype(state_dtype)
    if stored is None:
        return tx

    def widest(params):
        types = [z.dtype for z in jax.tree.leaves(params)]
        return jnp.result_type(stored, *(t for t in types if _is_floating(t)))

    def init_fn(params):
        return _cast_low_rank(tx.init(_cast(params, widest(params))), stored)

    def update_fn(updates, state, params=None, **extra_args):
        wide = widest(params)
        at, state = _cast(params, wide), _cast_low_rank(state, wide)
        updates, state = tx.update(updates, state, at, **extra_args)
        like_params = lambda tree: jax.tree.map(lambda p, u: _cast(u, p.dtype), params, tree)
        if isinstance(updates, Checked):
            updates = updates._replace(updates=like_params(updates.updates))
        else:
            updates = like_params(updates)
        return updates, _cast_low_rank(state, stored)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def check_state_dtype(state_dtype: Any) -> Any:
    """The type, float32 for float64 where that is off; None for None. Raises ValueError for any other."""
    if state_dtype is None:
        return None
    if not _is_floating(state_dtype):
        raise ValueError(
            f"state_dtype is {state_dtype!r}; expected a floating-point type such as jnp.bfloat16, or None"
        )
    return jax.dtypes.canonicalize_dtype(state_dtype)


def _is_floating(dtype: Any) -> bool:
    try:
        return jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        return False


def _cast(tree: Any, dtype: Any) -> Any:
    """The tree with its floating-point arrays in a type."""
    return jax.tree.map(lambda z: z.astype(dtype) if _is_floating(z.dtype) else z, tree)


def _cast_low_rank(tree: Any, dtype: Any) -> Any:
    """The tree with its `LowRank` nodes in a type."""
    cast = lambda node: _cast(node, dtype) if isinstance(node, LowRank) else node
    return jax.tree.map(cast, tree, is_leaf=is_low_rank)
