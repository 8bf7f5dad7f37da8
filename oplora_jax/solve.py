"""The small solves, floored, and every decomposition that the library takes.

On CPU a stack is decomposed one matrix after the other: several batched decompositions side by side deadlock
on machines with few cores, as XLA's thread pool waits for itself. (A program's own batched decompositions
beside the library's can hang in the same way: put them in `jax.lax.map`.)
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from oplora_jax.matrix import is_zero, times, transpose


def inverse(gram: Float[Array, "*batch r r"], regularization: Any) -> Float[Array, "*batch r r"]:
    """(gram + regularization I)^-1 of a Gram matrix; the pseudo-inverse where that is known to be 0 or None.

    Finite for every finite Gram matrix: directions below the rounding error of its entries are cut off
    (pseudo-inverse), or a pivot counts as 8 r eps of its diagonal entry. A NaN stays one and is seen. The
    regularization is a number, or one for each row.
    """
    if is_zero(regularization):
        values, vectors = eigh(gram)
        eps, tiny = jnp.finfo(gram.dtype).eps, jnp.finfo(gram.dtype).tiny
        kept = values > jnp.maximum(gram.shape[-1] * eps * values[..., -1:], tiny)
        reciprocals = jnp.where(kept, 1 / jnp.where(kept, values, 1), 0)
        return times(vectors * reciprocals[..., None, :], transpose(vectors))
    ridge = jnp.broadcast_to(jnp.asarray(regularization, gram.dtype), gram.shape[:-1])
    # r sequential eliminations are one loop on CPU, and r times as many kernels as a decomposition on a GPU.
    return jax.lax.platform_dependent(gram, ridge, cpu=by_elimination, default=by_cholesky)


def by_elimination(gram: Array, ridge: Float[Array, "*batch r"]) -> Array:
    """(gram + diag(ridge))^-1, by Gauss-Jordan elimination: as exact as a Cholesky decomposition."""
    eps, tiny = jnp.finfo(gram.dtype).eps, jnp.finfo(gram.dtype).tiny

    def eliminate(k, matrix):
        at = lambda z, axis: jax.lax.dynamic_slice_in_dim(z, k, 1, axis)
        is_k = lambda z, axis: jax.lax.broadcasted_iota(jnp.int32, z.shape, z.ndim + axis) == k
        column, row, added = at(matrix, -1), at(matrix, -2), at(ridge, -1)[..., None]
        whole = at(at(gram, -2), -1) + added  # what is added to the diagonal is added to the pivot
        # An infinite pivot leaves an empty direction out.
        floor = jnp.where(whole <= tiny / eps, jnp.inf, 8 * gram.shape[-1] * eps * whole)
        pivot = jnp.maximum(at(row, -1) + added, floor)
        at_row, at_column = is_k(column, -2), is_k(row, -1)
        rest = jnp.where(at_row | at_column, 0, matrix)
        return rest - jnp.where(at_row, -1, column) * (jnp.where(at_column, 1, row) / pivot)

    return jax.lax.fori_loop(0, gram.shape[-1], eliminate, gram)


def by_cholesky(gram: Array, ridge: Float[Array, "*batch r"]) -> Array:
    """The same, scaled to a diagonal of ones. Where a pivot is below the floor, that is added to all."""
    r, eps, tiny = gram.shape[-1], jnp.finfo(gram.dtype).eps, jnp.finfo(gram.dtype).tiny
    whole = jnp.diagonal(gram, axis1=-2, axis2=-1) + ridge
    root = jnp.where(whole <= tiny / eps, 0, jax.lax.rsqrt(whole))
    eye = jnp.broadcast_to(jnp.eye(r, dtype=gram.dtype), gram.shape)
    unit = jnp.where(eye > 0, 1, root[..., :, None] * gram * root[..., None, :])
    factor = jnp.linalg.cholesky(unit)
    pivots = jnp.min(jnp.square(jnp.diagonal(factor, axis1=-2, axis2=-1)), axis=-1)[..., None, None]
    factor = jnp.where(pivots >= 8 * r * eps, factor, jnp.linalg.cholesky(unit + 8 * r * eps * eye))
    half = jax.lax.linalg.triangular_solve(factor, eye, left_side=True, lower=True) * root[..., None, :]
    return times(transpose(half), half)


def _of_stacks(decompose: Callable[[Array], Any]) -> Callable[[Array], Any]:
    """A decomposition of (*batch, n, m). LAPACK does not return from an infinity; a NaN makes NaNs."""

    def apply(stack: Array) -> Any:
        stack, one_by_one = jnp.where(jnp.isfinite(stack), stack, jnp.nan), decompose
        for _ in stack.shape[:-2]:
            one_by_one = partial(jax.lax.map, one_by_one)
        return jax.lax.platform_dependent(stack, cpu=one_by_one, default=decompose)

    return apply


eigh = _of_stacks(lambda z: tuple(jnp.linalg.eigh(z)))  # symmetric: (eigenvalues, ascending; eigenvectors)
svd = _of_stacks(lambda z: tuple(jnp.linalg.svd(z, full_matrices=False)))  # (U, singular values, V^T)
qr = _of_stacks(lambda z: tuple(jnp.linalg.qr(z)))  # (Q, R)
triangle = _of_stacks(lambda z: jnp.linalg.qr(z, mode="r"))  # R alone
