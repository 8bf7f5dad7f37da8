import inspect
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oplora_jax import LowRank, OuterProduct, lorsum, to_dense
from oplora_jax.solve import inverse
from tests import reference
from tests.arrays import KINDS, draw_matrix, f64, normals
from tests.reference import truncated_svd


def anchor_of(rng, n, m, r, scale=1.0, batch=(), dtype=jnp.float32):
    new = normals(rng, dtype)
    return LowRank(new(*batch, n, r), new(*batch, r, m), scale)


def draw(kind, rng, n, m, batch=(), dtype=jnp.float32):
    """A term of one kind, of up to five dimensions, and the float64 array of what it stands for."""
    return draw_matrix(kind, rng, (n, m, 5), batch, dtype, scale=0.5)


def product(matrix):
    return f64(to_dense(matrix))


def judge(anchor, weight, rest, **settings):
    """The reference's product for every batch entry."""
    root = np.sqrt(anchor.scale)
    out = np.zeros(rest.shape)
    for i in np.ndindex(rest.shape[:-2]):
        a, b, _ = reference.lorsum(
            (root * f64(anchor.a[i]), root * f64(anchor.b[i])), weight, rest[i], **settings
        )
        out[i] = a @ b
    return out


@given(
    kinds=st.sampled_from([kinds for k in (1, 2) for kinds in itertools.combinations(KINDS, k)]),
    batch=st.sampled_from([(), (2,)]),
    scale=st.sampled_from([1.0, 0.25, 4.0]),
    num_iters=st.integers(0, 3),
    first=st.sampled_from("ab"),
    regularization=st.sampled_from([0.0, 1e-3, 0.3]),
    wide=st.booleans(),
    double=st.booleans(),
    seed=st.integers(0, 99),
)
def test_agrees_with_the_reference(kinds, batch, scale, num_iters, first, regularization, wide, double, seed):
    with jax.enable_x64(double):
        rng, dtype = np.random.default_rng(seed), jnp.float64 if double else jnp.float32
        anchor = anchor_of(rng, 12, 9, 3 if wide else 1, scale, batch, dtype)
        terms, rest = [(0.9, anchor)], 0.0
        for coefficient, kind in zip((-0.3, 0.5), kinds, strict=False):
            term, dense = draw(kind, rng, 12, 9, batch, dtype)
            terms.append((coefficient, term))
            rest = rest + coefficient * dense
        settings = {"num_iters": num_iters, "regularization": regularization, "first": first}
        result = lorsum(terms, **settings)
        chex.assert_trees_all_equal_shapes_and_dtypes(result, anchor)
        expected = judge(anchor, 0.9, rest, **settings)
        # float32 has eps 1e-7, and the Gram matrices of these draws condition numbers of up to 100 and
        # errors that cancel in part; float64 resolves the same to 1e-11 with room.
        tolerance = 1e-11 if double else 1e-5
        size = np.abs(expected).max() + np.abs(rest).max()
        chex.assert_trees_all_close(product(result), expected, rtol=0, atol=tolerance * size)


def test_a_traced_number_of_iterations_and_regularization():
    rng = np.random.default_rng(0)
    anchor, (dense, _) = anchor_of(rng, 8, 6, 2), draw("dense", rng, 8, 6)
    compute = jax.jit(lambda k, reg: lorsum([(1.0, anchor), (-0.3, dense)], num_iters=k, regularization=reg))
    for num_iters in range(3):
        expected = lorsum([(1.0, anchor), (-0.3, dense)], num_iters=num_iters, regularization=1e-2)
        # The same operations; the compiler may order them otherwise: some eps.
        chex.assert_trees_all_close(compute(num_iters, 1e-2), expected, atol=1e-5)


