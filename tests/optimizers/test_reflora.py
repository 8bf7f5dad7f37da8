import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oplora_jax import LowRank, reflora
from oplora_jax.optimizers.reflora import refactoring
from tests.optimizers.paths import (
    assert_same_path,
    factors,
    full_gradients,
    low_rank,
    path,
    path_by_hand,
    schedule,
)


def power(matrix, exponent):
    values, vectors = np.linalg.eigh(matrix)
    return vectors @ np.diag(values**exponent) @ vectors.T


def solution(a, b):
    """The geometric mean of (a^T a)^-1 and b b^T."""
    root, inverse_root = power(a.T @ a, 0.5), power(a.T @ a, -0.5)
    return inverse_root @ power(root @ b @ b.T @ root, 0.5) @ inverse_root


@given(seed=st.integers(0, 100), condition=st.sampled_from([1.0, 10.0, 1e3]))
def test_s_solves_its_equation(seed, condition):
    with jax.enable_x64(True):
        a, b = factors(seed=seed)
        a = a @ np.diag([1.0, condition])
        s, inverse, exists = (np.asarray(z) for z in refactoring(jnp.asarray(a.T), jnp.asarray(b)))
        assert np.all(exists) and np.all(np.linalg.eigvalsh(s) > 0)
        np.testing.assert_allclose(s, s.T, rtol=1e-13)  # float64
        # float64; the square of the condition numbers of a and b, the latter up to 100.
        np.testing.assert_allclose(s @ a.T @ a @ s, b @ b.T, rtol=0, atol=1e-8 * np.abs(b @ b.T).max())
        np.testing.assert_allclose(s @ inverse, np.eye(2), rtol=0, atol=1e-8)


def adam(eps):
    moments = {"m": [0.0, 0.0], "v": [0.0, 0.0]}

    def direction(t, gradients):
        moments["m"] = [0.9 * m + 0.1 * g for m, g in zip(moments["m"], gradients, strict=True)]
        moments["v"] = [0.99 * v + 0.01 * g**2 for v, g in zip(moments["v"], gradients, strict=True)]
        pairs = zip(moments["m"], moments["v"], strict=True)
        return [m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.99**t)) + eps) for m, v in pairs]

    return direction


@pytest.mark.parametrize("scale, b_zero, decay", [(1.0, False, 0.0), (2.0, True, 0.3)])
def test_by_hand(scale, b_zero, decay, x64):
    warmup_steps, direction = 3, adam(1e-3)

    def step(t, a, b, da, db):
        if t > warmup_steps:
            s = solution(a, b)
            da, db = da @ np.linalg.inv(s), s @ db
        rate = float(schedule(t - 1))
        ga, gb = direction(t, (da, db))
        return a - rate * (ga + decay * a), b - rate * (gb + decay * b)

    base = optax.adamw(schedule, b1=0.9, b2=0.99, eps=1e-3, weight_decay=decay)
    (a, b), targets = factors(scale, b_zero), full_gradients()
    actual = path(reflora(base, warmup_steps=warmup_steps), targets)(low_rank(a, b, scale))
    # float64; the hand's roots of Gram matrices lose the square of condition numbers up to 1e2.
    assert_same_path(actual, path_by_hand(step, a, b, scale, targets), 1e-9)


@pytest.mark.parametrize("zero", ["a", "b", "a row"])
def test_where_there_is_no_s_the_base_steps_alone(zero):
    a, b = (jnp.asarray(z, jnp.float32) for z in factors())
    a = 0 * a if zero == "a" else a
    b = 0 * b if zero == "b" else b.at[1].set(2 * b[0]) if zero == "a row" else b
    param, gradient = LowRank(a, b, 2.0), jnp.asarray(full_gradients()[0], jnp.float32)
    derivatives = LowRank(2 * gradient @ b.T, 2 * a.T @ gradient, 2.0)
    plain = optax.adam(0.1)
    tx = reflora(plain, warmup_steps=0)
    updates, state = jax.jit(tx.update)(derivatives, tx.init(param), param)
    expected, _ = jax.jit(plain.update)(derivatives, plain.init(param), param)
    np.testing.assert_array_equal(updates.a, expected.a)
    np.testing.assert_array_equal(updates.b, expected.b)
    assert int(state.skipped) == 0


def test_each_layer_of_a_stack_has_its_own_s():
    """And the one whose b is still zero steps alone."""
    (a, b), gradient = factors(), jnp.asarray(full_gradients()[0], jnp.float32)
    stack = LowRank(*(jnp.asarray(z, jnp.float32) for z in (np.stack([a, a]), np.stack([b, 0 * b]))))
    tx = reflora(optax.sgd(1.0), warmup_steps=0)
    updates, _ = jax.jit(tx.update)(jnp.stack([gradient, gradient]), tx.init(stack), stack)
    s = solution(a, b)
    # float32, condition numbers below 10.
    np.testing.assert_allclose(updates.b[0], -s @ a.T @ gradient, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(updates.b[1], -a.T @ gradient, rtol=1e-5, atol=1e-5)


def test_the_state_is_that_of_the_base_and_a_count():
    param = low_rank(*(z.astype(np.float32) for z in factors()))
    assert [z.shape for z in jax.tree.leaves(reflora(optax.sgd(0.1)).init(param).lora)] == [()]


def test_arguments():
    with pytest.raises(ValueError, match="warmup_steps is -1; expected 0 or more"):
        inspect.unwrap(reflora)(optax.sgd(0.1), warmup_steps=-1)
