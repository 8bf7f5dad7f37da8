import collections
import itertools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oplora_jax import DenseGradient, KroneckerMetric, LowRank, OuterProduct, lorsum, to_dense
from oplora_jax.metrics import average, kfac_moments, powers, shampoo_moments
from tests import reference
from tests.arrays import f64

STRUCTURES = ("diagonal", "dense")
REDUCTIONS = ("mean", "sum")
each_structure = pytest.mark.parametrize("structure", STRUCTURES)


def swap(x):
    return np.swapaxes(x, -1, -2)


def of_structure(dense, structure):
    return np.diagonal(dense, axis1=-2, axis2=-1) if structure == "diagonal" else dense


def draw_tokens(batch, tokens, n=6, m=5):
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal((*batch, tokens, size)) for size in (n, m))
    return x, dy, OuterProduct(jnp.asarray(x), jnp.asarray(dy))


def with_moments(x, dy, structure):
    moments = (jnp.asarray(of_structure(swap(z) @ z, structure)) for z in (x, dy))
    return DenseGradient(jnp.asarray(swap(x) @ dy), *moments, jnp.full(x.shape[:-2], float(x.shape[-2])))


@each_structure
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_moments_of_kfac(structure, reduction, batch, x64):
    x, dy, outer = draw_tokens(batch, 4)
    expected = swap(x) @ x / 4, swap(dy) @ dy * (4 if reduction == "mean" else 1 / 4)
    expected = KroneckerMetric(*(of_structure(z, structure) for z in expected))
    for gradient in (outer, with_moments(x, dy, structure), with_moments(x, dy, "dense")):
        actual = kfac_moments(gradient, structure, reduction)
        chex.assert_trees_all_close(actual, expected, rtol=1e-12, atol=1e-13)  # float64 sums of 4 numbers


@each_structure
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("tokens", [2, 30], ids=["thin", "thick"])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_moments_of_shampoo(structure, reduction, tokens, batch, x64):
    x, dy, outer = draw_tokens(batch, tokens)
    g = swap(x) @ dy
    plain = [of_structure(z, structure) for z in (g @ swap(g), swap(g) @ g)]
    factor = tokens if reduction == "mean" else 1 / tokens
    matrices = {
        "outer": (outer, factor),
        "moments": (with_moments(x, dy, structure), factor),
        "array": (jnp.asarray(g), 1),
        "low_rank": (LowRank(jnp.asarray(swap(x)) / 2, jnp.asarray(dy), 2.0), 1),
    }
    for matrix, c in matrices.values():
        actual = shampoo_moments(matrix, structure, reduction)
        expected = KroneckerMetric(*(c * z for z in plain))
        chex.assert_trees_all_close(actual, expected, rtol=1e-11, atol=1e-11)  # float64 sums of 1e4 at most


def test_a_gradient_of_no_tokens_has_finite_moments():
    empty = DenseGradient(jnp.zeros((3, 2)), jnp.zeros(3), jnp.zeros(2), jnp.zeros(()))
    for estimate, reduction in itertools.product((kfac_moments, shampoo_moments), REDUCTIONS):
        assert not any(np.any(z) for z in estimate(empty, "diagonal", reduction))


def positive(rng, size, structure, batch=()):
    if structure == "diagonal":
        return rng.uniform(0.3, 3.0, (*batch, size))
    root = rng.standard_normal((*batch, size, size))
    return root @ swap(root) / size + 0.3 * np.eye(size)


def matrix_of(side, structure):
    return side[..., :, None] * np.eye(side.shape[-1]) if structure == "diagonal" else side


def matrix_power(dense, power):
    values, vectors = np.linalg.eigh(dense)
    return (vectors * values[..., None, :] ** power) @ swap(vectors)


@pytest.mark.parametrize("power", [0.0, 0.25, 1.0, -0.5])
@pytest.mark.parametrize("sorts", list(itertools.product(STRUCTURES, STRUCTURES)))
@pytest.mark.parametrize("batch", [(), (5,)])
def test_powers(power, sorts, batch, x64):
    rng = np.random.default_rng(1)
    sides = [positive(rng, size, sort, batch) for size, sort in zip((6, 5), sorts, strict=True)]
    metric = KroneckerMetric(*map(jnp.asarray, sides))
    both = powers(metric, power, 0.1, batch_ndim=len(batch))
    for result, sign in zip(both, (1, -1), strict=True):
        for actual, side, sort in zip(result, sides, sorts, strict=True):
            dense = matrix_of(side, sort) + 0.1 * np.eye(side.shape[-1])
            # float64, condition numbers below 100.
            np.testing.assert_allclose(
                matrix_of(f64(actual), sort), matrix_power(dense, sign * power), rtol=0, atol=1e-12
            )