@pytest.mark.parametrize("first", "ab")
@pytest.mark.parametrize("num_iters", [0, 1, 2])
def test_gauge_invariance(num_iters, first, x64):
    rng = np.random.default_rng(num_iters)
    anchor, (term, _) = (
        anchor_of(rng, 10, 8, 3, dtype=jnp.float64),
        draw("dense", rng, 10, 8, (), jnp.float64),
    )
    general = rng.standard_normal((3, 3)) + 2 * np.eye(3)
    orthogonal = np.linalg.qr(general)[0]

    def change(rotation, regularization):
        turned = LowRank(anchor.a @ rotation, jnp.linalg.inv(rotation) @ anchor.b)
        settings = {"num_iters": num_iters, "regularization": regularization, "first": first}
        products = [product(lorsum([(1.0, p), (-0.3, term)], **settings)) for p in (anchor, turned)]
        return np.abs(products[0] - products[1]).max() / np.abs(products[0]).max()

    # float64 and condition numbers of at most 1e3: 1e-11; a real change is many orders larger.
    assert change(general, 0.0) < 1e-11
    assert change(orthogonal, 0.0) < 1e-11
    assert change(orthogonal, 0.3) < 1e-11
    assert change(general, 0.3) > 1e-4


def with_singular_values(rng, n, m, values):
    u, v = (np.linalg.qr(rng.standard_normal((z, len(values))))[0] for z in (n, m))
    return u @ np.diag(values) @ v.T


@pytest.mark.parametrize("first", "ab")
def test_tends_to_the_truncated_svd_at_the_rate_of_power_iteration(first, x64):
    rng = np.random.default_rng(0)
    target = with_singular_values(rng, 12, 9, [4.0, 3.0, 1.5, 0.5, 0.2])  # sigma_3 / sigma_2 = 1 / 2
    anchor = anchor_of(rng, 12, 9, 2, dtype=jnp.float64)
    terms = [(1.0, anchor), (1.0, jnp.asarray(target) - to_dense(anchor))]
    best = truncated_svd(target, 2)
    errors = {
        k: np.linalg.norm(product(lorsum(terms, num_iters=k, first=first)) - best) for k in (8, 9, 10, 60)
    }
    # (1.5 / 3)^2 = 0.25. After 8 iterations what remains of the other directions is below
    # (0.5 / 1.5)^16 = 2e-8, and of the second order in the error, 0.25^8 = 2e-5.
    np.testing.assert_allclose([errors[9] / errors[8], errors[10] / errors[9]], 0.25, rtol=1e-3)
    assert errors[60] < 1e-13 * 100  # 0.25^60 is nothing: float64 rounding is left


@pytest.mark.parametrize("first", "ab")
@pytest.mark.parametrize("double", [True, False], ids=["float64", "float32"])
def test_a_target_of_low_rank_is_reached_after_one_iteration(double, first):
    with jax.enable_x64(double):
        rng, dtype = np.random.default_rng(1), jnp.float64 if double else jnp.float32
        target = with_singular_values(rng, 10, 8, [2.0, 1.0, 0.5])
        anchor = anchor_of(rng, 10, 8, 3, dtype=dtype)
        step = jnp.asarray(target - product(anchor), dtype)
        result = product(lorsum([(1.0, anchor), (1.0, step)], first=first))
        # eps times the condition numbers of two Gram matrices, some 1e3 in all.
        assert np.abs(result - target).max() < (1e-11 if double else 1e-3)


@pytest.mark.parametrize("regularization", [0.0, 1e-2, 0.5])
def test_the_jacobi_step_is_preconditioned_lora(regularization, x64):
    rng = np.random.default_rng(2)
    anchor, (term, g) = anchor_of(rng, 9, 7, 2, dtype=jnp.float64), draw("outer", rng, 9, 7, (), jnp.float64)
    result = lorsum([(1.0, anchor), (-0.1, term)], num_iters=0, regularization=regularization)
    a, b, ridge = f64(anchor.a), f64(anchor.b), regularization * np.eye(2)
    expected = (
        a - 0.1 * g @ b.T @ np.linalg.inv(b @ b.T + ridge),
        b - 0.1 * np.linalg.inv(a.T @ a + ridge) @ a.T @ g,
    )
    # float64 solves of condition number below 100.
    chex.assert_trees_all_close((f64(result.a), f64(result.b)), expected, rtol=1e-11)


