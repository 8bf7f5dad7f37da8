"""The small solves, floored, and every decomposition that the library takes.

On CPU a stack is decomposed one matrix after the other: several *batched* decompositions side by side
deadlock on machines with few cores, where XLA's thread pool waits for itself. (A program's own batched
decompositions beside the library's can still hang in the same way: put them in `jax.lax.map`.)
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from oplora_jax.matrix import gram, is_zero, times, transpose


def gram_inverse(rows: Float[Array, "*batch r n"], regularization: Any = None) -> Float[Array, "*batch r r"]:
    """(rows rows^T + regularization I)^-1, as `inverse`."""
    return inverse(gram(rows), regularization)


def inverse(gram: Float[Array, "*batch r r"], regularization: Any) -> Float[Array, "*batch r r"]:
    """(gram + regularization I)^-1 of a Gram matrix; the pseudo-inverse where that is known to be 0 or None.

    Finite for every finite Gram matrix. Rounding leaves the small eigenvalues of a float32 Gram matrix
    undetermined to eps times the largest, so directions below that are cut off (pseudo-inverse), or, where a
    pivot is below 8 r eps of its diagonal entry, that much of each entry is added to the diagonal. A NaN
    stays one and is seen; so is an infinity.

    Args:
      gram: symmetric and positive semidefinite.
      regularization: a number, or `Float[Array, "r"]`, one for each row.
    """
    gram = jnp.where(jnp.isfinite(gram), gram, jnp.nan)  # 1 / infinity would be a finite answer
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
    """(gram + diag(ridge))^-1, by Gauss-Jordan elimination; by `by_cholesky`'s rule for small pivots."""
    eps, tiny = jnp.finfo(gram.dtype).eps, jnp.finfo(gram.dtype).tiny
    floor = 8 * gram.shape[-1] * eps
    # At once without and with the floor added to the diagonal. To raise a small pivot alone would not do:
    # beside it there may be larger entries, which then grow from one elimination to the next.
    gram, ridge = jnp.stack([gram, gram]), jnp.stack([ridge, ridge])
    lift = jnp.asarray([0, floor], gram.dtype).reshape(2, *[1] * (gram.ndim - 1))

    def eliminate(k, carry):
        matrix, determined = carry
        at = lambda z, axis: jax.lax.dynamic_slice_in_dim(z, k, 1, axis)
        is_k = lambda z, axis: jax.lax.broadcasted_iota(jnp.int32, z.shape, z.ndim + axis) == k
        column, row, added = at(matrix, -1), at(matrix, -2), at(ridge, -1)[..., None]
        whole = at(at(gram, -2), -1) + added  # what is added to the diagonal is added to the pivot
        pivot = at(row, -1) + added + lift * whole
        empty = whole <= tiny / eps  # an infinite pivot leaves the direction out
        determined &= empty | (pivot >= floor * whole)
        pivot = jnp.where(empty, jnp.inf, jnp.maximum(pivot, floor * whole))
        at_row, at_column = is_k(column, -2), is_k(row, -1)
        rest = jnp.where(at_row | at_column, 0, matrix)
        return rest - jnp.where(at_row, -1, column) * (jnp.where(at_column, 1, row) / pivot), determined

    determined = jnp.ones_like(gram[..., :1, :1], bool)
    found, determined = jax.lax.fori_loop(0, gram.shape[-1], eliminate, (gram, determined))
    return jnp.where(determined[0], *found)


def by_cholesky(gram: Array, ridge: Float[Array, "*batch r"]) -> Array:
    """The same, scaled to a diagonal of ones. Where a pivot is below the floor, that is added to all."""
    r, eps, tiny = gram.shape[-1], jnp.finfo(gram.dtype).eps, jnp.finfo(gram.dtype).tiny
    whole = jnp.diagonal(gram, axis1=-2, axis2=-1) + ridge
    root = jnp.where(whole <= tiny / eps, 0, jax.lax.rsqrt(whole))
    eye = jnp.broadcast_to(jnp.eye(r, dtype=gram.dtype), gram.shape)
    unit = jnp.where(eye > 0, 1, root[..., :, None] * gram * root[..., None, :])
    pivots = jnp.square(jnp.diagonal(jnp.linalg.cholesky(unit), axis1=-2, axis2=-1))
    determined = jnp.all(pivots >= 8 * r * eps, axis=-1)[..., None, None]  # not of a NaN: no minimum on CPU
    factor = jnp.linalg.cholesky(unit + jnp.where(determined, 0, 8 * r * eps) * eye)
    half = jax.lax.linalg.triangular_solve(factor, eye, left_side=True, lower=True) * root[..., None, :]
    return times(transpose(half), half)


def _of_stacks(decompose: Callable[[Array], Any]) -> Callable[[Array], Any]:
    """A decomposition of (*batch, n, m). LAPACK does not return from an infinity; a NaN makes NaNs."""

    def one_by_one(stack: Array) -> Any:
        parts = jax.lax.map(decompose, stack.reshape(-1, *stack.shape[-2:]))
        return jax.tree.map(lambda z: z.reshape(*stack.shape[:-2], *z.shape[1:]), parts)

    def apply(stack: Array) -> Any:
        stack = jnp.where(jnp.isfinite(stack), stack, jnp.nan)
        if stack.ndim == 2:
            return decompose(stack)
        return jax.lax.platform_dependent(stack, cpu=one_by_one, default=decompose)

    return apply


eigh = _of_stacks(lambda z: tuple(jnp.linalg.eigh(z)))  # symmetric: (eigenvalues, ascending; eigenvectors)
svd = _of_stacks(lambda z: tuple(jnp.linalg.svd(z, full_matrices=False)))  # (U, singular values, V^T)
qr = _of_stacks(lambda z: tuple(jnp.linalg.qr(z)))  # (Q, R)
triangle = _of_stacks(lambda z: jnp.linalg.qr(z, mode="r"))  # R alone