@each_structure
def test_powers_of_singular_sides_are_finite(structure):
    row = jnp.arange(4.0)
    for side in (jnp.zeros(4), 1e30 * row**2, 1e-30 * row**2):
        side = side if structure == "diagonal" else jnp.sqrt(side)[:, None] * jnp.sqrt(side)[None, :]
        chex.assert_tree_all_finite(powers(KroneckerMetric(side, side), 1.0))


def test_average():
    # Exact in float32.
    np.testing.assert_array_equal(average(jnp.ones(2), jnp.array([3.0, 5.0]), jnp.asarray(0.25)), [1.5, 2.0])
    np.testing.assert_array_equal(
        average(jnp.ones(2), jnp.array([3.0, 0.125]), jnp.asarray(1.0)), [3.0, 0.125]
    )


def problem(structure, batch=(), scale=1.0, dtype=jnp.float64):
    """(anchor, gradient, momentum, metric) and the float64 arrays of the last three."""
    rng = np.random.default_rng(2)
    normal = lambda *shape: rng.standard_normal((*batch, *shape))
    sides = [positive(rng, size, structure, batch) for size in (9, 7)]
    to_jax = lambda z: jnp.asarray(z, dtype)
    anchor = LowRank(to_jax(normal(9, 2)), to_jax(normal(2, 7)), scale)
    gradient = OuterProduct(to_jax(normal(5, 9)), to_jax(normal(5, 7)))
    momentum = LowRank(to_jax(normal(9, 3)), to_jax(normal(3, 7)), 0.5)
    return anchor, gradient, momentum, KroneckerMetric(*map(to_jax, sides))


def dense_sides(metric, structure):
    return [matrix_of(f64(side), structure) for side in metric]


@given(
    structure=st.sampled_from(STRUCTURES),
    batch=st.sampled_from([(), (2,)]),
    scale=st.sampled_from([1.0, 4.0]),
    num_iters=st.integers(0, 2),
    first=st.sampled_from("ab"),
    regularization=st.sampled_from([0.0, 1e-3, 0.3]),
    double=st.booleans(),
)
def test_lorsum_in_a_metric_is_lorsum_of_whitened_matrices(
    structure, batch, scale, num_iters, first, regularization, double
):
    with jax.enable_x64(double):
        dtype = jnp.float64 if double else jnp.float32
        anchor, gradient, momentum, metric = problem(structure, batch, scale, dtype)
        terms = [(0.9, anchor), (-0.3, gradient), (0.2, momentum)]
        settings = {"num_iters": num_iters, "regularization": regularization, "first": first}
        result = lorsum(terms, metric=metric, **settings)
        chex.assert_trees_all_equal_shapes_and_dtypes(result, anchor)
        rest = -0.3 * f64(to_dense(gradient)) + 0.2 * f64(to_dense(momentum))
        sides, root = dense_sides(metric, structure), np.sqrt(scale)
        for i in np.ndindex(batch):
            left, right = (matrix_power(side[i], 0.5) for side in sides)
            start = root * left @ f64(anchor.a[i]), root * f64(anchor.b[i]) @ right
            rest_i = np.linalg.inv(left) @ rest[i] @ np.linalg.inv(right)
            a, b, _ = reference.lorsum(start, 0.9, rest_i, **settings)
            expected = np.linalg.inv(left) @ a @ b @ np.linalg.inv(right)
            # As without a metric, times the condition numbers of its roots, 3 or so each.
            tolerance = 1e-10 if double else 1e-4
            np.testing.assert_allclose(
                f64(to_dense(result))[i], expected, rtol=0, atol=tolerance * np.abs(expected).max()
            )


