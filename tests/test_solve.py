"""The small solves and decompositions, next to NumPy's in float64."""

import contextlib
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oplora_jax import solve
from oplora_jax.solve import by_cholesky, by_elimination, floored, inverse
from tests.arrays import f64, normal

ROUTINES = {"elimination": partial(floored, by_elimination), "cholesky": partial(floored, by_cholesky)}
RANKS = (1, 2, 5, 16, 64)
CONDITIONS = (1.0, 1e3, 1e5, 1e7, 1e10)


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    """Of what is solved."""
    with jax.enable_x64(True) if request.param == "float64" else contextlib.nullcontext():
        yield jnp.dtype(request.param)


def transposed(x):
    return np.swapaxes(x, -1, -2)


def gram_of(rng, rank, condition, batch=()):
    """A Gram matrix of this condition number, of rows whose sizes differ by up to 100 times."""
    q = np.linalg.qr(rng.standard_normal((*batch, rank, rank)))[0]
    sizes = 10 ** rng.uniform(-1, 1, (rank, 1))
    return sizes * (q * np.geomspace(1, 1 / condition, rank)) @ transposed(q) * sizes.T


def scaled(matrix, sizes):
    return matrix * sizes[..., :, None] * sizes[..., None, :]


def norm(matrix):
    return np.linalg.norm(matrix, 2, axis=(-2, -1))


def check_inverse(found, gram, ridge):
    """Compares in units in which the diagonal is 1, where the error of a solve has its bounds."""
    rank, eps = gram.shape[-1], float(jnp.finfo(found.dtype).eps)
    assert np.all(np.isfinite(found))
    exact = f64(gram) + f64(ridge)[..., None] * np.eye(rank)
    sizes = np.sqrt(np.diagonal(exact, axis1=-2, axis2=-1))
    unit, found = scaled(exact, 1 / sizes), scaled(f64(found), sizes)
    expected = np.linalg.inv(unit)
    condition = norm(unit) * norm(expected)
    # Backward stable: the error is that of a change of the matrix by some eps, times the condition number.
    # 2.5 eps were seen, NumPy's own rounding among them where float64 is solved.
    determined = 16 * rank * eps * condition < 1
    error = norm(found - expected) / norm(expected)
    np.testing.assert_array_less(error[determined], (8 * eps * condition)[determined])
    # Beyond that it is the inverse of a positive matrix nearby. Then found @ unit is near a projection. Among
    # thousands 90 was seen, where pivots are just above the floor; without the floor there is no bound.
    assert np.all(norm(found @ unit) < 200)


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("routine", ROUTINES)
def test_inverses(routine, condition, dtype):
    """With condition numbers to 1e10, where nothing but the floor keeps the result bounded."""
    rng = np.random.default_rng(0)
    for rank in RANKS:
        gram = jnp.asarray(gram_of(rng, rank, condition, (10,)), dtype)
        for value in (0.0, 1e-5, 1e-3):  # traced: a zero is one among others
            ridge = jnp.full((10, rank), value, dtype)
            check_inverse(jax.jit(ROUTINES[routine])(gram, ridge), gram, ridge)


@pytest.mark.parametrize("routine", ROUTINES)
def test_the_last_of_many_eigenvalues(routine):
    """Several directions below rounding: where a small pivot alone was raised, entries grew past 1e18."""
    rng = np.random.default_rng(1)
    for rank, condition in [(4, 1e8), (4, 1e10), (8, 1e12), (16, 1e10), (16, 1e12), (32, 1e12)]:
        rows = (
            np.geomspace(1, condition**-0.5, rank) * np.linalg.qr(rng.standard_normal((200, rank, rank)))[0]
        )
        rows = rows @ transposed(np.linalg.qr(rng.standard_normal((200, 256, rank)))[0])
        rows = jnp.asarray(rows, jnp.float32)
        gram, ridge = rows @ transposed(rows), jnp.zeros((200, rank))
        check_inverse(ROUTINES[routine](gram, ridge), gram, ridge)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@pytest.mark.parametrize("regularization", [1e-5, 1e-3])
