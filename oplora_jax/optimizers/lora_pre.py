"""LoRA-Pre: Adam on the full weight, with both of its moments kept as matrices of rank r."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array

from oplora_jax.gradients.tangent import full_gradient
from oplora_jax.lorsum import lorsum
from oplora_jax.matrix import LowRank, from_unit_scale, is_zero, left_product, to_dense
from oplora_jax.optimizers._factors import gram_inverse, orthonormal, wide_at_unit_scale
from oplora_jax.optimizers._facts import facts
from oplora_jax.optimizers._lift import at_step, each, lora_optimizer
from oplora_jax.optimizers._momentum import random_start
from oplora_jax.optimizers._types import cast_up
from oplora_jax.products import times, transpose


class LoRAPreState(NamedTuple):
    """State of `lora_pre` at the LoRA parameters, in float32 at least."""

    momentum: Any  # LowRank at each LoRA parameter: a (*batch, n, r), b (*batch, r, m), the average of G
    magnitude: Any  # likewise, the average of |G|: the root of Adam's second moment


@facts(gradient="exact", source="2602.24283", invariant="orthogonal", invariant_with={"regularization": 0.0})
def lora_pre(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    num_iters: Any = 1,
    regularization: Any = 1e-3,
    weight_decay: Any = 0.0,
    others: optax.GradientTransformation | None = None,
    seed: Any = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""LoRA-Pre: Adam's step in the full weight, from low-rank moments, brought back to rank r by `lorsum`.

    With G the gradient of the full weight, the moment M = a b of rank r is an average of it by one online
    least-squares step of each factor, a with the new b, :math:`\gamma = 1 - \beta_1^{1/2}`:

    .. math::
      b \leftarrow (1 - \gamma)\,b + \gamma\,(a^\top a)^{-1} a^\top G, \qquad
      a \leftarrow (1 - \gamma)\,a + \gamma\,G b^\top (b b^\top)^{-1}.

    N averages |G| likewise, with :math:`\gamma = 1 - \beta_2^{1/4}`, and its elementwise square is Adam's
    second moment. At step t

    .. math::
      P \leftarrow \mathrm{LoRSum}\Big[(1 - \eta w, P), \Big(-\eta,
      \frac{M / (1 - \beta_1^t)}{|N| / (1 - \beta_2^{t/2}) + \epsilon}\Big)\Big].

    Args:
      learning_rate: eta, a scalar or a schedule, of Adam's size in the full weight.
      b1, b2: decays of the first and the second moment.
      eps: added to the root of the second moment. N, of rank r, may be near zero where |G| is not, and there
        the step has no bound: if training diverges, take a tenth of the size of the gradient's entries.
      num_iters: alternating iterations of the LoRSum; 0 is the Jacobi step.
      regularization: of the LoRSum's solves; multiplied by the learning rate.
      weight_decay: w, decoupled, multiplied by the learning rate.
      others: for the leaves that are no LoRA parameters; AdamW with the same settings if None.
      seed: of the random start of the moments' left factors.

    Returns:
      An Optax transformation for any kind of gradient; factor gradients (`jax.grad`) stand for their
      projection on the tangent space. The state is two low-rank matrices, `momentum` and `magnitude`; G and
      the step are formed, n m numbers for one parameter at a time.

    Example:
      >>> import jax, jax.numpy as jnp, optax, oplora_jax
      >>> loss_fn = lambda p: jnp.sum((oplora_jax.to_dense(p) - jnp.outer(jnp.arange(3.0), jnp.ones(2))) ** 2)
      >>> params = oplora_jax.LowRank(jnp.ones((3, 1)), jnp.zeros((1, 2)))
      >>> tx = oplora_jax.lora_pre(0.1)
      >>> step = jax.jit(lambda state, params: tx.update(oplora_jax.grad(loss_fn)(params), state, params))
      >>> state = tx.init(params)
      >>> for _ in range(200):
      ...   updates, state = step(state, params)
      ...   params = optax.apply_updates(params, updates)
      >>> bool(loss_fn(params) < 1e-3)
      True

    References:
      Taming Momentum (LoRA-Pre), https://arxiv.org/abs/2602.24283.
    """

    def init(param, key):
        start = random_start(cast_up(param, jnp.float32), key)
        return LoRAPreState(start, start.with_factors(jnp.abs(start.a), jnp.zeros_like(start.b)))

    def step(param, gradient, state, count):
        lr = at_step(learning_rate, count)
        # N decays by b2**0.5 a step; Adam's 1 - b2**t would make the first step 63 times as long.
        unbiased, unbiased_root = 1 - b1 ** (count + 1), 1 - (b2**0.5) ** (count + 1)
        gradient = to_dense(full_gradient(param, gradient)).astype(state.momentum.dtype)
        first = _average(state.momentum, gradient, 1 - b1**0.5)
        second = _average(state.magnitude, jnp.abs(gradient), 1 - b2**0.25)
        direction = to_dense(first) / unbiased / (jnp.abs(to_dense(second)) / unbiased_root + eps)
        terms = [(1 - lr * weight_decay, param), (-lr, direction)]
        ridge = 0.0 if is_zero(regularization) else lr * regularization
        return lorsum(terms, num_iters=num_iters, regularization=ridge), LoRAPreState(first, second)

    if others is None:
        others = optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    return lora_optimizer(init, each(step), others=others, seed=seed)


def _average(moment: LowRank, target: Array, rate: Any) -> LowRank:
    """One online least-squares step of both factors towards a matrix.

    a steps with the new b: of simultaneous steps the product has one more term, without a bound.
    """
    at, b = wide_at_unit_scale(moment)
    # The product does not depend on which basis of its columns a is. With an orthonormal one no direction
    # dies out: not those that the target lacks for a while, and not all of them while it is zero.
    basis, triangle = orthonormal(at)
    b = (1 - rate) * times(transpose(triangle), b) + rate * left_product(basis, target)
    fit = times(gram_inverse(b), left_product(b, transpose(target)))
    return from_unit_scale(LowRank(transpose((1 - rate) * basis + rate * fit), b), moment)
