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
    r"""ScaledGD: SGD where each factor's gradient is divided by the Gram matrix of the other factor.

    It steps as `oplora` with `num_iters=0` and no momentum.

    Args:
      learning_rate: a scalar or a schedule, of the size of full training's by SGD.
      momentum: decay of a momentum of the preconditioned gradients; none if None.
      regularization: of the solves. Unlike that of `oplora` it is not multiplied by the learning rate.
      weight_decay: decoupled, of the factors, multiplied by the learning rate.
      others: the optimizer of the leaves that are no LoRA parameters; SGD with the same settings if None.

    Returns:
      An Optax transformation that takes exact gradients and those of `jax.grad` alike, without state if there
      is no momentum.

    Both factors step from the old ones. At scale s = 1, with the learning rate $\eta$, the regularization
    $\lambda$ and $G$ the gradient of the full weight,

    $$
    a \leftarrow a - \eta\,G b^\top (b b^\top + \lambda I)^{-1}, \qquad
    b \leftarrow b - \eta\,(a^\top a + \lambda I)^{-1} a^\top G.
    $$

    With another scale the increment s a b takes the same path.

    From [Riemannian preconditioned LoRA](https://arxiv.org/abs/2402.02347).

    Examples:
      >>> import jax.numpy as jnp, oplora_jax
      >>> params = oplora_jax.LowRank(jnp.ones((3, 1)), jnp.ones((1, 2)))
      >>> tx = oplora_jax.scaled_gd(0.1, regularization=0.0)
      >>> updates, _ = tx.update(jnp.ones((3, 2)), tx.init(params), params)
      >>> bool(jnp.allclose(updates.a, -0.1))
      True
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
      learning_rate: a scalar or a schedule, of the size of Adam's on the factors.
      b1: as for `optax.adamw`.
      b2: as for `optax.adamw`.
      eps: as for `optax.adamw`.
      regularization: of the solves, as for `scaled_gd`.
      weight_decay: decoupled, of the factors, multiplied by the learning rate.
      others: the optimizer of the leaves that are no LoRA parameters; AdamW with the same settings if None.

    Returns:
      An Optax transformation that takes exact gradients and those of `jax.grad` alike. Its state is AdamW's.

    From [Riemannian preconditioned LoRA](https://arxiv.org/abs/2402.02347).

    Examples:
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
