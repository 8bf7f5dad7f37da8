"""Norms and clipping for trees whose gradients are arrays, outer products or factor gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from oplora_jax.matrix import DenseGradient, OuterProduct
from oplora_jax.norms import frobenius_norm
from oplora_jax.products import compute_dtype


def global_norm(updates: Any) -> Float[Array, ""]:
    """The norm of a whole tree of gradients, with exact gradients as the matrices they stand for.

    Args:
      updates: a tree of arrays, `OuterProduct`, `DenseGradient` and `LowRank` nodes. The last are pairs of
        factor gradients, and both count.

    Returns:
      A scalar, in float32 at least.

    Examples:
      >>> import jax.numpy as jnp
      >>> from oplora_jax import OuterProduct, global_norm
      >>> gradient = OuterProduct(x=jnp.ones((1, 2)), dy=jnp.ones((1, 2)))
      >>> round(float(global_norm({"lora": gradient, "bias": jnp.zeros(3)})), 5)
      2.0
    """
    nodes = jax.tree.leaves(updates, is_leaf=_is_exact)
    norms = [frobenius_norm(g) if _is_exact(g) else g for g in nodes]
    return optax.tree.norm([z.astype(compute_dtype(z)) for z in norms])


def clip_by_global_norm(max_norm: Any) -> optax.GradientTransformationExtraArgs:
    """`optax.clip_by_global_norm` for exact gradients.

    Optax's own takes the norm of x and dy of an `OuterProduct`; this one that of the matrix. Chain it in
    front of the optimizer.

    Args:
      max_norm: the largest `global_norm` that passes unchanged. Of a larger one all gradients are scaled down
        by one number.

    Returns:
      An Optax transformation without state.

    Examples:
      >>> import jax.numpy as jnp
      >>> import oplora_jax
      >>> tx = oplora_jax.clip_by_global_norm(1.0)
      >>> gradient = oplora_jax.OuterProduct(x=jnp.ones((1, 2)), dy=jnp.ones((1, 2)))  # of norm 2
      >>> clipped, _ = tx.update({"lora": gradient}, tx.init(None))
      >>> oplora_jax.to_dense(clipped["lora"]).tolist()
      [[0.5, 0.5], [0.5, 0.5]]
    """

    def clip(updates, params):
        norm = global_norm(updates)
        factor = jnp.where(norm < max_norm, 1.0, max_norm / norm)

        def scale(gradient):
            if isinstance(gradient, OuterProduct):
                return gradient.times(factor)
            if isinstance(gradient, DenseGradient):
                moment = scale(scale(gradient.dy_moment))
                return DenseGradient(scale(gradient.gradient), gradient.x_moment, moment, gradient.tokens)
            return (gradient * factor).astype(gradient.dtype)

        return jax.tree.map(scale, updates, is_leaf=_is_exact)

    return optax.with_extra_args_support(optax.stateless(clip))


def _is_exact(node: Any) -> bool:
    return isinstance(node, OuterProduct | DenseGradient)
