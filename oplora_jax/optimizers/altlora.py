"""AltLoRA: the gradient and the momentum are projected on one factor after the other."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from oplora_jax.gradients.tangent import factor_gradients
from oplora_jax.matrix import is_zero
from oplora_jax.optimizers._factors import from_wide, gram_inverse, wide
from oplora_jax.optimizers._facts import facts
from oplora_jax.optimizers._lift import at_step, each, lora_optimizer
from oplora_jax.products import compute_dtype, times, transpose


class AltLoRAState(NamedTuple):
    """State of `altlora` and `altlora_plus` at the LoRA parameters."""

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
    r"""AltLoRA: SGD with momentum on the full weight, by a least-squares step of a and then one of b.

    Args:
      learning_rate: a scalar or a schedule, of the size of full training's by SGD where the scale s of the
        LoRA parameter is 1; in general the increment s a b moves s^2 times as far.
      b1: decay of the momentum.
      regularization: of the least-squares solves, in the units of the squared factors.
      weight_decay: decoupled, of the factors, multiplied by the learning rate.
      others: the optimizer of the leaves that are no LoRA parameters; SGD on `optax.ema` with the same
        settings if None.

    Returns:
      An Optax transformation that takes exact gradients and those of `jax.grad` alike. Its state is twice the
      size of the LoRA parameters.

    With $\partial a$, $\partial b$ the gradients of the factors, as of `jax.grad`,
    $C = (b b^\top + \delta I)^{-1}$, and then $D = (a^\top a + \delta I)^{-1}$ of the new a, a step is

    $$
    \begin{aligned}
    m_a &\leftarrow \beta_1\, m_a\, (b' b^\top)\, C + (1 - \beta_1)\, \partial a\, C, \qquad
    a \leftarrow a - \eta\, (m_a / (1 - \beta_1^t) + w a) \\
    m_b &\leftarrow \beta_1\, D\, (a^\top a')\, m_b + (1 - \beta_1)\, D\, \partial b, \qquad
    b \leftarrow b - \eta\, (m_b / (1 - \beta_1^t) + w b)
    \end{aligned}
    $$

    for the learning rate $\eta$, the regularization $\delta$ and the weight decay $w$. The factors $a'$ and
    $b'$ are those that stood in $D$ and $C$ a step before: a momentum is carried over to the factor that it
    now multiplies. The product a b takes the same path from a R, R^-1 b for every orthogonal R, and without
    regularization for every invertible R.

    From [AltLoRA](https://arxiv.org/abs/2505.12455).

    Examples:
      >>> import jax.numpy as jnp, oplora_jax
      >>> params = oplora_jax.LowRank(jnp.ones((3, 1)), jnp.zeros((1, 2)))
      >>> tx = oplora_jax.altlora(0.5, regularization=0.0)
      >>> updates, state = tx.update(jnp.ones((3, 2)), tx.init(params), params)
      >>> bool(jnp.allclose(updates.a, 0) and jnp.allclose(updates.b, -0.5))  # b is zero: a waits
      True
    """
    decay = optax.identity() if is_zero(weight_decay) else optax.add_decayed_weights(weight_decay)
    plain = optax.chain(optax.ema(b1), decay, optax.scale_by_learning_rate(learning_rate))
    init, step = _alternating(learning_rate, b1, regularization, weight_decay)
    return lora_optimizer(init, step, others=plain if others is None else others)


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
    r"""AltLoRA+: `altlora` whose steps are divided by second moments of each entry, as Adam's are.

    Args:
      learning_rate: a scalar or a schedule, of the size of Adam's on the factors.
      b1: decay of the momentum.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      regularization: of the least-squares solves, in the units of the squared factors.
      weight_decay: decoupled, of the factors, multiplied by the learning rate.
      others: the optimizer of the leaves that are no LoRA parameters; AdamW with the same settings if None.

    Returns:
      An Optax transformation that takes exact gradients and those of `jax.grad` alike. Its state is three
      times the size of the LoRA parameters.

    With $C$ and $m_a$ of `altlora` (the authors' code carries $m_a$ over for one step only), and b likewise,

    $$
    v_a \leftarrow \beta_2\, v_a + (1 - \beta_2)\, (\partial a\, C)^2, \qquad
    a \leftarrow a - \eta\, \left(\frac{m_a}{(1 - \beta_1^t)(\sqrt{v_a} + \epsilon)} + w a\right).
    $$

    $v$ is not corrected for its start: the first step is $1 / \sqrt{1 - \beta_2}$ times as long as Adam's.

    From [AltLoRA](https://arxiv.org/abs/2505.12455).

    Examples:
      >>> import jax.numpy as jnp, oplora_jax
      >>> params = oplora_jax.LowRank(jnp.ones((3, 1)), jnp.ones((1, 2)))
      >>> tx = oplora_jax.altlora_plus(0.1, b2=0.0)
      >>> updates, state = tx.update(jnp.ones((3, 2)), tx.init(params), params)
      >>> bool(jnp.allclose(updates.a, -0.1))
      True
    """
    plain = optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    init, step = _alternating(learning_rate, b1, regularization, weight_decay, adaptive=(b2, eps))
    return lora_optimizer(init, step, others=plain if others is None else others)


def _alternating(learning_rate, b1, regularization, weight_decay, adaptive=None):
    """(init, step) of both optimizers; `adaptive` is the (b2, eps) of a second moment."""

    def init(param, _):
        zeros = jax.tree.map(jnp.zeros_like, param)
        # An average with a decay of 0.999 would not move in bfloat16.
        wide_zeros = jax.tree.map(lambda z: jnp.zeros_like(z, compute_dtype(z)), param)
        return AltLoRAState(zeros, jax.tree.map(jnp.array, param), None if adaptive is None else wide_zeros)

    def step(param, gradient, state, count):
        lr = at_step(learning_rate, count)
        debias = 1 / (1 - jnp.asarray(b1, lr.dtype) ** (count + 1))

        def side(own, gradient, other, old_other, momentum, second):
            """The new rows of one factor, whose product with `other` is the matrix, and its moments."""
            inverse = gram_inverse(other, regularization)
            fitted = times(inverse, gradient)
            momentum = b1 * times(inverse, other, transpose(old_other), momentum) + (1 - b1) * fitted
            direction = debias * momentum
            if adaptive is not None:
                b2, eps = adaptive
                second = b2 * second + (1 - b2) * fitted**2
                direction = direction / (jnp.sqrt(second) + eps)
            return own - lr * (direction + weight_decay * own), momentum, second

        (at, b), (dat, db) = wide(param), wide(factor_gradients(param, gradient))
        (old_at, old_b), (mat, mb) = wide(state.previous), wide(state.momentum)
        vat, vb = (None, None) if adaptive is None else wide(state.second_moment)
        new_at, mat, vat = side(at, dat, b, old_b, mat, vat)
        new_b, mb, vb = side(b, db, new_at, old_at, mb, vb)
        of = lambda *rows: from_wide(param, *rows)
        second = None if adaptive is None else of(vat, vb)
        return of(new_at, new_b), AltLoRAState(of(mat, mb), of(new_at, b), second)

    return init, each(step)
