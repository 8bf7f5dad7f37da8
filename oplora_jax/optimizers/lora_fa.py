"""LoRA-FA: the left factor stays as it is, and the right one follows the full gradient within its columns."""

from typing import Any

import optax

from oplora_jax.matrix import LowRank, Matrix, left_product
from oplora_jax.optimizers._factors import gram_inverse, on_factor, preconditioned, wide
from oplora_jax.optimizers._facts import facts
from oplora_jax.optimizers._lift import lora_transformation
from oplora_jax.products import times


@facts(gradient="factors", source="2308.03303", invariant="none")
def lora_fa(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    others: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""LoRA-FA: AdamW on the right factor b alone, with the left factor a frozen.

    It takes the least memory: about half of AdamW's state, and the backward pass keeps x a of a layer's
    inputs x, r numbers a token in the place of n, if the gradient and the update are compiled together. Where
    the gradient is compiled on its own, freeze a inside the loss:
    `LowRank(jax.lax.stop_gradient(p.a), p.b, p.scale)`.

    Args:
      learning_rate: a scalar or a schedule, of the size of Adam's on b.
      b1: as for `optax.adamw`.
      b2: as for `optax.adamw`.
      eps: as for `optax.adamw`.
      weight_decay: as for `optax.adamw`, of b.
      others: the optimizer of the leaves that are no LoRA parameters; AdamW with the same settings if None.

    Returns:
      An Optax transformation that takes exact gradients and those of `jax.grad` alike. Its state is AdamW's
      for b.

    With $\partial b$ the gradient of b, as of `jax.grad`, and $G$ that of the full weight, AdamW is given

    $$
    g_b = s^{-2}\, (a^\top a)^{-1}\, \partial b = s^{-1}\, (a^\top a)^{-1}\, a^\top G.
    $$

    Its step in the full weight, $s\,a\,g_b$, is the full gradient projected on the columns of a. Where these
    are linearly dependent the inverse is the pseudo-inverse.

    From [LoRA-FA](https://arxiv.org/abs/2308.03303).

    Examples:
      >>> import jax.numpy as jnp, oplora_jax
      >>> params = oplora_jax.LowRank(jnp.ones((3, 1)), jnp.zeros((1, 2)))
      >>> tx = oplora_jax.lora_fa(0.5)
      >>> updates, state = tx.update(jnp.ones((3, 2)), tx.init(params), params)
      >>> jnp.round(updates.b, 4).tolist(), bool((updates.a == 0).all())
      ([[-0.5, -0.5]], True)
    """
    plain = optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    lora = optax.chain(preconditioned(_within_columns), on_factor(plain, "b"))
    return lora_transformation(lora, others=plain if others is None else others)


def _within_columns(param: LowRank, gradient: Matrix) -> LowRank:
    """The gradient of b, in the norm of the full weight; that of a is zero."""
    at, _ = wide(param)
    if isinstance(gradient, LowRank):
        projected = gradient.b.astype(at.dtype) / param.scale  # a^T G
    else:
        projected = left_product(at, gradient)
    db = times(gram_inverse(at), projected) / param.scale
    return param.with_factors(0 * param.a, db.astype(param.b.dtype))  # computed from a, for its sharding
