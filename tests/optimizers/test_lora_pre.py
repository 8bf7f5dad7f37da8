import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from oplora_jax import LowRank, lora_pre, tangent_gradient, to_dense
from tests import reference
from tests.arrays import f64
from tests.optimizers.paths import draw, follow


def average(factors, target, rate):
    """One online least-squares step, b first."""
    a, b = factors
    b = (1 - rate) * b + rate * np.linalg.pinv(a.T @ a) @ a.T @ target
    a = (1 - rate) * a + rate * target @ b.T @ np.linalg.pinv(b @ b.T)
    return a, b


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("num_iters", [0, 1])
def test_twenty_steps_by_hand(num_iters, scale, x64):
    params, gradients = draw(scale)
    schedule = lambda count: 0.05 / (1 + 0.125 * count)
    tx = lora_pre(
        schedule, b1=0.8, b2=0.95, eps=1e-4, num_iters=num_iters, regularization=0.1, weight_decay=0.3
    )
    update, state = jax.jit(tx.update), tx.init(params)
    root = np.sqrt(scale)
    at_scale_one = lambda p: (root * f64(p.a), root * f64(p.b))
    first, second = at_scale_one(state.lora.momentum), at_scale_one(state.lora.magnitude)
    factors = at_scale_one(params)
    for t, gradient in enumerate(gradients, start=1):
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        g, lr = f64(gradient), schedule(t - 1)
        first = average(first, g, 1 - np.sqrt(0.8))
        second = average(second, np.abs(g), 1 - 0.95**0.25)
        m, v = first[0] @ first[1], (second[0] @ second[1]) ** 2
        # The average of |g| has a weight of 1 - beta2^(t/2) in all, its square that squared.
        direction = m / (1 - 0.8**t) / (np.sqrt(v / (1 - 0.95 ** (t / 2)) ** 2) + 1e-4)
        factors = reference.lorsum(factors, 1 - 0.3 * lr, -lr * direction, num_iters, 0.1 * lr)[:2]
        # float64; entries of v near zero, and Gram matrices of b, are divided by
        np.testing.assert_allclose(to_dense(state.lora.momentum), m, rtol=0, atol=1e-9)
        np.testing.assert_allclose(to_dense(params), factors[0] @ factors[1], rtol=0, atol=1e-7)


def test_the_moments_of_a_constant_gradient(x64):
    """They tend to the gradient and its absolute values, if the rank is enough for both."""
    rng = np.random.default_rng(0)
    g = jnp.asarray(np.outer(rng.standard_normal(7), rng.standard_normal(5)))
    params = LowRank(jnp.ones((7, 2)), jnp.zeros((2, 5)), 2.0)
    tx = lora_pre(0.1, b1=0.5, b2=0.5)

    def step(state, _):
        return tx.update(g, state, params)[1], None

    after = lambda length: jax.jit(lambda s: jax.lax.scan(step, s, length=length)[0])(tx.init(params)).lora
    end = after(120)
    np.testing.assert_allclose(to_dense(end.momentum), g, rtol=0, atol=1e-8)  # 0.5^(120 / 4)
    np.testing.assert_allclose(to_dense(end.magnitude), np.abs(g), rtol=0, atol=1e-8)


def test_the_first_step_is_of_adams_size():
    rng = np.random.default_rng(0)
    params = LowRank(jnp.zeros((20, 10)), jnp.zeros((10, 10)))
    x = jnp.asarray(rng.standard_normal((20, 10)), jnp.float32)
    # Any step of rank 10 can be taken: from factors with one at the identity.
    params = LowRank(jnp.ones((20, 10)), jnp.eye(10))
    tx = lora_pre(1.0, regularization=0.0, num_iters=0)
    for size in (1e-3, 1.0, 1e3):
        updates, _ = tx.update(size * x, tx.init(params), params)
        rms = np.sqrt(np.mean(f64(updates.a) ** 2))
        assert 0.3 < rms < 3, rms  # 1 for Adam


