"""Paths of one LoRA parameter: through a noisy quadratic, or along given gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from oplora_jax import LowRank, to_dense
from tests.arrays import normals

N, M, R, STEPS = 6, 5, 2, 20


def factors(scale=1.0, b_zero=False, seed=0):
    """(a, b) in float64, of products of one size for every scale."""
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((N, R)) / np.sqrt(scale), rng.standard_normal((R, M)) / np.sqrt(scale)
    return a, 0 * b if b_zero else b


def full_gradients(seed=1):
    """The gradient of step t at an increment P is P - targets[t]: a quadratic with noise."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((N, M)) + 0.1 * rng.standard_normal((STEPS, N, M))


def schedule(count):
    """A learning rate with one fall."""
    return jnp.where(count < 10, 0.06, 0.02)


def path(tx, targets):
    """A compiled function from a parameter to its (a, b, product) after each step."""

    def step(carry, target):
        param, state = carry
        updates, state = tx.update(to_dense(param) - target, state, param)
        param = optax.apply_updates(param, updates)
        return (param, state), (param.a, param.b, to_dense(param))

    return jax.jit(lambda param: jax.lax.scan(step, (param, tx.init(param)), jnp.asarray(targets))[1])


def path_by_hand(step, a, b, scale, targets):
    """The same of a function `step(t, a, b, da, db)`, t from 1, that returns the new factors."""
    record = []
    for t, target in enumerate(targets, start=1):
        g = scale * a @ b - target
        a, b = step(t, a, b, scale * g @ b.T, scale * a.T @ g)
        record.append((a, b, scale * a @ b))
    return tuple(np.stack(z) for z in zip(*record, strict=True))


def low_rank(a, b, scale=1.0):
    return LowRank(jnp.asarray(a), jnp.asarray(b), scale)


def assert_same_path(actual, expected, tolerance):
    """Each of a, b and the product after each step, relative to the largest entry."""
    for x, y in zip(actual, expected, strict=True):
        assert np.abs(y[-1] - y[0]).max() > 1e-3  # it went somewhere
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max())


def draw(scale=1.0, seed=0):
    """(params, dense gradients)."""
    normal = normals(seed)
    return LowRank(normal(7, 2), normal(2, 5), scale), normal(20, 7, 5)


def follow(tx, params, gradients):
    """The parameters after a step along each gradient."""
    return compiled(tx)(params, gradients)


@functools.cache
def compiled(tx):
    def step(carry, gradient):
        params, state = carry
        updates, state = tx.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.jit(lambda params, gradients: jax.lax.scan(step, (params, tx.init(params)), gradients)[0][0])