def test_inverse_over_batch_axes(batch, regularization, dtype):
    """And one number stands for all rows."""
    gram = jnp.asarray(gram_of(np.random.default_rng(2), 8, 1e3, batch), dtype)
    found = jax.jit(inverse)(gram, regularization)
    assert found.shape == gram.shape and found.dtype == dtype
    check_inverse(found, gram, jnp.full(gram.shape[:-1], regularization, dtype))


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@pytest.mark.parametrize("regularization", [0.0, None])
def test_pseudo_inverse(regularization, batch, dtype):
    rng = np.random.default_rng(3)
    for rank in RANKS[1:]:
        kept = rank // 2
        q = np.linalg.qr(rng.standard_normal((*batch, rank, kept)))[0]
        values = np.geomspace(1, 0.1, kept)
        found = inverse(jnp.asarray((q * values) @ transposed(q), dtype), regularization)
        expected = (q / values) @ transposed(q)
        # What is kept is well conditioned, and changes by eps times the squared condition number, 100.
        limit = 1000 * float(jnp.finfo(dtype).eps) * norm(expected)
        np.testing.assert_array_less(norm(f64(found) - expected), limit)


def test_the_pseudo_inverse_of_rows_that_were_rounded(dtype):
    """To 1e-2 here: a row of 1.1e-2 of the longest is kept, and one of 0.9e-2 is not."""
    lengths = np.array([3.0, 3.3e-2, 2.7e-2])
    found = inverse(jnp.asarray(np.diag(lengths**2), dtype), None, rounding=1e-2)
    np.testing.assert_allclose(found, np.diag([*lengths[:2] ** -2.0, 0.0]), rtol=1e-5)  # float32


@pytest.mark.parametrize("routine", ROUTINES)
def test_blocks_have_ridges_of_their_own(routine, dtype):
    """As `lorsum` has them: nothing goes from block to block, however the sizes differ."""
    rng = np.random.default_rng(4)
    gram = np.zeros((3, 13, 13))
    gram[:, :8, :8], gram[:, 8:, 8:] = 1e6 * gram_of(rng, 8, 1e2, (3,)), 1e-6 * gram_of(rng, 5, 1e2, (3,))
    ridge = np.repeat([1e3, 1e-9], [8, 5]) * np.ones((3, 1))
    gram, ridge = jnp.asarray(gram, dtype), jnp.asarray(ridge, dtype)
    found = ROUTINES[routine](gram, ridge)
    assert not np.any(found[:, :8, 8:]) and not np.any(found[:, 8:, :8])
    check_inverse(found, gram, ridge)
    check_inverse(found[:, :8, :8], gram[:, :8, :8], ridge[:, :8])
    check_inverse(found[:, 8:, 8:], gram[:, 8:, 8:], ridge[:, 8:])


@pytest.mark.parametrize("routine", ROUTINES)
def test_empty_directions(routine, dtype):
    """Rows of zeros: without a ridge they are left out, with one they have its inverse."""
    full = gram_of(np.random.default_rng(5), 4, 1e2)
    places = np.array([1, 2, 4, 6])
    gram = np.zeros((7, 7))
    gram[np.ix_(places, places)] = full
    gram = jnp.asarray(gram, dtype)
    for value in (0.0, 1e-3):
        ridge = jnp.full(7, value, dtype)
        found = ROUTINES[routine](gram, ridge)
        check_inverse(found[np.ix_(places, places)], gram[np.ix_(places, places)], ridge[places])
        rest = np.setdiff1d(np.arange(7), places)
        expected = np.diag([1 / value if value else 0.0] * 3)
        # Of a number, one division or a root and two products.
        np.testing.assert_allclose(found[np.ix_(rest, rest)], expected, rtol=8 * float(jnp.finfo(dtype).eps))
        assert not np.any(found[np.ix_(rest, places)]) and not np.any(found[np.ix_(places, rest)])


def not_finite(bad, batch=4, rank=3):
    """Stacks of Gram matrices, the second of which is not finite, at each place and at its mirror image."""
    for i, j in np.argwhere(np.tri(rank)):
        stack = gram_of(np.random.default_rng(6), rank, 10.0, (batch,))
        stack[1, i, j] = stack[1, j, i] = bad
        yield jnp.asarray(stack, jnp.float32)


def bad_entries(found):
    """Which of a stack are not finite."""
    return [not np.all(np.isfinite(z)) for z in found]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("routine", [*ROUTINES, "pseudo-inverse"])