def test_gauges(x64):
    params, gradients = draw()
    change = jnp.array([[2.0, 1.0], [0.5, 1.5]])
    rotation = jnp.array([[0.8, -0.6], [0.6, 0.8]])
    for regularization, change_is_seen in ((0.0, False), (0.5, True)):
        tx = lora_pre(0.1, regularization=regularization)
        ends = [
            to_dense(follow(tx, LowRank(params.a @ r, jnp.linalg.inv(r) @ params.b), gradients[:4]))
            for r in (jnp.eye(2), rotation, change)
        ]
        np.testing.assert_allclose(ends[1], ends[0], rtol=0, atol=1e-9)  # float64, divisions by small roots
        far = np.abs(ends[2] - ends[0]).max()
        assert far > 1e-4 if change_is_seen else far < 1e-9


def test_one_path_for_every_scale(x64):
    ends = []
    for scale in (1.0, 4.0):
        params, gradients = draw()
        root = np.sqrt(scale)
        start = LowRank(params.a / root, params.b / root, scale)
        ends.append(to_dense(follow(lora_pre(0.1), start, gradients[:4])))
    chex.assert_trees_all_close(*ends, rtol=0, atol=1e-9)  # float64, divisions by small roots


def test_factor_gradients_are_their_tangent_gradient(x64):
    params, gradients = draw(2.0)
    factors = LowRank(2 * gradients[0] @ params.b.T, 2 * params.a.T @ gradients[0], 2.0)
    tx = lora_pre(0.1)
    update = jax.jit(tx.update)
    actual, _ = update(factors, tx.init(params), params)
    expected, _ = update(to_dense(tangent_gradient(params, factors)), tx.init(params), params)
    chex.assert_trees_all_close(actual, expected, rtol=1e-7)  # float64, divisions by small roots


def test_moments_outlive_gradients_of_zero_and_of_low_rank():
    rng = np.random.default_rng(0)
    params = LowRank(
        jnp.asarray(rng.standard_normal((7, 2)), jnp.float32),
        jnp.asarray(rng.standard_normal((2, 5)), jnp.float32),
        2.0,
    )
    tx = lora_pre(0.1, b1=0.5, b2=0.5)
    one = jnp.outer(jnp.arange(7.0), jnp.ones(5)).at[6].set(0)  # rank one
    other = one.at[6].set(jnp.arange(5.0) - 2)  # rank two

    def moments(gradients, lengths):
        state = tx.init(params)
        for g, length in zip(gradients, lengths, strict=True):
            keep = lambda s, _, g=g: (tx.update(g, s, params)[1], None)
            state = jax.jit(lambda s, keep=keep, length=length: jax.lax.scan(keep, s, length=length)[0])(
                state
            )
        return state

    for before in (jnp.zeros((7, 5)), one):
        state = moments([before, other], [500, 60])
        chex.assert_tree_all_finite(state)
        assert int(state.skipped) == 0
        np.testing.assert_allclose(to_dense(state.lora.momentum), other, rtol=0, atol=1e-4)  # float32
    updates, state = tx.update(jnp.zeros((7, 5)), tx.init(params), params)
    np.testing.assert_allclose(updates.a, 0, atol=1e-6)  # float32: a zero gradient moves nothing
    np.testing.assert_allclose(updates.b, 0, atol=1e-6)


def test_the_state_is_two_matrices_in_float32():
    params = LowRank(jnp.ones((7, 2), jnp.bfloat16), jnp.zeros((2, 5), jnp.bfloat16), 2.0)
    state = lora_pre(0.1).init(params)
    arrays = [z for z in jax.tree.leaves(state.lora) if z.ndim]
    assert {z.dtype for z in arrays} == {jnp.dtype(jnp.float32)}
    assert sum(z.size for z in arrays) == 2 * (7 * 2 + 2 * 5)
    for moment in (state.lora.momentum, state.lora.magnitude):
        assert not np.any(moment.b) and np.linalg.matrix_rank(moment.a) == 2
    assert np.all(state.lora.magnitude.a >= 0)
