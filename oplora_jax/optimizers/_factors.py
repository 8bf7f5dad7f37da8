"""The algebra of two factors that several LoRA optimizers share.

It is written for a thin matrix of r columns: a itself, or b^T. What an optimizer does to a with the help of b
it does to b^T with the help of a^T.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from oplora_jax.gradients.tangent import factor_gradients
from oplora_jax.matrix import HIGHEST, LowRank, Matrix, compute_dtype, finite_or_nan, matmul, transpose
from oplora_jax.optimizers._lift import is_zero
from oplora_jax.solve import inverse


def thin_factors_and_gradients(
    param: LowRank, gradient: Matrix
) -> tuple[
    Float[Array, "*batch n r"],
    Float[Array, "*batch m r"],
    Float[Array, "*batch n r"],
    Float[Array, "*batch m r"],
]:
    """(a, b^T, da, db^T) in the type of the solves, the derivatives as plain `jax.grad` has them.

    They are s G b^T and s G^T a: an exact gradient is multiplied by the factors.
    """
    if not isinstance(gradient, LowRank):
        gradient = factor_gradients(param, gradient)
    dtype = compute_dtype(param.a, param.b)
    return tuple(z.astype(dtype) for z in (param.a, transpose(param.b), gradient.a, transpose(gradient.b)))


def from_thin(like: LowRank, a: Array, b: Array) -> LowRank:
    """The node of a tree whose left factor is a and whose right factor is b^T, in the types of `like`."""
    return LowRank(a.astype(like.a.dtype), transpose(b).astype(like.b.dtype), like.scale)


def gram(thin: Float[Array, "*batch n r"]) -> Float[Array, "*batch r r"]:
    """The products of the columns, thin^T thin."""
    return matmul(transpose(thin), thin, HIGHEST)


def gram_inverse(thin: Float[Array, "*batch n r"], regularization: Any = None) -> Float[Array, "*batch r r"]:
    """(thin^T thin + regularization I)^-1; the pseudo-inverse where the regularization is None or 0."""
    return inverse(gram(thin), None if is_zero(regularization) else regularization)


def orthonormal(
    thin: Float[Array, "*batch n r"],
) -> tuple[Float[Array, "*batch n r"], Float[Array, "*batch r r"]]:
    """(Q, R) with thin = Q R, the columns of Q orthonormal and R triangular.

    Where n < r the last r - n columns of Q and rows of R are zero, so that the shapes are the same.
    """
    q, triangle = jnp.linalg.qr(thin)
    missing = thin.shape[-1] - q.shape[-1]
    if missing:
        batch = [(0, 0)] * (thin.ndim - 2)
        q = jnp.pad(q, [*batch, (0, 0), (0, missing)])
        triangle = jnp.pad(triangle, [*batch, (0, missing), (0, 0)])
    return q, triangle


def pseudo_inverse(matrix: Float[Array, "*batch r r"]) -> Float[Array, "*batch r r"]:
    """The pseudo-inverse of a triangular factor of `orthonormal`.

    Finite for every finite matrix. Directions below the rounding error of the decomposition, some eps times
    the largest singular value, are cut off. Unlike that of a Gram matrix the error does not grow with the
    square of the condition number.
    """
    u, values, vt = jnp.linalg.svd(finite_or_nan(matrix))
    kept = is_determined(values)
    reciprocals = jnp.where(kept, 1 / jnp.where(kept, values, 1), 0)
    return matmul(transpose(vt) * reciprocals[..., None, :], transpose(u), HIGHEST)


def is_determined(singular_values: Float[Array, "*batch r"]) -> Array:
    """Which singular values of a product of r x r matrices, in descending order, are more than rounding."""
    eps, tiny = jnp.finfo(singular_values.dtype).eps, jnp.finfo(singular_values.dtype).tiny
    floor = 8 * singular_values.shape[-1] * eps * singular_values[..., :1]
    # Not `values > floor`, so that a NaN stays one and is seen.
    return ~(singular_values <= jnp.maximum(floor, tiny))


def sylvester(
    left: Float[Array, "*batch r r"], right: Float[Array, "*batch r r"], total: Float[Array, "*batch r r"]
) -> Float[Array, "*batch r r"]:
    """The X with left X + X right = total, for two Gram matrices; of several the smallest.

    In the eigenvectors of both, each entry of X is one of the total divided by a sum of two eigenvalues.
    Sums that are zero up to rounding are left out.
    """
    (values_l, vectors_l), (values_r, vectors_r) = (jnp.linalg.eigh(z) for z in (left, right))
    sums = values_l[..., :, None] + values_r[..., None, :]
    eps, tiny = jnp.finfo(sums.dtype).eps, jnp.finfo(sums.dtype).tiny
    kept = sums > jnp.maximum(8 * sums.shape[-1] * eps * sums[..., -1:, -1:], tiny)
    rotated = matmul(matmul(transpose(vectors_l), total, HIGHEST), vectors_r, HIGHEST)
    solution = jnp.where(kept, rotated / jnp.where(kept, sums, 1), 0)
    return matmul(matmul(vectors_l, solution, HIGHEST), transpose(vectors_r), HIGHEST)