def test_what_is_not_finite_is_seen(routine, bad, monkeypatch):
    """In its own matrix, and nowhere else."""
    if routine == "cholesky":
        monkeypatch.setattr(solve, "by_elimination", by_cholesky)
    regularization = 0.0 if routine == "pseudo-inverse" else 1e-3
    for stack in not_finite(bad):
        assert bad_entries(inverse(stack, regularization)) == [False, True, False, False]


def test_cholesky_sees_a_negative_pivot_in_a_large_stack():
    """On CPU XLA's minimum of 4096 numbers and more leaves NaN out, in JAX 0.10."""
    assert np.all(np.isfinite(ROUTINES["cholesky"](jnp.ones((64, 64, 64)), jnp.zeros((64, 64)))))


DECOMPOSITIONS = {"eigh": solve.eigh, "svd": solve.svd, "qr": solve.qr, "triangle": solve.triangle}
BATCHES = [(), (1,), (3,), (2, 3)]


def input_of(name, batch, dtype):
    x = normal(7, *batch, 9, 5, dtype=dtype)
    return x if name != "eigh" else transposed(x) @ x


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", DECOMPOSITIONS)
def test_decompositions(name, batch, dtype):
    x = input_of(name, batch, dtype)
    found = jax.jit(DECOMPOSITIONS[name])(x)
    assert all(
        z.dtype == dtype and z.shape[:-2] == batch for z in jax.tree.leaves(found) if z.ndim > 1 + len(batch)
    )
    # LAPACK's are backward stable: some eps of the matrix, whose norm is 30 at most here.
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=3000 * float(jnp.finfo(dtype).eps))
    parts, x = jax.tree.map(f64, found), f64(x)
    eye = np.broadcast_to(np.eye(5), (*batch, 5, 5))
    if name == "triangle":
        close(transposed(parts) @ parts, transposed(x) @ x)
        assert not np.any(np.tril(parts, -1))
        return
    if name == "eigh":
        values, vectors = parts
        close((vectors * values[..., None, :]) @ transposed(vectors), x)
        close(values, np.linalg.eigvalsh(x))
        close(transposed(vectors) @ vectors, eye)
    elif name == "svd":
        u, values, vt = parts
        close((u * values[..., None, :]) @ vt, x)
        close(values, np.linalg.svd(x, compute_uv=False))
        close(transposed(u) @ u, eye)
        close(vt @ transposed(vt), eye)
    else:
        q, r = parts
        close(q @ r, x)
        close(transposed(q) @ q, eye)
        assert not np.any(np.tril(r, -1))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", DECOMPOSITIONS)
def test_a_decomposition_of_what_is_not_finite_ends(name, bad):
    x = np.array(input_of(name, (3,), jnp.float32))
    x[1, 2, 2] = bad
    for part in jax.tree.leaves(DECOMPOSITIONS[name](jnp.asarray(x))):
        assert bad_entries(part) == [False, True, False]
    for part in jax.tree.leaves(DECOMPOSITIONS[name](jnp.asarray(x[1]))):
        assert not np.all(np.isfinite(part))


INVERSES = {"inverse": lambda z: inverse(z, 1e-3), "pseudo-inverse": lambda z: inverse(z, None)}


@pytest.mark.parametrize("batch", [(), (30,)])
@pytest.mark.parametrize("name", [*DECOMPOSITIONS, *INVERSES])
def test_lowers_for_accelerators(name, batch):
    x = jax.ShapeDtypeStruct((*batch, 8, 8), jnp.float32)
    exported = jax.export.export(jax.jit({**DECOMPOSITIONS, **INVERSES}[name]), platforms=["cuda", "tpu"])(x)
    assert set(exported.platforms) == {"cuda", "tpu"}
    if name == "inverse":  # no elimination there
        assert "stablehlo.while" not in exported.mlir_module()


@pytest.mark.parametrize("name", [*DECOMPOSITIONS, *INVERSES])
def test_a_stack_is_decomposed_matrix_by_matrix_on_cpu(name):
    x = jax.ShapeDtypeStruct((2, 30, 8, 8), jnp.float32)
    text = jax.jit({**DECOMPOSITIONS, **INVERSES}[name]).lower(x).as_text()
    operands = re.findall(r"custom_call @lapack_\w+\(.*? : \(tensor<([\dx]+)xf32>", text)
    assert (name == "inverse") == (not operands)  # an elimination
    assert all(shape == "8x8" for shape in operands)
    assert all(call.startswith("lapack_") for call in re.findall(r"custom_call @(\w+)", text))
