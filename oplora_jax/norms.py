"""Norms and inner products of matrices that are not formed."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from oplora_jax.matrix import (
    LowRank,
    Matrix,
    OuterProduct,
    left_product,
    matrix_entries,
    opened,
    thin_factors,
    to_dense,
)
from oplora_jax.products import compute_dtype, gram, matmul, times, transpose
from oplora_jax.sharding import partition, under_auto_sharding
from oplora_jax.solve import triangle


def inner_product(first: Matrix, second: Matrix) -> Float[Array, "*batch"]:
    r"""The sum of the products of the entries of two matrices, without forming either.

    Args:
      first: a `LowRank`, an `OuterProduct` or an array, of shape `(*batch, n, m)`.
      second: likewise, of the same shape.

    Returns:
      One number for each entry of the batch axes.

    The rounding error is relative to the product of the factors' norms. Do not compute a distance of two
    nearly equal matrices by it: $\langle A, A \rangle - 2 \langle A, B \rangle + \langle B, B \rangle$ is
    lost below 3e-4 of the norm of $A$ in float32.

    Examples:
      >>> import jax.numpy as jnp
      >>> from oplora_jax import LowRank, inner_product
      >>> ones = LowRank(jnp.ones((3, 1)), jnp.ones((1, 2)))
      >>> float(inner_product(ones, 2 * jnp.ones((3, 2))))
      12.0
    """
    return under_auto_sharding(_inner_product, lambda: partition(*matrix_entries(first)[:-2]), first, second)


def _inner_product(first: Matrix, second: Matrix) -> Array:
    if not isinstance(first, LowRank | OuterProduct):
        first, second = second, first
    if isinstance(first, LowRank | OuterProduct):
        left, right = thin_factors(first)
        return _sum_of_products(left_product(left, second), right)
    return _sum_of_products(to_dense(first), to_dense(second))


def _sum_of_products(x: Array, y: Array) -> Array:
    dtype = compute_dtype(x, y)
    return jnp.sum(x.astype(dtype) * y.astype(dtype), axis=(-2, -1))


def frobenius_norm(matrix: Matrix) -> Float[Array, "*batch"]:
    """The Frobenius norm of a matrix, without forming a low-rank one.

    Args:
      matrix: a `LowRank`, an `OuterProduct`, a `DenseGradient` or an array, of shape `(*batch, n, m)`.

    Returns:
      One number for each entry of the batch axes.

    The rounding error of a low-rank matrix's norm is relative to the product of its factors' norms. Of an
    outer product of few tokens, N (n + m) <= n m, that of the squared norm is relative to the squares of the
    norms of x and dy.

    Examples:
      >>> import jax.numpy as jnp
      >>> from oplora_jax import LowRank, frobenius_norm
      >>> round(float(frobenius_norm(LowRank(jnp.ones((2, 1)), jnp.ones((1, 2)), scale=3.0))), 5)
      6.0
    """
    matrix = opened(matrix)
    return under_auto_sharding(_frobenius_norm, lambda: partition(*matrix_entries(matrix)[:-2]), matrix)


def _frobenius_norm(matrix: Matrix) -> Array:
    if isinstance(matrix, LowRank):
        dtype = compute_dtype(matrix.a, matrix.b)
        left, right = (triangle(z.astype(dtype)) for z in (matrix.a, transpose(matrix.b)))
        dense = matrix.scale * times(left, transpose(right))
    elif isinstance(matrix, OuterProduct):
        (x, dy), (n, m) = thin_factors(matrix), matrix.shape[-2:]
        if x.shape[-2] * (n + m) <= n * m:
            return jnp.sqrt(jnp.maximum(_sum_of_products(gram(x), gram(dy)), 0.0))
        dense = matmul(transpose(x), dy)
    else:
        dense = to_dense(matrix)
    return jnp.sqrt(_sum_of_products(dense, dense))
