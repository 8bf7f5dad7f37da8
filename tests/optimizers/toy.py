"""An optimizer as small as a user's own, that has every property; docs/write-an-optimizer.md shows it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from oplora_jax import at_step, each, factor_gradients, lora_optimizer


class ToyState(NamedTuple):
    momentum: Any  # of the factors' gradients, a LowRank
    squares: Any  # mean squared gradients of the r directions, (*batch, r), in float32


def toy(learning_rate, *, b1=0.5, b2=0.9, state_dtype=None, others=None):
    """Momentum of the factors, and an Adam-like rate for each direction a[:, k] b[k]."""

    def init(param, key):
        wide = jnp.promote_types(param.dtype, jnp.float32)
        squares = jnp.zeros_like(param.b, wide).sum(-1)
        return ToyState(jax.tree.map(jnp.zeros_like, param), squares)

    def step(param, gradient, state, count):
        g = factor_gradients(param, gradient)
        momentum = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.momentum, g)
        squares = b2 * state.squares + (1 - b2) * ((g.a**2).sum(-2) + (g.b**2).sum(-1))
        size = jnp.sqrt(squares / (1 - b2 ** (count + 1))) + 1e-8
        rates = at_step(learning_rate, count) / size
        a = param.a - rates[..., None, :] * momentum.a
        b = param.b - rates[..., None] * momentum.b
        return param.with_factors(a, b), ToyState(momentum, squares)

    others = others or optax.sgd(learning_rate, b1, accumulator_dtype=state_dtype)
    return lora_optimizer(init, each(step), others=others, state_dtype=state_dtype)
