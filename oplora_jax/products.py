"""Products of arrays that are matrices with batch axes in front, in float32 at least."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Products of rank-sized matrices decide how well conditioned a solve is. TPUs, and GPUs with TF32, would
# multiply float32 in 8 to 11 bits of mantissa unless told otherwise.
HIGHEST = jax.lax.Precision.HIGHEST


def transpose(x: Float[Array, "*batch n m"]) -> Float[Array, "*batch m n"]:
    """The transposed matrix, batch axes left alone."""
    return jnp.swapaxes(x, -1, -2)


def compute_dtype(*arrays: Any) -> jnp.dtype:
    """The type to accumulate and solve in: that of arrays or matrices, float32 at least."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def matmul(x: Array, y: Array, precision: Any = None) -> Array:
    """x @ y over batch axes, accumulated and returned in float32 at least."""
    return jnp.matmul(x, y, precision=precision, preferred_element_type=compute_dtype(x, y))


def times(*matrices: Array) -> Array:
    """The product of small or thin matrices, from the left, in the highest precision and float32 at least."""
    first, *rest = matrices
    for matrix in rest:
        first = matmul(first, matrix, HIGHEST)
    return first


def gram(rows: Float[Array, "*batch r n"]) -> Float[Array, "*batch r r"]:
    """The products of the rows, rows rows^T."""
    return times(rows, transpose(rows))


def as_wide(thin: Float[Array, "*batch k n"]) -> Float[Array, "*batch k n"]:
    """The same matrix, which XLA then computes with its few rows as rows.

    On CPU a product over the tokens with 16 rows takes a fourth of the time of one with 16 columns, and XLA
    would turn the first into the second, to save the transpose of the result.
    """
    return jax.lax.optimization_barrier(thin)
