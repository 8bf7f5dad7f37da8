import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oplora_jax import (
    LowRank,
    OuterProduct,
    frobenius_norm,
    inner_product,
    is_low_rank,
    lorsum,
    svd,
    to_dense,
)
from oplora_jax.matrix import left_product, right_product
from tests.arrays import KINDS, draw_matrix, f64, normal
from tests.reference import truncated_svd

SHAPES = [(7, 5, 2), (4, 3, 9)]  # (n, m, inner size): few tokens, many tokens


def assert_close(actual, expected, tolerance):
    """Relative to the largest entry, as rounding errors of a product are."""
    chex.assert_shape(actual, np.shape(expected))
    chex.assert_trees_all_close(
        f64(actual), expected, rtol=0, atol=tolerance * (1e-30 + np.abs(expected).max())
    )


# A few dozen roundings of the type at most, none of which cancels: about 50 eps.
TOLERANCES = {jnp.float32: 5e-6, jnp.bfloat16: 5e-2}

matrices = st.tuples(
    st.sampled_from(KINDS),
    st.sampled_from(SHAPES),
    st.sampled_from([(), (2, 3)]),
    st.sampled_from([1.0, 0.25, 3.0]),
    st.sampled_from(list(TOLERANCES)),
    st.integers(0, 99),
)


@given(matrices)
def test_thin_products_and_dense_form(case):
    kind, shape, batch, scale, dtype, seed = case
    rng = np.random.default_rng(seed)
    matrix, expected = draw_matrix(kind, rng, shape, batch, dtype, scale)
    right = normal(rng, *batch, shape[1], 2, dtype=jnp.float32)
    left = normal(rng, *batch, 3, shape[0], dtype=jnp.float32)
    # A bf16 gradient multiplies in bf16, so the thin matrix is rounded to 8 bits as well.
    products = right_product(matrix, right), left_product(left, matrix)
    for product, judge in zip(products, (expected @ f64(right), f64(left) @ expected), strict=True):
        assert product.dtype == jnp.float32
        size = np.abs(judge).max() + np.abs(expected).max()
        chex.assert_trees_all_close(f64(product), judge, rtol=0, atol=TOLERANCES[dtype] * size)
    dense = to_dense(matrix)
    assert dense.dtype == dtype and matrix.shape == expected.shape == dense.shape
    assert_close(dense, expected, TOLERANCES[dtype])


@given(matrices, st.sampled_from(KINDS))
def test_norm_and_inner_product(case, other_kind):
    kind, shape, batch, scale, dtype, seed = case
    rng = np.random.default_rng(seed)
    first, expected_first = draw_matrix(kind, rng, shape, batch, dtype, scale)
    second, expected_second = draw_matrix(other_kind, rng, shape, batch, dtype, 2.0)
    norms = [np.linalg.norm(z, axis=(-2, -1)) for z in (expected_first, expected_second)]
    norm = frobenius_norm(first)
    assert norm.dtype == jnp.float32
    assert_close(norm, norms[0], TOLERANCES[dtype])
    judge = np.sum(expected_first * expected_second, axis=(-2, -1))
    size = np.max(norms[0] * norms[1])
    for product in (inner_product(first, second), inner_product(second, first)):
        assert product.shape == batch and product.dtype == jnp.float32
        # The factors of an outer product are larger together than their product: a factor of three here.
        chex.assert_trees_all_close(f64(product), judge, rtol=0, atol=3 * TOLERANCES[dtype] * size)


def test_float64_is_kept(x64):
    for kind in KINDS:
        matrix, expected = draw_matrix(kind, np.random.default_rng(0), (7, 5, 2), dtype=jnp.float64)
        assert to_dense(matrix).dtype == frobenius_norm(matrix).dtype == jnp.float64
        assert_close(frobenius_norm(matrix), np.linalg.norm(expected), 1e-14)  # some 50 eps of float64


def test_norm_of_a_nearly_cancelling_matrix():
    """a1 b1 - (a1 + d) b1: the Gram route would lose everything below sqrt(eps) |a| |b|."""
    rng = np.random.default_rng(0)
    a, b, d = rng.standard_normal((30, 2)), rng.standard_normal((2, 20)), 1e-5 * rng.standard_normal((30, 2))
    factors = np.hstack([a, a + d]).astype(np.float32), np.vstack([b, -b]).astype(np.float32)
    exact = np.linalg.norm(f64(factors[0]) @ f64(factors[1]))
    size = np.linalg.norm(factors[0]) * np.linalg.norm(factors[1])
    assert exact < 1e-4 * size  # it does cancel
    norm = float(frobenius_norm(LowRank(*map(jnp.asarray, factors))))
    # eps |a| |b| is the promise; a QR of 30 rows rounds a few times more.
    assert abs(norm - exact) < 4 * np.finfo(np.float32).eps * size


@pytest.mark.parametrize("tokens", [1, 3, 24, 25, 400])
def test_norm_of_an_outer_product_in_both_regimes(tokens):
    # n m / (n + m) = 24: the Gram matrices up to there, the dense product above.
    outer, expected = draw_matrix("outer", np.random.default_rng(tokens), (60, 40, tokens))
    assert_close(frobenius_norm(outer), np.linalg.norm(expected), 5e-6)  # a sum of 400 terms, 40 eps


