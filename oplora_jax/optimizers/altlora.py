"""AltLoRA: the gradient and the momentum are projected on one factor after the other."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from oplora_jax.matrix import HIGHEST, compute_dtype, matmul, transpose
from oplora_jax.optimizers._factors import from_thin, gram_inverse, thin_factors_and_gradients
from oplora_jax.optimizers._facts import facts
from oplora_jax.optimizers._lift import at_step, for_lora, is_zero, map_lora


class AltLoRAState(NamedTuple):
    """State of `altlora` and `altlora_plus` at the LoRA parameters."""

    count: Array  # int32 ()
    momentum: Any  # LowRank at each LoRA parameter: a (*batch, n, r), b (*batch, r, m)
    previous: Any  # likewise: the factors that the momenta of b and a were fitted with
    second_moment: Any = None  # altlora_plus: likewise, of float32 at least


@facts(
    gradient="factors", source="2505.12455", invariant="orthogonal", invariant_with={"regularization": 0.0}
)
def altlora(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: Any = 0.9,
    regularization: Any = 1e-5,
    weight_decay: Any = 0.0,
    others: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AltLoRA: alternating projections of the gradient, and of the momentum, on the factors.

    With :math:`C = (b b^\top + \delta I)^{-1}`, and then :math:`D = (a^\top a + \delta I)^{-1}` of the new a,

    .. math::
      m_a &\leftarrow \beta_1\, m_a\, (b' b^\top)\, C + (1 - \beta_1)\, \partial a\, C, \qquad
      a \leftarrow a - \eta\, (m_a / (1 - \beta_1^t) + w a) \\
      m_b &\leftarrow \beta_1\, D\, (a^\top a')\, m_b + (1 - \beta_1)\, D\, \partial b, \qquad
      b \leftarrow b - \eta\, (m_b / (1 - \beta_1^t) + w b),

    where a' and b' are the factors that stood in D and C a step before: a momentum is carried over to the
    factor it now multiplies. Without regularization a b does not depend on how it is split into factors
    (a R, R^-1 b); with it, on orthogonal R neither.

    The derivatives are those of `jax.grad`, the scale s in them, as in the authors' code: at scale s the
    increment s a b moves s^2 times as far as at scale 1. Without momentum and regularization a takes the
    step of `scaled_gd` at the rate :math:`s^2 \eta`.

    The state is twice the size of the LoRA parameters.

    Args:
      learning_rate: eta, a scalar or a schedule.
      b1: decay of the momentum.
      regularization: delta, of the solves, in the units of the squared factors.
      weight_decay: w, decoupled, of the factors, multiplied by the learning rate.
      others: for the leaves that are no LoRA parameters; if None, steps along the bias-corrected average of
        the gradients with the same settings.

    Returns:
      An Optax transformation for any kind of gradient.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import oplora_jax
      >>> params = oplora_jax.LowRank(jnp.ones((3, 1)), jnp.zeros((1, 2)))
      >>> tx = oplora_jax.altlora(0.5, regularization=0.0)
      >>> state = tx.init(params)
      >>> gradients = jax.grad(lambda p: oplora_jax.to_dense(p).sum())(params)
      >>> updates, state = tx.update(gradients, state, params)
      >>> bool(jnp.allclose(updates.a, 0) and jnp.allclose(updates.b, -0.5))  # b is zero: a waits
      True

    References:
      AltLoRA, https://arxiv.org/abs/2505.12455.
    """
    plain = optax.chain(
        optax.ema(b1),
        optax.identity() if is_zero(weight_decay) else optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
    lora = _alternating(learning_rate, b1, regularization, weight_decay)
    return for_lora(lora, plain if others is None else others)


@facts(gradient="factors", source="2505.12455", invariant="none")
def altlora_plus(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-6,
    regularization: Any = 1e-5,
    weight_decay: Any = 0.0,
    others: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AltLoRA+: `altlora` with a second moment of each entry.

    .. math::
      v_a \leftarrow \beta_2\, v_a + (1 - \beta_2)\, (\partial a\, C)^2, \qquad
      a \leftarrow a - \eta\, \left(\frac{m_a}{(1 - \beta_1^t)(\sqrt{v_a} + \epsilon)} + w a\right),

    with the momentum of `altlora`, and the same for b. The second moment is not bias-corrected: the first
    step is :math:`1 / \sqrt{1 - \beta_2}` times as long as Adam's. A step depends on how a b is split.

    The authors' code steps along the carried momentum but keeps the average without the carrying, so that
    what is older than a step belongs to factors that are gone. Here, as in `altlora`, the carried momentum
    is kept.

    The scale cancels in the step, but for eps and the regularization. The state is three times the size of
    the LoRA parameters.

    Args:
      learning_rate: eta, a scalar or a schedule.
      b1: decay of the momentum.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      regularization: delta, of the solves, in the units of the squared factors.
      weight_decay: w, decoupled, of the factors, multiplied by the learning rate.
      others: for the leaves that are no LoRA parameters; AdamW with the same settings if None.

    Returns:
      An Optax transformation for any kind of gradient.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import oplora_jax
      >>> params = oplora_jax.LowRank(jnp.ones((3, 1)), jnp.ones((1, 2)))
      >>> tx = oplora_jax.altlora_plus(0.1, b2=0.0)
      >>> gradients = jax.grad(lambda p: oplora_jax.to_dense(p).sum())(params)
      >>> updates, state = tx.update(gradients, tx.init(params), params)
      >>> bool(jnp.allclose(updates.a, -0.1))
      True

    References:
      AltLoRA, https://arxiv.org/abs/2505.12455.
    """
    plain = optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    lora = _alternating(learning_rate, b1, regularization, weight_decay, adaptive=(b2, eps))
    return for_lora(lora, plain if others is None else others)


def _alternating(learning_rate, b1, regularization, weight_decay, adaptive=None):
    """Both optimizers; `adaptive` is the (b2, eps) of a second moment."""

    def init_fn(params):
        second = None
        if adaptive is not None:  # an average with a decay of 0.999 would not move in bfloat16
            second = jax.tree.map(lambda z: jnp.zeros_like(z, compute_dtype(z)), params)
        momentum = jax.tree.map(jnp.zeros_like, params)
        previous = jax.tree.map(jnp.array, params)
        return AltLoRAState(jnp.zeros((), jnp.int32), momentum, previous, second)

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        lr = at_step(learning_rate, state.count)
        count = optax.safe_increment(state.count)
        debias = 1 / (1 - jnp.asarray(b1, lr.dtype) ** count)

        def side(thin, gradient, other, old_other, momentum, second):
            """The increment of one factor, whose product with `other` is the matrix."""
            inverse = gram_inverse(other, regularization)
            fitted = matmul(gradient, inverse, HIGHEST)
            change = matmul(matmul(transpose(old_other), other, HIGHEST), inverse, HIGHEST)
            momentum = b1 * matmul(momentum, change, HIGHEST) + (1 - b1) * fitted
            direction = debias * momentum
            if adaptive is not None:
                b2, eps = adaptive
                second = b2 * second + (1 - b2) * fitted**2
                direction = direction / (jnp.sqrt(second) + eps)
            return -lr * (direction + weight_decay * thin), momentum, second

        def one(param, gradient, momentum, previous, *second):
            a, b, da, db = thin_factors_and_gradients(param, gradient)
            ma, mb, old_a, old_b = (
                z.astype(a.dtype)
                for z in (momentum.a, transpose(momentum.b), previous.a, transpose(previous.b))
            )
            va, vb = (second[0].a, transpose(second[0].b)) if second else (None, None)
            step_a, ma, va = side(a, da, b, old_b, ma, va)
            new_a = a + step_a
            step_b, mb, vb = side(b, db, new_a, old_a, mb, vb)
            results = from_thin(param, step_a, step_b), from_thin(param, ma, mb), from_thin(param, new_a, b)
            return (*results, from_thin(second[0], va, vb)) if second else results

        seconds = [] if adaptive is None else [state.second_moment]
        trees = map_lora(one, 3 + len(seconds), params, updates, state.momentum, state.previous, *seconds)
        return trees[0], AltLoRAState(count, *trees[1:])

    return optax.GradientTransformation(init_fn, update_fn)
