"""LoRA-Pro: the factor gradients whose step on s a b comes closest to that of the full gradient."""

from functools import partial
from typing import Any, Literal

import jax.numpy as jnp
import optax

from oplora_jax.gradients.tangent import factor_gradients, tangent_gradient
from oplora_jax.matrix import LowRank, is_zero, to_dense
from oplora_jax.optimizers._factors import from_wide, gram_inverse, preconditioned, sylvester, wide
from oplora_jax.optimizers._facts import facts
from oplora_jax.optimizers._lift import lora_transformation
from oplora_jax.optimizers._trees import mapped
from oplora_jax.products import compute_dtype, gram, times, transpose

XMode = Literal["sylvester", "zero"]


@facts(gradient="factors", source="2407.18242", invariant="orthogonal", invariant_with={"x_mode": "zero"})
def lora_pro(
    learning_rate: optax.ScalarOrSchedule,
    *,
    x_mode: XMode = "sylvester",
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    others: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""LoRA-Pro with AdamW: the factors follow dense Adam on the full weight as closely as they can.

    Its state is as large as that of full training by Adam.

    Args:
      learning_rate: a scalar or a schedule, of the size of Adam's in full training.
      x_mode: as for `lora_pro_sgd`.
      b1: as for `optax.adamw`.
      b2: as for `optax.adamw`.
      eps: as for `optax.adamw`.
      weight_decay: decoupled, of the factors, multiplied by the learning rate.
      others: the optimizer of the leaves that are no LoRA parameters; AdamW with the same settings if None.

    Returns:
      An Optax transformation that takes exact gradients and those of `jax.grad` alike. Its state is Adam's on
      the full weight, 2 n m numbers for each LoRA parameter, in float32 at least.

    Raises:
      ValueError: an unknown x_mode.

    Adam is given the part of the full gradient $G$ that a small step of both factors can follow,
    $\tilde G = P_a G + G P_b - P_a G P_b$, where $P_a$ and $P_b$ project on the columns of a and on the rows
    of b. The factors follow Adam's step as they follow the gradient in `lora_pro_sgd`.

    From [LoRA-Pro](https://arxiv.org/abs/2407.18242).

    Examples:
      >>> import jax.numpy as jnp, optax, oplora_jax
      >>> params = oplora_jax.LowRank(jnp.ones((3, 1)), jnp.zeros((1, 2)))
      >>> tx = oplora_jax.lora_pro(0.1)
      >>> updates, _ = tx.update(jnp.ones((3, 2)), tx.init(params), params)
      >>> bool(jnp.allclose(oplora_jax.to_dense(optax.apply_updates(params, updates)), -0.1))
      True
    """
    closest = partial(closest_gradients, x_mode=_check_x_mode(x_mode))
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
    dense_like = lambda param: jnp.zeros_like(to_dense(param), compute_dtype(param.a, param.b))
    equivalent = lambda param, gradient: to_dense(tangent_gradient(param, factor_gradients(param, gradient)))

    def update_fn(updates, state, params=None):
        steps, state = adam.update(mapped(equivalent, params, updates), state)
        return mapped(closest, params, steps), state

    init_fn = lambda params: adam.init(mapped(dense_like, params))
    on_full_weight = optax.GradientTransformation(init_fn, update_fn)
    lora = optax.chain(on_full_weight, _decayed_step(learning_rate, weight_decay))
    if others is None:
        others = optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    return lora_transformation(lora, others=others)


@facts(gradient="factors", source="2407.18242", invariant="orthogonal", invariant_with={"x_mode": "zero"})
def lora_pro_sgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    x_mode: XMode = "sylvester",
    weight_decay: Any = 0.0,
    others: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""LoRA-Pro with SGD: steps of the factors that follow the full gradient as closely as they can.

    Args:
      learning_rate: a scalar or a schedule, of the size of full training's by SGD.
      x_mode: which of the pairs of factor steps with the same effect is taken, X below. "sylvester", the
        paper's choice, takes the one closest to the factors' gradients, "zero" the one with X = 0.
      weight_decay: decoupled, of the factors, multiplied by the learning rate.
      others: the optimizer of the leaves that are no LoRA parameters; SGD with the same settings if None.

    Returns:
      An Optax transformation without state, that takes exact gradients and those of `jax.grad` alike.

    Raises:
      ValueError: an unknown x_mode.

    With $\partial a$, $\partial b$ the gradients of the factors, as of `jax.grad`, SGD steps along

    $$
    \begin{aligned}
    g_a &= s^{-2}\, \partial a\, (b b^\top)^{-1} + a X \\
    g_b &= s^{-2}\, (a^\top a)^{-1}\, \partial b\, (I - P_b) - X b, \qquad P_b = b^\top (b b^\top)^{-1} b
    \end{aligned}
    $$

    For every $X$ the increment moves, to first order, along $s\,(g_a b + a g_b) = P_a G + G P_b - P_a G P_b$,
    the part of the full gradient $G$ that the factors can follow. "sylvester" solves
    $a^\top a\, X + X\, b b^\top = -s^{-2}\, a^\top \partial a\, (b b^\top)^{-1}$. The inverses are
    pseudo-inverses: where b is zero, a waits. The increment takes the same path from a R, R^-1 b for every
    orthogonal R, and with `x_mode="zero"` for every invertible R.

    From [LoRA-Pro](https://arxiv.org/abs/2407.18242).

    Examples:
      >>> import jax.numpy as jnp, optax, oplora_jax
      >>> params = oplora_jax.LowRank(jnp.ones((3, 1)), jnp.zeros((1, 2)))
      >>> tx = oplora_jax.lora_pro_sgd(0.1)
      >>> updates, _ = tx.update(jnp.ones((3, 2)), tx.init(params), params)
      >>> bool(jnp.allclose(oplora_jax.to_dense(optax.apply_updates(params, updates)), -0.1))
      True
    """
    closest = partial(closest_gradients, x_mode=_check_x_mode(x_mode))
    plain = _decayed_step(learning_rate, weight_decay)
    lora = optax.chain(preconditioned(closest), plain)
    return lora_transformation(lora, others=plain if others is None else others)


def closest_gradients(param: LowRank, gradient: Any, x_mode: XMode) -> LowRank:
    """The pair (g_a, g_b) for any kind of gradient, in the types of the factors."""
    (at, b), (dat, db) = wide(param), wide(factor_gradients(param, gradient))
    inverse_a, inverse_b = gram_inverse(at, stored=param.a.dtype), gram_inverse(b, stored=param.b.dtype)
    gat = times(inverse_b, dat) / param.scale**2
    gb = times(inverse_a, db) / param.scale**2
    gb = gb - times(gb, transpose(b), inverse_b, b)
    if x_mode == "sylvester":
        x = sylvester(gram(at), gram(b), -times(at, transpose(gat)))
        gat, gb = gat + times(transpose(x), at), gb - times(x, b)
    return from_wide(param, gat, gb)


def _check_x_mode(x_mode: Any) -> XMode:
    if x_mode not in ("sylvester", "zero"):
        raise ValueError(f"x_mode is {x_mode!r}; expected 'sylvester' or 'zero'")
    return x_mode


def _decayed_step(learning_rate, weight_decay):
    decay = optax.identity() if is_zero(weight_decay) else optax.add_decayed_weights(weight_decay)
    return optax.chain(decay, optax.scale_by_learning_rate(learning_rate))
