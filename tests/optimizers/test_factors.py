import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oplora_jax import (
    LowRank,
    OuterProduct,
    altlora,
    altlora_plus,
    lora_pro,
    lora_pro_sgd,
    lora_rite,
    reflora,
    solve,
)
from oplora_jax.optimizers._factors import from_wide, gram_inverse, orthonormal, pseudo_inverse, sylvester
from oplora_jax.products import gram

seeds = st.integers(0, 2**16)
batches = st.sampled_from([(), (2,)])


def wide(seed, r, n, batch=(), rank=None):
    """A matrix (*batch, r, n) in float64, of a rank that may be lower."""
    rng = np.random.default_rng(seed)
    rank = r if rank is None else rank
    columns = rng.standard_normal((*batch, n, rank)) @ rng.standard_normal((*batch, rank, r))
    return np.swapaxes(columns, -1, -2)


@given(seed=seeds, n=st.sampled_from([2, 7]), batch=batches, rank=st.integers(0, 3))
def test_the_pseudo_inverse_through_a_triangle(seed, n, batch, rank):
    with jax.enable_x64(True):
        matrix = wide(seed, 3, n, batch, rank)
        q, triangle = orthonormal(jnp.asarray(matrix))
        assert q.shape == matrix.shape and triangle.shape == (*batch, 3, 3)
        np.testing.assert_allclose(triangle @ q, matrix, rtol=0, atol=1e-13)  # float64, entries below 10
        inverse = np.swapaxes(q, -1, -2) @ pseudo_inverse(solve.svd(triangle))
        expected = np.linalg.pinv(matrix, rcond=1e-10)
        # float64; the smallest singular value may be 1e-3 of the largest.
        np.testing.assert_allclose(inverse, expected, rtol=0, atol=1e-11 * np.abs(expected).max())


def test_the_pseudo_inverse_keeps_what_a_gram_matrix_loses():
    """A condition number of about 1e5: its square is beyond float32."""
    matrix = jnp.asarray(np.diag([1.0, 1.0, 1e-4]) @ wide(0, 3, 40), jnp.float32)
    _, triangle = orthonormal(matrix)
    expected = np.linalg.pinv(np.asarray(triangle, np.float64))
    # float32 rounding times the condition number.
    np.testing.assert_allclose(
        pseudo_inverse(solve.svd(triangle)), expected, atol=3e-2 * np.abs(expected).max()
    )
    assert np.abs(gram_inverse(matrix)).max() < 0.1 * np.abs(expected).max() ** 2


@given(seed=seeds, batch=batches, ranks=st.tuples(st.integers(1, 3), st.just(3)))
def test_sylvester(seed, batch, ranks):
    """Solved where at least one of the two matrices is invertible."""
    with jax.enable_x64(True):
        left, right = (gram(jnp.asarray(wide(seed + i, 3, 5, batch, k))) for i, k in enumerate(ranks))
        total = jnp.asarray(np.swapaxes(wide(seed + 2, 3, 3, batch), -1, -2))
        x = sylvester(left, right, total)
        # float64, condition numbers up to 1e6.
        np.testing.assert_allclose(left @ x + x @ right, total, rtol=0, atol=1e-9)


def test_sylvester_where_nothing_determines_x():
    """Where both matrices are zero in a direction the smallest solution has nothing there."""
    one, total = jnp.diag(jnp.array([1.0, 0.0])), jnp.array([[2.0, 3.0], [4.0, 5.0]])
    np.testing.assert_array_equal(sylvester(one, one, total), [[1.0, 3.0], [4.0, 0.0]])
    np.testing.assert_array_equal(sylvester(0 * one, 0 * one, total), jnp.zeros((2, 2)))


def test_gram_inverse(x64):
    matrix = jnp.asarray(wide(0, 3, 5))
    expected = np.linalg.inv(matrix @ matrix.T + 0.1 * np.eye(3))
    np.testing.assert_allclose(gram_inverse(matrix, 0.1), expected, rtol=1e-10)  # float64
    assert not np.any(gram_inverse(jnp.zeros((3, 5)), 0.0))


def test_from_wide():
    like = LowRank(jnp.ones((4, 2), jnp.bfloat16), jnp.ones((2, 3), jnp.float16), 2.0)
    node = from_wide(like, jnp.ones((2, 4)), jnp.ones((2, 3)))
    chex.assert_trees_all_equal_shapes_and_dtypes(node, like)
    assert node.scale == like.scale


METHODS = {
    "altlora": altlora(0.1),
    "altlora_plus": altlora_plus(0.1),
    "lora_rite": lora_rite(0.1),
    "lora_pro": lora_pro(0.1),
    "lora_pro_sgd": lora_pro_sgd(0.1),
    "reflora": reflora(optax.sgd(0.1), warmup_steps=0),
}


@pytest.mark.parametrize("name", METHODS)
def test_all_kinds_of_gradient_give_one_step(name, x64):
    tx, scale = METHODS[name], 2.0
    rng = np.random.default_rng(0)
    a, b, x, dy = (jnp.asarray(0.3 * rng.standard_normal(z)) for z in ((6, 2), (2, 5), (9, 6), (9, 5)))
    param, gradient = LowRank(a, b, scale), x.T @ dy
    plain = LowRank(scale * gradient @ b.T, scale * a.T @ gradient, scale)
    step = lambda gradient: tx.update(gradient, tx.init(param), param)[0]
    steps = jax.jit(lambda *kinds: [step(kind) for kind in kinds])(plain, gradient, OuterProduct(x, dy))
    assert all(np.abs(z).max() > 1e-4 for z in jax.tree.leaves(steps))
    for other in steps[1:]:
        # float64, condition numbers below 10.
        np.testing.assert_allclose(other.a, steps[0].a, rtol=0, atol=1e-12)
        np.testing.assert_allclose(other.b, steps[0].b, rtol=0, atol=1e-12)
