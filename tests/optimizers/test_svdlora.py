import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from oplora_jax import LowRank, OuterProduct, svdlora, tangent_gradient, to_dense
from tests.arrays import f64
from tests.reference import truncated_svd


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("rank", [None, 1])
def test_steps_are_truncated_full_steps(rank, scale, x64):
    rng = np.random.default_rng(0)
    params = LowRank(
        jnp.asarray(rng.standard_normal((7, 2))), jnp.asarray(rng.standard_normal((2, 5))), scale
    )
    tx = svdlora(optax.sgd(0.1, momentum=0.5), rank)
    state, update = tx.init(params), jax.jit(tx.update)
    increment, velocity = f64(to_dense(params)), np.zeros((7, 5))
    for _ in range(3):
        x, dy = rng.standard_normal((4, 7)), rng.standard_normal((4, 5))
        updates, state = update(OuterProduct(jnp.asarray(x), jnp.asarray(dy)), state, params)
        params = optax.apply_updates(params, updates)
        velocity = 0.5 * velocity + x.T @ dy
        increment = truncated_svd(increment - 0.1 * velocity, rank or 2)
        # float64, singular values well apart.
        np.testing.assert_allclose(to_dense(params), increment, rtol=0, atol=1e-11)
        np.testing.assert_allclose(params.a.T @ params.a, params.b @ params.b.T, rtol=0, atol=1e-11)
    assert params.a.shape == (7, 2) and params.scale == scale


def test_the_base_sees_dense_gradients_and_increments(x64):
    rng = np.random.default_rng(1)
    params = LowRank(jnp.asarray(rng.standard_normal((7, 2))), jnp.asarray(rng.standard_normal((2, 5))))
    factors = jax.tree.map(jnp.ones_like, params)
    base = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.5))
    tx = svdlora(base)
    updates, _ = jax.jit(tx.update)(factors, tx.init(params), params)
    g = to_dense(tangent_gradient(params, factors))
    expected = truncated_svd(to_dense(params) - 0.5 * (g + 0.1 * to_dense(params)), 2)
    chex.assert_trees_all_close(f64(to_dense(optax.apply_updates(params, updates))), expected, atol=1e-11)
