import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oplora_jax import LowRank, altlora, altlora_plus, scaled_gd
from tests.optimizers.paths import (
    assert_same_path,
    factors,
    full_gradients,
    low_rank,
    path,
    path_by_hand,
    schedule,
)

B1, B2, EPS = 0.8, 0.9, 1e-3


def by_hand(a, b, damping, decay, plus):
    """The step of both methods, for factors that start at (a, b)."""
    memory = {"ma": 0 * a, "mb": 0 * b, "va": 0 * a, "vb": 0 * b, "old_a": a, "old_b": b}
    inverse = lambda z: np.linalg.pinv(z + damping * np.eye(len(z)))

    def step(t, a, b, da, db):
        z, eta = memory, float(schedule(t - 1))
        c = inverse(b @ b.T)
        z["ma"] = B1 * z["ma"] @ (z["old_b"] @ b.T) @ c + (1 - B1) * da @ c
        z["va"] = B2 * z["va"] + (1 - B2) * (da @ c) ** 2
        direction = z["ma"] / (1 - B1**t) / (np.sqrt(z["va"]) + EPS if plus else 1)
        new_a = a - eta * (direction + decay * a)
        z["old_b"] = b
        d = inverse(new_a.T @ new_a)
        z["mb"] = B1 * d @ (new_a.T @ z["old_a"]) @ z["mb"] + (1 - B1) * d @ db
        z["vb"] = B2 * z["vb"] + (1 - B2) * (d @ db) ** 2
        direction = z["mb"] / (1 - B1**t) / (np.sqrt(z["vb"]) + EPS if plus else 1)
        z["old_a"] = new_a
        return new_a, b - eta * (direction + decay * b)

    return step


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize(
    "scale, b_zero, damping, decay",
    [(1.0, False, 0.01, 0.0), (2.0, False, 0.0, 0.3), (2.0, True, 1e-5, 0.0), (1.0, True, 0.0, 0.3)],
)
def test_by_hand(plus, scale, b_zero, damping, decay, x64):
    settings = {"b1": B1, "regularization": damping, "weight_decay": decay}
    tx = altlora_plus(schedule, b2=B2, eps=EPS, **settings) if plus else altlora(schedule, **settings)
    (a, b), targets = factors(scale, b_zero), full_gradients()
    step = by_hand(a, b, damping, decay, plus)
    # float64; the Gram matrices of factors that were just zero have condition numbers of 1e4.
    assert_same_path(path(tx, targets)(low_rank(a, b, scale)), path_by_hand(step, a, b, scale, targets), 1e-8)


def test_a_is_that_of_scaled_gd(x64):
    """Without momentum and regularization, at s^2 times the rate."""
    param, gradient = low_rank(*factors(2.0), 2.0), jnp.asarray(full_gradients()[0])
    tx, other = altlora(0.1, b1=0.0, regularization=0.0), scaled_gd(0.4, regularization=0.0)
    updates, _ = tx.update(gradient, tx.init(param), param)
    expected, _ = other.update(gradient, other.init(param), param)
    np.testing.assert_allclose(updates.a, expected.a, rtol=1e-12)  # float64
    assert np.abs(updates.b - expected.b).max() > 1e-3  # b is fitted to the new a


def test_the_momentum_of_a_constant_gradient_does_not_fade(x64):
    """What is carried over is fitted to the new factor: with b1 -> 1 the first step's product survives."""
    param = low_rank(*factors())
    tx = altlora(1e-3, b1=0.9, regularization=0.0)
    state, update = tx.init(param), jax.jit(tx.update)
    zero, gradient = jnp.zeros((6, 5)), jnp.asarray(full_gradients()[0])
    _, state = update(gradient, state, param)
    before = state.lora.momentum.a @ param.b
    # The same matrix in other factors: the momentum follows, up to the decay.
    turned = LowRank(
        param.a @ jnp.array([[2.0, 1.0], [0.0, 0.5]]), jnp.array([[0.5, -1.0], [0.0, 2.0]]) @ param.b
    )
    _, state = update(zero, state, turned)
    np.testing.assert_allclose(state.lora.momentum.a @ turned.b, 0.9 * before, rtol=0, atol=1e-12)  # float64


@pytest.mark.parametrize("make", [altlora, altlora_plus])
def test_factors_and_gradients_without_rank(make):
    """Nothing is divided by zero in float32, with and without regularization."""
    ones = LowRank(jnp.ones((6, 2)), jnp.ones((2, 5)), 2.0)
    for param in (ones, jax.tree.map(jnp.zeros_like, ones)):
        for regularization in (0.0, 1e-5):
            tx = make(0.1, regularization=regularization)
            state, update = tx.init(param), jax.jit(tx.update)
            for gradient in (jnp.ones((6, 5)), jnp.zeros((6, 5))):
                updates, state = update(gradient, state, param)
                assert all(np.all(np.isfinite(z)) for z in jax.tree.leaves((updates, state)))
                assert int(state.skipped) == 0


def test_the_size_of_the_state():
    param = LowRank(jnp.ones((64, 4)), jnp.ones((4, 48)))
    sizes = [sum(z.size for z in jax.tree.leaves(f(0.1).init(param).lora)) for f in (altlora, altlora_plus)]
    assert sizes == [2 * 4 * (64 + 48), 3 * 4 * (64 + 48)]
