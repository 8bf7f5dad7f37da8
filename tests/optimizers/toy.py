"""An optimizer as small as a user's own, that has every property; docs/write-an-optimizer.md shows it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from oplora_jax import at_step, each, factor_gradients, lora_optimizer


class ToyState(NamedTuple):
    momentum: Any  # of the factors' gradients, a LowRank
    squares: Any  # mean squared gradients of each of the r directions, (*batch, r), in float32 at least


def toy(learning_rate, *, b1=0.5, b2=0.9, state_dtype=None, others=None):
    """Momentum of the factors' gradients, where the directions a[:, k] b[k] each have an Adam-like rate."""

    def init(param, key):
        squares = jnp.zeros_like(param.b, jnp.promote_types(param.dtype, jnp.float32)).sum(-1)
        return ToyState(jax.tree.map(jnp.zeros_like, param), squares)

    def step(param, gradient, state, count):
        g = factor_gradients(param, gradient)
        momentum = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.momentum, g)
        squares = b2 * state.squares + (1 - b2) * ((g.a**2).sum(-2) + (g.b**2).sum(-1))
        rates = at_step(learning_rate, count) / (jnp.sqrt(squares / (1 - b2 ** (count + 1))) + 1e-8)
        a, b = param.a - rates[..., None, :] * momentum.a, param.b - rates[..., None] * momentum.b
        return param.with_factors(a, b), ToyState(momentum, squares)

    others = others or optax.sgd(learning_rate, momentum=b1, accumulator_dtype=state_dtype)
    return lora_optimizer(init, each(step), others=others, state_dtype=state_dtype)
