"""LoRA+: any optimizer, with a larger learning rate for the right factor."""

from collections.abc import Callable
from typing import Any

import optax

from oplora_jax.optimizers._factors import on_factor, plain_gradient, preconditioned
from oplora_jax.optimizers._facts import facts
from oplora_jax.optimizers._lift import lora_transformation


@facts(gradient="factors", source="2402.12354", invariant="none")
def lora_plus(
    learning_rate: optax.ScalarOrSchedule,
    ratio: Any = 16.0,
    *,
    base: Callable[..., optax.GradientTransformation] | None = None,
    others: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""LoRA+: any optimizer, with a learning rate `ratio` times as large for the right factor b.

    Args:
      learning_rate: of a and of the other leaves, a scalar or a schedule, of the base's size.
      ratio: the learning rate of b by that of a, at least 1.
      base: a function of a learning rate that returns an optimizer of plain arrays, such as
        `functools.partial(optax.adamw, weight_decay=0.01)`; `optax.adam` if None. It sees one factor of every
        LoRA parameter, so clip by the global norm before LoRA+, not inside. (Under `optax.inject_hyperparams`
        pass `static_args="base"`.)
      others: the optimizer of the leaves that are no LoRA parameters; base(learning_rate) if None.

    Returns:
      An Optax transformation that takes exact gradients and those of `jax.grad` alike.

    Raises:
      ValueError: a ratio below 1.

    The base is built twice, with a state for each factor: for a with the learning rate $\eta$, and for b with
    $\rho\,\eta$, where $\rho$ is the ratio. What it multiplies by its learning rate, such as a weight decay,
    is multiplied by the ratio too.

    From [LoRA+](https://arxiv.org/abs/2402.12354).

    Examples:
      >>> import jax.numpy as jnp, oplora_jax
      >>> params = oplora_jax.LowRank(jnp.ones((3, 1)), jnp.ones((1, 2)))
      >>> tx = oplora_jax.lora_plus(0.01, ratio=16)
      >>> updates, _ = tx.update(jnp.ones((3, 2)), tx.init(params), params)
      >>> round(float(updates.a[0, 0]), 4), round(float(updates.b[0, 0]), 4)
      (-0.01, -0.16)
    """
    if isinstance(ratio, int | float) and not ratio >= 1:
        raise ValueError(f"ratio is {ratio}; expected 1 or more, the learning rate of b by that of a")
    make = optax.adam if base is None else base
    rate = learning_rate
    faster = (lambda count: ratio * rate(count)) if callable(rate) else ratio * rate
    factors = on_factor(make(rate), "a"), on_factor(make(faster), "b")
    lora = optax.chain(preconditioned(plain_gradient), *factors)
    return lora_transformation(lora, others=make(rate) if others is None else others)