@pytest.mark.parametrize("first", "ab")
@pytest.mark.parametrize("regularization", [0.0, 1e-2, 1.0])
def test_the_objective_never_increases(regularization, first, x64):
    """The half-steps between two iterations are the pair of an old factor and a new one."""
    rng = np.random.default_rng(3)
    anchor, (term, dense) = (
        anchor_of(rng, 10, 8, 2, dtype=jnp.float64),
        draw("low_rank", rng, 10, 8, (), jnp.float64),
    )
    total = product(anchor) - 2.0 * dense
    path = [anchor]
    for k in range(1, 6):
        settings = {"num_iters": k, "regularization": regularization, "first": first}
        new, old = lorsum([(1.0, anchor), (-2.0, term)], **settings), path[-1]
        path += [LowRank(new.a, old.b) if first == "a" else LowRank(old.a, new.b), new]
    start = f64(anchor.a), f64(anchor.b)
    values = [reference.objective(total, start, (f64(p.a), f64(p.b)), regularization) for p in path]
    assert values[-1] < 0.9 * values[0]
    # Rounding of the sums of squares, whose largest is the first.
    assert np.all(np.diff(values) < 1e-13 * values[0])
    # The half-steps are those of the reference.
    *_, halves = reference.lorsum(start, 1.0, -2.0 * dense, 5, regularization, first)
    for p, (a, b) in zip(path[1:], halves, strict=True):
        np.testing.assert_allclose(product(p), a @ b, atol=1e-11)  # float64, well conditioned


@pytest.mark.parametrize("num_iters", [0, 1, 2])
@pytest.mark.parametrize("regularization", [0.0, 1e-8, 1e-2])
def test_a_zero_right_factor(regularization, num_iters):
    """LoRA's usual start: a has nothing to learn from, b takes the step."""
    rng = np.random.default_rng(4)
    a = rng.standard_normal((9, 2)).astype(np.float32)
    anchor, (term, g) = LowRank(jnp.asarray(a), jnp.zeros((2, 7))), draw("dense", rng, 9, 7)
    one = lorsum([(1.0, anchor), (-0.1, term)], num_iters=min(num_iters, 1), regularization=regularization)
    np.testing.assert_array_equal(one.a, a)  # the first solve returns a0, exactly
    design = np.vstack([f64(a), np.sqrt(regularization) * np.eye(2)])
    expected = np.linalg.lstsq(design, np.vstack([-0.1 * g, np.zeros((2, 7))]))[0]
    chex.assert_trees_all_close(f64(one.b), expected, atol=1e-6)  # entries below 1 in float32
    result = lorsum([(1.0, anchor), (-0.1, term)], num_iters=num_iters, regularization=regularization)
    expected = judge(anchor, 1.0, -0.1 * g, num_iters=num_iters, regularization=regularization)
    # float32 with Gram matrices of condition number below 100.
    chex.assert_trees_all_close(product(result), expected, atol=1e-5)


def test_a_singular_solve_stays_closest_to_the_anchor(x64):
    """Two equal rows of b: the difference of the columns of a is not determined, and stays."""
    rng = np.random.default_rng(5)
    row = rng.standard_normal((1, 7))
    anchor = LowRank(jnp.asarray(rng.standard_normal((9, 2))), jnp.asarray(np.vstack([row, row])))
    term, _ = draw("dense", rng, 9, 7, (), jnp.float64)
    result = lorsum([(1.0, anchor), (-0.1, term)], num_iters=0)
    # float64, and a pseudo-inverse of well separated eigenvalues (0 and |row|^2).
    np.testing.assert_allclose(
        result.a[:, 0] - result.a[:, 1], anchor.a[:, 0] - anchor.a[:, 1], rtol=0, atol=1e-13
    )
    limit = lorsum([(1.0, anchor), (-0.1, term)], num_iters=0, regularization=1e-7)
    # The pseudo-inverse is the limit of a small regularization: 1e-7 relative to |row|^2.
    chex.assert_trees_all_close(result, limit, atol=1e-6)


SIZES = [0.0, 1e-20, 1.0, 1e15]


