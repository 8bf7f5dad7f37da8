"""The inverse of many small Gram matrices."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from oplora_jax.matrix import HIGHEST, matmul, transpose


@jax.jit
def inverse(gram: Float[Array, "*batch r r"], regularization: Any) -> Float[Array, "*batch r r"]:
    """(gram + regularization I)^-1 of a Gram matrix; the pseudo-inverse where regularization is None.

    Finite for every finite Gram matrix. Rounding leaves the small eigenvalues of a float32 Gram matrix
    undetermined to eps times the largest, so directions below that are cut off (pseudo-inverse), or a pivot
    counts as 8 r eps of its diagonal entry (elimination).

    Args:
      gram: symmetric and positive semidefinite.
      regularization: a number, one for each of the matrices along the last batch axes, or None.
    """
    r = gram.shape[-1]
    if regularization is None:
        values, vectors = jnp.linalg.eigh(gram)
        eps, tiny = jnp.finfo(gram.dtype).eps, jnp.finfo(gram.dtype).tiny
        kept = values > jnp.maximum(r * eps * values[..., -1:], tiny)
        reciprocals = jnp.where(kept, 1 / jnp.where(kept, values, 1), 0)
        return matmul(vectors * reciprocals[..., None, :], transpose(vectors), HIGHEST)
    added = jnp.asarray(regularization, gram.dtype)
    return jax.lax.fori_loop(0, r, partial(_eliminate, gram, added), gram)


def _eliminate(
    gram: Float[Array, "*batch r r"],
    added: Array,
    k: Array,
    matrix: Float[Array, "*batch r r"],
) -> Float[Array, "*batch r r"]:
    """A step of Gauss-Jordan elimination in place: after all r of them the matrix is its inverse.

    What is added to the diagonal is added to the pivot. No pivots are searched for: in a positive definite
    matrix the error is that of a Cholesky decomposition. Rows and columns of any size are rounded alike.
    """
    at = lambda z, axis: jax.lax.dynamic_slice_in_dim(z, k, 1, axis)
    column, row = at(matrix, -1), at(matrix, -2)
    eps, tiny = jnp.finfo(gram.dtype).eps, jnp.finfo(gram.dtype).tiny
    added = jnp.broadcast_to(added, gram.shape[:-2])[..., None, None]
    whole = at(at(gram, -2), -1) + added
    # An infinite pivot leaves an empty direction out. A NaN stays one and is seen.
    floor = jnp.where(whole <= tiny / eps, jnp.inf, 8 * gram.shape[-1] * eps * whole)
    pivot = jnp.maximum(at(row, -1) + added, floor)
    at_row, at_column = (
        jax.lax.broadcasted_iota(jnp.int32, z.shape, axis) == k
        for z, axis in ((column, column.ndim - 2), (row, row.ndim - 1))
    )
    rest = jnp.where(at_row | at_column, 0, matrix)
    return rest - jnp.where(at_row, -1, column) * (jnp.where(at_column, 1, row) / pivot)
