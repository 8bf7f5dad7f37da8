"""The types that parameters and states are kept in, and those that steps are computed in."""

from typing import Any

import jax
import jax.numpy as jnp
import optax


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


def cast(tree: Any, dtype: Any) -> Any:
    """The tree with its floating-point arrays in a type."""
    return jax.tree.map(lambda z: z.astype(dtype) if _is_floating(z.dtype) else z, tree)


def cast_up(tree: Any, dtype: Any) -> Any:
    """The tree with its floating-point arrays in a type, where that is wider than theirs."""
    return jax.tree.map(
        lambda z: z.astype(jnp.promote_types(z.dtype, dtype)) if _is_floating(z.dtype) else z, tree
    )


def widest(tree: Any, *types: Any) -> jnp.dtype:
    """The widest of the floating-point types of a tree and of others."""
    return jnp.result_type(*types, *(z.dtype for z in jax.tree.leaves(tree) if _is_floating(z.dtype)))


def in_dtype(tx: optax.GradientTransformation, dtype: Any) -> optax.GradientTransformationExtraArgs:
    """A transformation that computes in a type where that is wider than the parameters'."""
    tx = optax.with_extra_args_support(tx)
    if dtype is None:
        return tx
    wide = lambda params: cast(params, widest(params, dtype))

    def update_fn(updates, state, params=None, **extra_args):
        updates, state = tx.update(updates, state, wide(params), **extra_args)
        return jax.tree.map(lambda p, u: cast(u, p.dtype), params, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: tx.init(wide(params)), update_fn)
