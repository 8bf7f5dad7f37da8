"""The algebra of two factors that several LoRA optimizers share.

It is written for *wide* factors, of r rows: a^T and b. What an optimizer does to b with the help of a^T it
does to a^T with the help of b.
"""

from typing import Any, Literal

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from oplora_jax import solve
from oplora_jax.gradients.tangent import factor_gradients
from oplora_jax.matrix import LowRank, Matrix, to_unit_scale
from oplora_jax.optimizers._trees import mapped
from oplora_jax.products import compute_dtype, gram, times, transpose

Wide = Float[Array, "*batch r n"]
Pair = tuple[Float[Array, "*batch r n"], Float[Array, "*batch r m"]]  # a^T and b
Square = Float[Array, "*batch r r"]


def wide(param: LowRank) -> Pair:
    """(a^T, b), in float32 at least."""
    dtype = compute_dtype(param.a, param.b)
    return transpose(param.a).astype(dtype), param.b.astype(dtype)


def wide_at_unit_scale(param: LowRank) -> Pair:
    """(a^T, b) of the same matrix with scale 1, in float32 at least."""
    return wide(to_unit_scale(param))


def from_wide(like: LowRank, at: Array, b: Array) -> LowRank:
    """The node of a tree whose factors are a and b, in the types of `like`."""
    return like.with_factors(transpose(at).astype(like.a.dtype), b.astype(like.b.dtype))


def gram_inverse(rows: Wide, regularization: Any = None, stored: Any = None) -> Square:
    """(rows rows^T + regularization I)^-1, as `inverse`; `stored` is the type the rows were rounded to."""
    rounding = 0.0 if stored is None else float(jnp.finfo(stored).eps)
    return solve.inverse(gram(rows), regularization, rounding)


def orthonormal(rows: Wide) -> tuple[Wide, Square]:
    """(Q, L) with rows = L Q, the rows of Q orthonormal and L triangular.

    Where n < r the last r - n rows of Q and columns of L are zero, so that the shapes are the same.
    """
    q, triangle = (transpose(z) for z in solve.qr(transpose(rows)))
    missing = rows.shape[-2] - q.shape[-2]
    if missing:
        batch = [(0, 0)] * (rows.ndim - 2)
        q = jnp.pad(q, [*batch, (0, missing), (0, 0)])
        triangle = jnp.pad(triangle, [*batch, (0, 0), (0, missing)])
    return q, triangle


def pseudo_inverse(
    decomposed: tuple[Square, Float[Array, "*batch r"], Square],
    shortest: Float[Array, "*batch 1"] | float = 0.0,
) -> Square:
    """The pseudo-inverse of a triangular factor of `orthonormal`, or of a product of two, from its SVD.

    Finite for every finite matrix. Directions below the rounding error of the decomposition, some eps times
    the largest singular value, are cut off, and so are those not above `shortest`. Unlike that of a Gram
    matrix the error does not grow with the square of the condition number.
    """
    u, values, vt = decomposed
    kept = is_determined(values) & ~(values <= shortest)
    reciprocals = jnp.where(kept, 1 / jnp.where(kept, values, 1), 0)
    return times(transpose(vt) * reciprocals[..., None, :], transpose(u))


def is_determined(singular_values: Float[Array, "*batch r"]) -> Array:
    """Which singular values of a product of r x r matrices, in descending order, are more than rounding."""
    eps, tiny = jnp.finfo(singular_values.dtype).eps, jnp.finfo(singular_values.dtype).tiny
    floor = 8 * singular_values.shape[-1] * eps * singular_values[..., :1]
    # Not `values > floor`, so that a NaN stays one and is seen.
    return ~(singular_values <= jnp.maximum(floor, tiny))


def sylvester(left: Square, right: Square, total: Square) -> Square:
    """The X with left X + X right = total, for two Gram matrices; of several the smallest.

    In the eigenvectors of both, each entry of X is one of the total divided by a sum of two eigenvalues.
    Sums that are zero up to rounding are left out.
    """
    (values_l, vectors_l), (values_r, vectors_r) = (solve.eigh(z) for z in (left, right))
    sums = values_l[..., :, None] + values_r[..., None, :]
    eps, tiny = jnp.finfo(sums.dtype).eps, jnp.finfo(sums.dtype).tiny
    kept = sums > jnp.maximum(8 * sums.shape[-1] * eps * sums[..., -1:, -1:], tiny)
    rotated = times(transpose(vectors_l), total, vectors_r)
    return times(vectors_l, jnp.where(kept, rotated / jnp.where(kept, sums, 1), 0), transpose(vectors_r))


def preconditioned(function: Any) -> optax.GradientTransformation:
    """The transformation that makes function(param, gradient), a `LowRank`, of any kind of gradient."""
    update = lambda updates, state, params=None: (mapped(function, params, updates), state)
    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def on_factor(
    transformation: optax.GradientTransformation, factor: Literal["a", "b"]
) -> optax.GradientTransformationExtraArgs:
    """A transformation of plain arrays for one factor of the LoRA parameters; the other passes unchanged.

    There is no state for the other: `optax.MaskedNode` stands in its place.
    """
    mask = lambda tree: mapped(lambda node: node.with_factors(factor == "a", factor == "b"), tree)
    return optax.masked(transformation, mask)


def plain_gradient(param: LowRank, gradient: Matrix) -> LowRank:
    """The factor gradients in the factors' types, as `jax.grad` returns them."""
    gradient = factor_gradients(param, gradient)
    return param.with_factors(gradient.a.astype(param.a.dtype), gradient.b.astype(param.b.dtype))
