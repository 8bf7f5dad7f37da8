import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from oplora_jax import LowRank, OuterProduct, mofasgd, tangent_gradient, to_dense
from tests.arrays import f64, normals
from tests.optimizers.paths import draw, follow
from tests.reference import truncated_svd


def momentum_of(state):
    """U S V^T, formed."""
    left, values, right = (f64(z) for z in (state.lora.left, state.lora.values, state.lora.right))
    return (left * values) @ right


def leading(matrix, rank):
    """U V^T of the best approximation."""
    u, _, vt = np.linalg.svd(matrix)
    return u[:, :rank] @ vt[:rank]


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_twenty_steps_by_hand(scale, x64):
    params, gradients = draw(scale)
    schedule = lambda count: 0.3 / (1 + 0.125 * count)
    tx = mofasgd(schedule, momentum=0.8)
    update, state = jax.jit(tx.update), tx.init(params)
    p, m = f64(to_dense(params)), np.zeros((7, 5))
    # The start: one round of block power iteration from the columns of a.
    g, orthonormal = f64(gradients[0]), lambda z: np.linalg.qr(z)[0]
    v = orthonormal(g.T @ orthonormal(f64(params.a)))
    u = orthonormal(g @ v)
    for t, gradient in enumerate(gradients):
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        g = f64(gradient)
        pu, pv = u @ u.T, v @ v.T
        m = truncated_svd(0.8 * m + pu @ g + g @ pv - pu @ g @ pv, 2)
        left, _, right = np.linalg.svd(m)
        u, v = left[:, :2], right[:2].T
        p = truncated_svd(p - schedule(t) * u @ v.T, 2)
        # float64; gaps between singular values magnify the rounding of 20 decompositions.
        np.testing.assert_allclose(momentum_of(state), m, rtol=0, atol=1e-8)
        np.testing.assert_allclose(to_dense(params), p, rtol=0, atol=1e-8)
    np.testing.assert_allclose(params.a.T @ params.a, params.b @ params.b.T, rtol=0, atol=1e-12)  # balanced


def test_nothing_is_lost_before_truncation(x64):
    """With as many directions as columns the momentum is that of heavy ball, whatever the gradients."""
    normal = normals(0)
    params, expected = LowRank(normal(7, 3), normal(3, 3)), np.zeros((7, 3))
    tx = mofasgd(0.1, momentum=0.9)
    update, state = jax.jit(tx.update), tx.init(params)
    for _ in range(4):
        g = OuterProduct(normal(2, 7), normal(2, 3))
        _, state = update(g, state, params)
        expected = 0.9 * expected + f64(g.x).T @ f64(g.dy)
        np.testing.assert_allclose(momentum_of(state), expected, rtol=0, atol=1e-12)  # float64
    left, right = f64(state.lora.left), f64(state.lora.right)
    np.testing.assert_allclose(left.T @ left, np.eye(3), rtol=0, atol=1e-12)
    np.testing.assert_allclose(right @ right.T, np.eye(3), rtol=0, atol=1e-12)


def test_one_path_for_every_gauge_and_scale(x64):
    params, gradients = draw()
    tx = mofasgd(0.2)
    end = to_dense(follow(tx, params, gradients[:5]))
    change = jnp.array([[2.0, 1.0], [0.5, 1.5]])
    turned = LowRank(params.a @ change, jnp.linalg.inv(change) @ params.b)
    root = np.sqrt(3.0)
    scaled = LowRank(params.a / root, params.b / root, 3.0)
    for start in (turned, scaled):
        # float64, condition number 5, five decompositions
        np.testing.assert_allclose(to_dense(follow(tx, start, gradients[:5])), end, rtol=0, atol=1e-10)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_every_direction_moves_by_the_learning_rate(scale):
    normal = normals(0, jnp.float32)
    start = LowRank(normal(7, 2), jnp.zeros((2, 5)), scale)
    tx = mofasgd(0.25)
    for size in (1e-12, 1.0, 1e12):
        step = to_dense(follow(tx, start, size * normal(1, 7, 5)))
        values = np.linalg.svd(f64(step), compute_uv=False)
        np.testing.assert_allclose(values, [0.25, 0.25, 0, 0, 0], rtol=0, atol=1e-6)  # float32


def test_directions_without_momentum_do_not_move():
    normal = normals(0, jnp.float32)
    tx = mofasgd(0.25)
    start = LowRank(normal(7, 2), jnp.zeros((2, 5)), 2.0)
    x, dy = normal(1, 7), normal(1, 5)
    params, state = start, tx.init(start)
    update = jax.jit(tx.update)
    for count in range(1, 5):  # a gradient of rank one, step after step
        updates, state = update(OuterProduct(x, dy), state, params)
        params = optax.apply_updates(params, updates)
        values = np.linalg.svd(f64(to_dense(params)), compute_uv=False)
        np.testing.assert_allclose(values, [0.25 * count, 0, 0, 0, 0], rtol=0, atol=1e-5)  # float32
    full = LowRank(normal(7, 2), normal(2, 5))
    for params in (start, full, jax.tree.map(jnp.zeros_like, start)):  # a gradient of zero is no start
        state = tx.init(params)
        for _ in range(2):
            updates, state = update(jnp.zeros((7, 5)), state, params)
            chex.assert_tree_all_finite((updates, state))
            after = to_dense(optax.apply_updates(params, updates))
            np.testing.assert_allclose(after, to_dense(params), rtol=0, atol=3e-6)  # float32, entries near 3
        updates, _ = update(normal(7, 5), state, params)  # and the start is not lost
        assert np.abs(to_dense(optax.apply_updates(params, updates)) - to_dense(params)).max() > 0.01


def test_factor_gradients_are_their_tangent_gradient(x64):
    params, gradients = draw(2.0)
    factors = LowRank(2 * gradients[0] @ params.b.T, 2 * params.a.T @ gradients[0], 2.0)
    tx = mofasgd(0.2)
    update = jax.jit(tx.update)
    actual, _ = update(factors, tx.init(params), params)
    expected, _ = update(to_dense(tangent_gradient(params, factors)), tx.init(params), params)
    # float64; the signs of singular vectors are anybody's
    ends = [to_dense(optax.apply_updates(params, u)) for u in (actual, expected)]
    np.testing.assert_allclose(*ends, rtol=0, atol=1e-11)


def test_nothing_of_the_size_of_the_weight_is_formed():
    params = LowRank(jnp.ones((64, 2)), jnp.ones((2, 48)))
    gradient = OuterProduct(jnp.ones((5, 64)), jnp.ones((5, 48)))
    tx = mofasgd(0.1)
    program = str(jax.make_jaxpr(tx.update)(gradient, tx.init(params), params))
    assert "64,48]" not in program and "48,64]" not in program and "64,4]" in program
    state = tx.init(params)
    assert sum(z.size for z in jax.tree.leaves(state.lora) if z.ndim) == 2 * (64 + 48) + 2


def test_a_rank_larger_than_a_side_is_refused():
    params = LowRank(jnp.ones((7, 4)), jnp.ones((4, 3)))
    tx = mofasgd(0.1)
    with pytest.raises(ValueError, match=r"rank is 4; matrices of shape \(7, 3\) need 1 to 3"):
        tx.update(jnp.ones((7, 3)), tx.init(params), params)
