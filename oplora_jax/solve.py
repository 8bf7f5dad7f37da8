"""The small solves, floored, and every decomposition that the library takes.

On CPU a stack is decomposed one matrix after the other: batched decompositions side by side deadlock where
there are few cores, as XLA's thread pool waits for itself. (So can a program's own: use `jax.lax.map`.)
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from oplora_jax.matrix import is_zero
from oplora_jax.products import times, transpose


def inverse(
    gram: Float[Array, "*batch r r"], regularization: Any, rounding: float = 0.0
) -> Float[Array, "*batch r r"]:
    """(gram + regularization I)^-1 of a Gram matrix; the pseudo-inverse where that is known to be 0 or None.

    Finite for every finite Gram matrix: directions below the rounding error of its entries are cut off
    (pseudo-inverse) or floored. A NaN or an infinity is seen. The regularization is a number or one a row.
    The pseudo-inverse also cuts off where what the Gram matrix is of is below `rounding` of its largest.
    """
    gram = jnp.where(jnp.isfinite(gram), gram, jnp.nan)  # 1 / infinity would be a finite answer
    r, eps, tiny = gram.shape[-1], jnp.finfo(gram.dtype).eps, jnp.finfo(gram.dtype).tiny
    if is_zero(regularization):
        values, vectors = eigh(gram)
        kept = values > jnp.maximum(max(r * eps, rounding**2) * values[..., -1:], tiny)
        reciprocals = jnp.where(kept, 1 / jnp.where(kept, values, 1), 0)
        return times(vectors * reciprocals[..., None, :], transpose(vectors))
    ridge = jnp.broadcast_to(jnp.asarray(regularization, gram.dtype), gram.shape[:-1])
    routines = {"cpu": partial(floored, by_elimination), "default": partial(floored, by_cholesky)}
    return jax.lax.platform_dependent(gram, ridge, **routines)


def floored(routine: Callable[..., Any], gram: Array, ridge: Float[Array, "*batch r"]) -> Array:
    """(gram + diag(ridge))^-1, with 8 r eps of the diagonal added to it where a pivot is below that."""
    floor = 8 * gram.shape[-1] * jnp.finfo(gram.dtype).eps
    above = ridge + floor * (jnp.diagonal(gram, axis1=-2, axis2=-1) + ridge)
    found, determined = routine(jnp.stack([gram, gram]), jnp.stack([ridge, above]))
    return jnp.where(determined[0], *found)


def by_elimination(gram: Array, ridge: Float[Array, "*batch r"]) -> tuple[Array, Array]:
    """(gram + diag(ridge))^-1 by Gauss-Jordan elimination, and whether its pivots are above the floor."""
    eps, tiny = jnp.finfo(gram.dtype).eps, jnp.finfo(gram.dtype).tiny

    def eliminate(k, carry):
        matrix, determined = carry
        at = lambda z, axis: jax.lax.dynamic_slice_in_dim(z, k, 1, axis)
        is_k = lambda z, axis: jax.lax.broadcasted_iota(jnp.int32, z.shape, z.ndim + axis) == k
        column, row, added = at(matrix, -1), at(matrix, -2), at(ridge, -1)[..., None]
        whole, pivot = at(at(gram, -2), -1) + added, at(row, -1) + added
        floor, empty = 8 * gram.shape[-1] * eps * whole, whole <= tiny / eps
        determined &= empty | (pivot >= floor)
        pivot = jnp.where(empty, jnp.inf, jnp.maximum(pivot, floor))  # an infinite one leaves its row out
        at_row, at_column = is_k(column, -2), is_k(row, -1)
        rest = jnp.where(at_row | at_column, 0, matrix)
        return rest - jnp.where(at_row, -1, column) * (jnp.where(at_column, 1, row) / pivot), determined

    return jax.lax.fori_loop(0, gram.shape[-1], eliminate, (gram, jnp.ones_like(gram[..., :1, :1], bool)))


def by_cholesky(gram: Array, ridge: Float[Array, "*batch r"]) -> tuple[Array, Array]:
    """The same by a Cholesky decomposition, after scaling to a diagonal of ones: fewer kernels on a GPU."""
    r, eps, tiny = gram.shape[-1], jnp.finfo(gram.dtype).eps, jnp.finfo(gram.dtype).tiny
    whole = jnp.diagonal(gram, axis1=-2, axis2=-1) + ridge
    root = jnp.where(whole <= tiny / eps, 0, jax.lax.rsqrt(whole))
    eye = jnp.broadcast_to(jnp.eye(r, dtype=gram.dtype), gram.shape)
    factor = jnp.linalg.cholesky(jnp.where(eye > 0, 1, root[..., :, None] * gram * root[..., None, :]))
    pivots = jnp.square(jnp.diagonal(factor, axis1=-2, axis2=-1))
    half = jax.lax.linalg.triangular_solve(factor, eye, left_side=True, lower=True) * root[..., None, :]
    return times(transpose(half), half), jnp.all(pivots >= 8 * r * eps, axis=-1)[..., None, None]


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
