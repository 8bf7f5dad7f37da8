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
    (elimination, with a diagonal larger by 8 r eps of itself). One Newton step takes the floor's bias out of
    all directions that are determined.

    Args:
      gram: symmetric and positive semidefinite.
      regularization: a number, one for each of the matrices along the first axes, or None.
    """
    r = gram.shape[-1]
    eps, tiny = jnp.finfo(gram.dtype).eps, jnp.finfo(gram.dtype).tiny
    if regularization is None:
        values, vectors = jnp.linalg.eigh(gram)
        kept = values > jnp.maximum(r * eps * values[..., -1:], tiny)
        reciprocals = jnp.where(kept, 1 / jnp.where(kept, values, 1), 0)
        return matmul(vectors * reciprocals[..., None, :], transpose(vectors), HIGHEST)
    eye = jnp.broadcast_to(jnp.eye(r, dtype=gram.dtype), gram.shape)
    added = jnp.asarray(regularization, gram.dtype)
    matrix = gram + jax.lax.broadcast_in_dim(added, gram.shape, range(added.ndim)) * eye
    # A pivot of infinity leaves an empty direction out. Not `matrix > limit`: a NaN stays one and is seen.
    empty = (matrix <= tiny / eps) & (eye > 0)
    start = jnp.where(empty, jnp.inf, matrix * (1 + 8 * r * eps * eye))
    guess = jax.lax.fori_loop(0, r, _eliminate, start)
    return guess + matmul(guess, eye - matmul(matrix, guess, HIGHEST), HIGHEST)


def _eliminate(k: Array, matrix: Float[Array, "*batch r r"]) -> Float[Array, "*batch r r"]:
    """A step of Gauss-Jordan elimination in place: after all r of them the matrix is its inverse.

    No pivots are searched for: in a positive definite matrix the error is that of a Cholesky decomposition.
    Rows and columns of any size are rounded alike.
    """
    column, row = (jax.lax.dynamic_slice_in_dim(matrix, k, 1, axis) for axis in (-1, -2))
    pivot = jax.lax.dynamic_slice_in_dim(row, k, 1, -1)
    at_row, at_column = (
        jax.lax.broadcasted_iota(jnp.int32, z.shape, axis) == k
        for z, axis in ((column, column.ndim - 2), (row, row.ndim - 1))
    )
    rest = jnp.where(at_row | at_column, 0, matrix)
    return rest - jnp.where(at_row, -1, column) * (jnp.where(at_column, 1, row) / pivot)
