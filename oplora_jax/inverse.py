"""The inverse of many small Gram matrices."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from oplora_jax.matrix import HIGHEST, matmul, transpose


@jax.jit
def inverse(gram: Float[Array, "*batch r r"], regularization: Any) -> Float[Array, "*batch r r"]:
    """(gram + regularization I)^-1 of a Gram matrix; the pseudo-inverse where regularization is None.

    Finite for every finite Gram matrix. Rounding leaves the small eigenvalues of a float32 Gram matrix
    undetermined to eps times the largest, so directions below that are cut off (pseudo-inverse) or floored
    (elimination in the matrix scaled to a unit diagonal). One Newton step takes the floor's bias out of all
    directions that are determined.
    """
    r = gram.shape[-1]
    eps, tiny = jnp.finfo(gram.dtype).eps, jnp.finfo(gram.dtype).tiny
    if regularization is None:
        values, vectors = jnp.linalg.eigh(gram)
        kept = values > jnp.maximum(r * eps * values[..., -1:], tiny)
        reciprocals = jnp.where(kept, 1 / jnp.where(kept, values, 1), 0)
        return matmul(vectors * reciprocals[..., None, :], transpose(vectors), HIGHEST)
    eye, floor = jnp.broadcast_to(jnp.eye(r, dtype=gram.dtype), gram.shape), 8 * r * eps
    added = jnp.asarray(regularization, gram.dtype)
    diagonal = jnp.sum(gram * eye, axis=-1) + (added[..., 0] if added.ndim else added)
    # Not `diagonal > tiny`, so that a NaN stays one and is seen. The reciprocal root of infinity is zero.
    root = jax.lax.rsqrt(jnp.where(diagonal <= tiny, jnp.inf, diagonal))
    unit = (gram + added * eye) * root[..., :, None] * root[..., None, :] + floor * eye
    guess = jax.lax.fori_loop(0, r, _eliminate, unit)
    guess = guess + matmul(guess, eye + floor * guess - matmul(unit, guess, HIGHEST), HIGHEST)
    return guess * root[..., :, None] * root[..., None, :]


def _eliminate(k: Array, matrix: Float[Array, "*batch r r"]) -> Float[Array, "*batch r r"]:
    """A step of Gauss-Jordan elimination in place: after all r of them the matrix is its inverse.

    No pivots are searched for: in a positive definite matrix of unit diagonal they are between its least
    eigenvalue and 1, and the error is that of a Cholesky decomposition.
    """
    column, row = (jax.lax.dynamic_slice_in_dim(matrix, k, 1, axis) for axis in (-1, -2))
    pivot = jax.lax.dynamic_slice_in_dim(row, k, 1, -1)
    e = (jax.lax.broadcasted_iota(jnp.int32, row.shape, row.ndim - 1) == k).astype(matrix.dtype)
    return matrix - (column - transpose(e)) * ((row + e) / pivot)