@pytest.mark.parametrize("regularization", [0.0, 1e-12, 1.0])
@pytest.mark.parametrize("num_iters", [0, 2])
@pytest.mark.parametrize("rank_of_factors", [1, 2, 5], ids=["deficient", "full", "above_m"])
def test_finite_input_gives_finite_output(rank_of_factors, num_iters, regularization):
    rng = np.random.default_rng(6)
    r = 5 if rank_of_factors == 5 else 2
    n, m = (4, 3) if r == 5 else (8, 6)
    a, b = rng.standard_normal((n, r)), rng.standard_normal((r, m))
    if rank_of_factors == 1:
        a[:, 1], b[1] = a[:, 0], b[0]
    term = jnp.asarray(rng.standard_normal((n, m)), jnp.float32)
    for size_a, size_b in itertools.product(SIZES, SIZES):
        anchor = LowRank(jnp.asarray(size_a * a, jnp.float32), jnp.asarray(size_b * b, jnp.float32))
        settings = {"num_iters": num_iters, "regularization": regularization}
        result = lorsum([(1.0, anchor), (-0.1, term)], **settings)
        chex.assert_tree_all_finite(result)
        # A term as large as the anchor, where its products with a factor are still float32 numbers.
        if size_a * size_b * max(size_a, size_b) < 1e36:
            chex.assert_tree_all_finite(lorsum([(0.9, anchor), (-0.1, anchor)], **settings))


@pytest.mark.parametrize("num_iters", [0, 1])
def test_a_bfloat16_anchor_is_solved_in_float32(num_iters):
    rng = np.random.default_rng(7)
    anchor, (term, dense) = anchor_of(rng, 16, 12, 3, 2.0, (), jnp.bfloat16), draw("dense", rng, 16, 12)
    result = lorsum([(1.0, anchor), (-0.1, term)], num_iters=num_iters, regularization=1e-3)
    chex.assert_trees_all_equal_dtypes(result, anchor)
    expected = judge(anchor, 1.0, -0.1 * dense, num_iters=num_iters, regularization=1e-3)
    # Only the result is rounded to 8 bits (2^-9 each factor); a bf16 solve would be off by percents.
    chex.assert_trees_all_close(product(result), expected, rtol=0, atol=1e-2 * np.abs(expected).max())


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_the_floor_of_a_solve_leaves_no_bias(size):
    """A pivot counts as 8 r eps of its diagonal entry at least, 64 eps here: a floor, no bias."""
    gram = np.diag(np.linspace(1.0, 2.0, 8)).astype(np.float32) * np.float32(size)
    regularization = 1e-3 * size
    expected = np.diag(1 / (np.diag(f64(gram)) + regularization))
    solved = inverse(jnp.asarray(gram), regularization)
    # A few roundings of numbers that do not cancel: some eps, far below the floor.
    np.testing.assert_allclose(solved, expected, rtol=8 * np.finfo(np.float32).eps)


P = LowRank(jnp.ones((4, 2)), jnp.ones((2, 3)))
G = jnp.ones((4, 3))
BAD = {
    "no terms": (lambda: lorsum([]), "terms must begin with the anchor"),
    "anchor": (lambda: lorsum([(1.0, G), (1.0, P)]), "terms must begin with the anchor"),
    "shapes": (lambda: lorsum([(1.0, P), (1.0, G.T)]), r"term 1 is \(3, 4\), term 0 is \(4, 3\)"),
    "outer shapes": (
        lambda: lorsum([(1.0, P), (1.0, OuterProduct(G, G))]),
        r"term 1 is \(3, 3\), term 0 is \(4, 3\)",
    ),
    "ranks": (
        lambda: lorsum([(1.0, LowRank(P.a, jnp.ones((1, 3))))]),
        r"term 0: factors a \(4, 2\) and b \(1, 3\) do not fit",
    ),
    "ranks of a term": (
        lambda: lorsum([(1.0, P), (1.0, LowRank(P.a, jnp.ones((1, 3))))]),
        r"term 1: factors a \(4, 2\) and b \(1, 3\) do not fit",
    ),
    "batch axes": (
        lambda: lorsum([(1.0, LowRank(jnp.ones((5, 4, 2)), jnp.ones((6, 2, 3))))]),
        r"a \(5, 4, 2\) and b \(6, 2, 3\) do not fit",
    ),
    "num_iters": (lambda: lorsum([(1.0, P)], num_iters=-1), "num_iters is -1; expected 0"),
    "regularization": (lambda: lorsum([(1.0, P)], regularization=-0.1), "regularization is -0.1; .*non-neg"),
    # The annotation would refuse this one first: the function below its check.
    "first": (lambda: inspect.unwrap(lorsum)([(1.0, P)], first="c"), "first is 'c'; expected 'a' or 'b'"),
}


@pytest.mark.parametrize("call, message", BAD.values(), ids=BAD.keys())
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