def test_norm_of_zero_and_of_large_factors():
    assert float(frobenius_norm(LowRank(jnp.zeros((4, 2)), jnp.zeros((2, 3))))) == 0
    assert float(frobenius_norm(OuterProduct(jnp.zeros((1, 9)), jnp.zeros((1, 9))))) == 0
    large = LowRank(jnp.full((4, 1), 1e12), jnp.full((1, 4), 1e5))
    chex.assert_trees_all_close(frobenius_norm(large), 4e17, rtol=1e-6)  # an eps or two


SUMS = {
    "dense": ("dense",),
    "low_rank": ("low_rank",),
    "factored": ("low_rank", "outer"),
    "mixed": ("low_rank", "outer", "dense"),
}


@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("kinds", SUMS.values(), ids=SUMS.keys())
def test_svd_is_balanced_and_optimal(kinds, scale, batch, x64):
    rng = np.random.default_rng(0)
    pairs = [draw_matrix(kind, rng, (12, 10, 3), batch, jnp.float64, 2.0) for kind in kinds]
    coefficients = [1.0, -0.5, 2.0][: len(pairs)]
    terms = [(c, matrix) for c, (matrix, _) in zip(coefficients, pairs, strict=True)]
    dense = sum(c * d for c, (_, d) in zip(coefficients, pairs, strict=True))
    best = svd(terms, rank=2, scale=scale)
    assert best.scale == scale and best.shape == dense.shape
    # float64 through two QRs and an SVD: the tolerances are a hundred eps and more.
    assert_close(to_dense(best), truncated_svd(dense, 2), 1e-12)  # Eckart-Young
    balance = [np.swapaxes(f64(best.a), -1, -2) @ f64(best.a), f64(best.b) @ np.swapaxes(f64(best.b), -1, -2)]
    chex.assert_trees_all_close(*balance, rtol=0, atol=1e-12 * np.abs(balance[0]).max())
    # No other matrix of the rank is closer: neighbours of the best one are further away.
    error = np.linalg.norm(dense - f64(to_dense(best)))
    for _ in range(5):
        moved = scale * (f64(best.a) + 0.1 * rng.standard_normal(best.a.shape)) @ f64(best.b)
        assert np.linalg.norm(dense - moved) > error


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_factored_svd_agrees_with_the_dense_route(dtype):
    rng = np.random.default_rng(1)
    terms = [(1.0, draw_matrix("low_rank", rng, (20, 15, 2), (), dtype)[0])]
    terms.append((-0.5, draw_matrix("outer", rng, (20, 15, 3), (), dtype)[0]))
    factored = svd(terms, rank=4)
    dense = svd([(c, to_dense(jax.tree.map(lambda z: z.astype(jnp.float32), t))) for c, t in terms], rank=4)
    assert factored.dtype == dtype
    # float32: some eps; bfloat16: both factors of the result are rounded to 8 bits.
    tolerance = {jnp.float32: 1e-5, jnp.bfloat16: 2e-2}[dtype]
    assert_close(to_dense(factored), f64(to_dense(dense)), tolerance)


def test_svd_rank_above_the_stacked_columns():
    matrix, expected = draw_matrix("low_rank", np.random.default_rng(2), (9, 8, 2))
    best = svd([(1.0, matrix)], rank=5)
    chex.assert_shape([best.a, best.b], [(9, 5), (5, 8)])
    assert_close(to_dense(best), expected, 1e-5)  # 100 eps: QR, SVD and back
    assert not np.any(best.a[:, 2:]) and not np.any(best.b[2:])


BAD = {
    "rank 0": (lambda: svd([(1.0, jnp.ones((3, 2)))], 0), r"rank is 0; .*\(3, 2\) need 1 to 2"),
    "rank large": (lambda: svd([(1.0, jnp.ones((3, 2)))], 3), r"rank is 3; .*\(3, 2\) need 1 to 2"),
    "no terms": (lambda: svd([], 1), "at least one term"),
    "shapes": (
        lambda: svd([(1.0, jnp.ones((3, 2))), (1.0, jnp.ones((2, 3)))], 1),
        r"term 1 is \(2, 3\), term 0 is \(3, 2\)",
    ),
    "ranks": (
        lambda: svd([(1.0, LowRank(jnp.ones((3, 2)), jnp.ones((1, 3))))], 1),
        r"term 0: factors a \(3, 2\) and b \(1, 3\) do not fit",
    ),
    "scale": (
        lambda: svd([(1.0, LowRank(jnp.ones((3, 1)), jnp.ones((1, 3)), -1.0))], 1),
        r"term 0: scale is -1.0; expected a positive",
    ),
}


@pytest.mark.parametrize("call, message", BAD.values(), ids=BAD.keys())
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_matrices_are_pytree_nodes():
    matrix = LowRank(jnp.ones((3, 1)), jnp.ones((1, 2)), 2.0)
    doubled = jax.jit(lambda tree: jax.tree.map(lambda z: 2 * z, tree))({"p": matrix})["p"]
    assert is_low_rank(doubled) and doubled.scale == 2.0
    assert not is_low_rank(OuterProduct(matrix.b, matrix.b)) and not is_low_rank(matrix.a)
    assert not is_low_rank(LowRank(None, None))
    assert float(lorsum([(1.0, doubled)]).scale) == 2.0
