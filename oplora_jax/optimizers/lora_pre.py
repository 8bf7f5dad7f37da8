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
    r"""LoRA-Pre: Adam's steps on the full weight, with both moments kept as matrices of rank r.

    The state is as large as that of Adam on the factors. The gradient and the step are formed, n m numbers
    for one parameter at a time.

    Args:
      learning_rate: a scalar or a schedule, of the size of Adam's in full training.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment. That root has rank r, and may be near zero where the
        gradient is not: steps have no bound there. If training diverges take a tenth of the size of a
        gradient's entries.
      num_iters: alternating iterations of `lorsum`; with 0 both factors step from the old ones.
      regularization: of the least-squares solves; it is multiplied by the learning rate.
      weight_decay: decoupled, as in `optax.adamw`: multiplied by the learning rate.
      others: the optimizer of the leaves that are no LoRA parameters; AdamW with the same settings if None.
      seed: of the random start of the moments' left factors.

    Returns:
      An Optax transformation. It takes exact gradients; of those of `jax.grad` it uses what
      `tangent_gradient` makes of them. Its state is two `LowRank` matrices, `momentum` and `magnitude`.

    With $G$ the gradient of the full weight, the first moment $M = a\,b$ of rank r averages it by one
    least-squares step of each factor, a with the new b, for $\gamma = 1 - \beta_1^{1/2}$:

    $$
    b \leftarrow (1 - \gamma)\,b + \gamma\,(a^\top a)^{-1} a^\top G, \qquad
    a \leftarrow (1 - \gamma)\,a + \gamma\,G b^\top (b b^\top)^{-1}.
    $$

    $N$ averages $|G|$ likewise, with $\gamma = 1 - \beta_2^{1/4}$; squared elementwise it is Adam's second
    moment. With $P$ the increment, $\eta$ the learning rate and $w$ the weight decay, step $t$ is

    $$
    P \leftarrow \mathrm{LoRSum}\,\Big[(1 - \eta w)\,P -
    \eta\,\frac{M / (1 - \beta_1^t)}{|N| / (1 - \beta_2^{t/2}) + \epsilon}\Big].
    $$

    From [Taming Momentum (LoRA-Pre)](https://arxiv.org/abs/2602.24283).

    Examples:
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
