"""Preconditioned LoRA: each factor's gradient is divided by the other factor's Gram matrix."""

import math
from typing import Any

import optax

from oplora_jax.gradients.tangent import factor_gradients
from oplora_jax.matrix import LowRank, Matrix, from_unit_scale, is_zero
from oplora_jax.optimizers._factors import gram_inverse, preconditioned, wide, wide_at_unit_scale
from oplora_jax.optimizers._facts import facts
from oplora_jax.optimizers._lift import lora_transformation
from oplora_jax.products import times, transpose


@facts(
    gradient="factors", source="2402.02347", invariant="orthogonal", invariant_with={"regularization": 0.0}
)
def scaled_gd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: Any = None,
    regularization: Any = 1e-2,
    weight_decay: Any = 0.0,
    others: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""ScaledGD, preconditioned LoRA with SGD: `oplora` with num_iters=0 and no momentum.

    Both factors step from the old ones, written for scale 1,

    .. math::
      a \leftarrow a - \eta\,G b^\top (b b^\top + \lambda I)^{-1}, \qquad
      b \leftarrow b - \eta\,(a^\top a + \lambda I)^{-1} a^\top G.

    With another scale the increment s a b takes the same path.

    Args:
      learning_rate: eta, a scalar or a schedule, of SGD's size in the full weight.
      momentum: of a heavy ball on the preconditioned gradients; none if None.
      regularization: lambda, of the solves. Unlike that of `oplora` it is not multiplied by eta.
      weight_decay: decoupled, of the factors, multiplied by the learning rate.
      others: for the leaves that are no LoRA parameters; SGD with the same settings if None.

    Returns:
      An Optax transformation for any kind of gradient, without state if there is no momentum.

    Example:
      >>> import jax.numpy as jnp, oplora_jax
      >>> params = oplora_jax.LowRank(jnp.ones((3, 1)), jnp.ones((1, 2)))
      >>> tx = oplora_jax.scaled_gd(0.1, regularization=0.0)
      >>> updates, _ = tx.update(jnp.ones((3, 2)), tx.init(params), params)
      >>> bool(jnp.allclose(updates.a, -0.1))
      True

    References:
      Riemannian preconditioned LoRA, https://arxiv.org/abs/2402.02347.
    """
    heavy_ball = optax.identity() if momentum is None else optax.trace(momentum)
    decay = optax.identity() if is_zero(weight_decay) else optax.add_decayed_weights(weight_decay)
    plain = optax.chain(heavy_ball, decay, optax.scale_by_learning_rate(learning_rate))
    return _preconditioned(plain, regularization, others)


@facts(gradient="factors", source="2402.02347", invariant="none")
def scaled_adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    regularization: Any = 1e-2,
    weight_decay: Any = 0.0,
    others: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Preconditioned LoRA with AdamW: AdamW on the gradients that `scaled_gd` steps along.

    Args:
      learning_rate: a scalar or a schedule, of Adam's size in the factors.
      b1, b2, eps, weight_decay: as for `optax.adamw`; the decay is of the factors.
      regularization: of the solves, as for `scaled_gd`.
      others: for the leaves that are no LoRA parameters; AdamW with the same settings if None.

    Returns:
      An Optax transformation for any kind of gradient, with AdamW's state.

    Example:
      >>> import jax.numpy as jnp, oplora_jax
      >>> params = oplora_jax.LowRank(jnp.ones((3, 1)), jnp.ones((1, 2)))
      >>> tx = oplora_jax.scaled_adamw(0.5)
      >>> updates, _ = tx.update(jnp.ones((3, 2)), tx.init(params), params)
      >>> bool(jnp.allclose(updates.a, -0.5))
      True
    """
    plain = optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    return _preconditioned(plain, regularization, others)


def _preconditioned(plain, regularization, others):
    def precondition(param: LowRank, gradient: Matrix) -> LowRank:
        at, b = wide_at_unit_scale(param)
        # The derivative by the factors at scale 1: s G b^T / sqrt(s).
        dat, db = (z / math.sqrt(param.scale) for z in wide(factor_gradients(param, gradient)))
        dat, db = times(gram_inverse(b, regularization), dat), times(gram_inverse(at, regularization), db)
        return from_unit_scale(LowRank(transpose(dat), db), param)

    lora = optax.chain(preconditioned(precondition), plain)
    return lora_transformation(lora, others=plain if others is None else others)