@each_structure
@pytest.mark.parametrize("first", "ab")
@pytest.mark.parametrize("regularization", [0.0, 0.1])
def test_the_objective_in_the_metric_never_increases(structure, first, regularization, x64):
    anchor, gradient, momentum, metric = problem(structure)
    left, right = (matrix_power(side, 0.5) for side in dense_sides(metric, structure))
    rest = -2.0 * f64(to_dense(gradient)) + f64(to_dense(momentum))
    start = left @ f64(anchor.a), f64(anchor.b) @ right
    total = start[0] @ start[1] + np.linalg.inv(left) @ rest @ np.linalg.inv(right)
    path = [anchor]
    for k in range(1, 5):
        settings = {"num_iters": k, "regularization": regularization, "first": first, "metric": metric}
        new, old = lorsum([(1.0, anchor), (-2.0, gradient), (1.0, momentum)], **settings), path[-1]
        path += [LowRank(new.a, old.b) if first == "a" else LowRank(old.a, new.b), new]
    factors = [(left @ f64(p.a), f64(p.b) @ right) for p in path]
    values = [reference.objective(total, start, z, regularization) for z in factors]
    assert values[-1] < 0.9 * values[0]
    # Rounding of the sums of squares, whose largest is the first.
    assert np.all(np.diff(values) < 1e-12 * values[0])


@each_structure
def test_the_jacobi_step_is_preconditioned_lora_in_the_metric(structure, x64):
    anchor, gradient, _, metric = problem(structure)
    result = lorsum([(1.0, anchor), (-0.1, gradient)], metric=metric, num_iters=0, regularization=0.05)
    (d_in, d_out), g = dense_sides(metric, structure), f64(to_dense(gradient))
    a, b, ridge = f64(anchor.a), f64(anchor.b), 0.05 * np.eye(2)
    expected = (
        a - 0.1 * np.linalg.inv(d_in) @ g @ b.T @ np.linalg.inv(b @ d_out @ b.T + ridge),
        b - 0.1 * np.linalg.inv(a.T @ d_in @ a + ridge) @ a.T @ g @ np.linalg.inv(d_out),
    )
    # float64 solves of condition number below 100.
    chex.assert_trees_all_close((f64(result.a), f64(result.b)), expected, rtol=1e-10)


@each_structure
def test_the_identity_is_no_metric(structure, x64):
    anchor, gradient, momentum, metric = problem(structure)
    ones = jax.tree.map(lambda side: jnp.ones(9 if side.shape[0] == 9 else 7), metric)
    if structure == "dense":
        ones = jax.tree.map(jnp.diag, ones)
    terms = [(1.0, anchor), (-0.3, gradient), (0.2, momentum)]
    for num_iters in (0, 2):
        settings = {"num_iters": num_iters, "regularization": 1e-3}
        plain, measured = lorsum(terms, **settings), lorsum(terms, metric=ones, **settings)
        chex.assert_trees_all_close(plain, measured, rtol=1e-13)  # the order of operations in float64


def operations(program):
    """How often each operation occurs in a traced program, sub-programs included."""
    counts = collections.Counter()
    for eqn in program.eqns:
        counts[eqn.primitive.name] += 1
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                counts += operations(inner)
    return counts


def test_without_a_metric_nothing_is_multiplied_by_one():
    n, m, r = 24, 17, 3
    anchor = LowRank(jnp.ones((n, r)), jnp.ones((r, m)))
    compute = lambda gradient, metric: lorsum(
        [(1.0, anchor), (-0.1, gradient)], metric=metric, regularization=0.1
    )
    gradient, metric = jnp.ones((n, m)), KroneckerMetric(jnp.ones(n), jnp.ones(m))
    arguments = {"plain": (gradient, None), "metric": (gradient, metric)}
    counts = {k: operations(jax.make_jaxpr(compute)(*z).jaxpr) for k, z in arguments.items()}
    # A diagonal metric adds elementwise operations and no product of matrices.
    assert not counts["plain"] - counts["metric"]
    extra = counts["metric"] - counts["plain"]
    assert extra["mul"] >= 4 and extra["dot_general"] == 0
    # Nor does the compiled program without one hold a vector as long as a side.
    vector = re.compile(rf"f32\[({n}|{m})\]")
    texts = {k: jax.jit(compute).lower(*z).compile().as_text() for k, z in arguments.items()}
    assert vector.search(texts["metric"]) and not vector.search(texts["plain"])


@pytest.mark.parametrize(
    "metric, message",
    [
        (KroneckerMetric(jnp.ones(7), jnp.ones(7)), r"input side has shape \(7,\); matrices of .*\(9,\)"),
        (KroneckerMetric(jnp.ones(9), jnp.ones((9, 9))), r"output side has shape \(9, 9\); .*\(7, 7\)"),
        (KroneckerMetric(jnp.ones((2, 9)), jnp.ones(7)), r"input side has shape \(2, 9\)"),
    ],
)
def test_a_metric_that_does_not_fit(metric, message):
    anchor, *_ = problem("diagonal", dtype=jnp.float32)
    with pytest.raises(ValueError, match=message):
        lorsum([(1.0, anchor)], metric=metric)
