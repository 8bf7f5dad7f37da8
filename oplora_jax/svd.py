"""The best low-rank approximation of a sum of matrices."""

import jax
import jax.numpy as jnp

from oplora_jax import solve
from oplora_jax.matrix import (
    HIGHEST,
    LowRank,
    OuterProduct,
    Terms,
    common_shape,
    compute_dtype,
    matmul,
    matrix_entries,
    thin_factors,
    to_dense,
    transpose,
)
from oplora_jax.sharding import partition, under_auto_sharding


def svd(terms: Terms, rank: int, scale: float | int = 1.0) -> LowRank:
    r"""The best approximation of a sum of matrices by one of rank r, with balanced factors.

    The truncated singular value decomposition :math:`U S V^\top` of :math:`\sum_i c_i T_i`, as
    :math:`a = U S^{1/2} s^{-1/2}` and :math:`b = s^{-1/2} S^{1/2} V^\top`. A sum whose factors are thin
    together is not formed: it goes through a QR of the stacked factors.

    Args:
      terms: pairs of a coefficient and a matrix of shape (*batch, n, m).
      rank: r, at most min(n, m).
      scale: the scale s of the result.

    Returns:
      A `LowRank` of the terms' type.

    Raises:
      ValueError: no terms, shapes that differ, or a rank that is not between 1 and min(n, m).

    Example:
      >>> import jax.numpy as jnp
      >>> from oplora_jax import svd, to_dense
      >>> best = svd([(1.0, jnp.diag(jnp.array([3.0, 2.0, 1.0])))], rank=2)
      >>> jnp.round(jnp.diag(to_dense(best)), 4).tolist()
      [3.0, 2.0, 0.0]
    """
    shape = common_shape(terms)
    if not 1 <= rank <= min(shape[-2:]):
        raise ValueError(f"rank is {rank}; matrices of shape {shape} need 1 to {min(shape[-2:])}")
    *batch, rows, columns = matrix_entries(terms[0][1])
    like = lambda: LowRank(partition(*batch, rows, None), partition(*batch, None, columns), scale)
    return under_auto_sharding(lambda terms: _svd(terms, rank, scale), like, list(terms))


def _svd(terms: Terms, rank: int, scale: float | int) -> LowRank:
    shape = common_shape(terms)
    dtype = compute_dtype(*(leaf for _, t in terms for leaf in jax.tree.leaves(t)))
    factored = all(isinstance(t, LowRank | OuterProduct) for _, t in terms)
    if factored and sum(thin_factors(t)[0].shape[-2] for _, t in terms) < min(shape[-2:]):
        lefts, rights = zip(*(thin_factors(t) for _, t in terms), strict=True)
        scaled = [(c * x).astype(dtype) for (c, _), x in zip(terms, lefts, strict=True)]
        q_left, r_left = solve.qr(transpose(jnp.concatenate(scaled, axis=-2)))
        stacked = jnp.concatenate([y.astype(dtype) for y in rights], axis=-2)
        q_right, r_right = solve.qr(transpose(stacked))
        core = matmul(r_left, transpose(r_right), HIGHEST)
        u, s, vt = solve.svd(core)
        u, vt = matmul(q_left, u, HIGHEST), matmul(vt, transpose(q_right), HIGHEST)
    else:
        dense = sum(c * to_dense(t).astype(dtype) for c, t in terms)
        u, s, vt = solve.svd(dense)
    if s.shape[-1] < rank:  # fewer stacked columns than the rank asked for: the rest is zero
        missing = [(0, 0)] * (s.ndim - 1)
        pad = (0, rank - s.shape[-1])
        s = jnp.pad(s, [*missing, pad])
        u = jnp.pad(u, [*missing, (0, 0), pad])
        vt = jnp.pad(vt, [*missing, pad, (0, 0)])
    root = jnp.sqrt(s[..., :rank] / scale)
    out = jnp.result_type(*(t.dtype for _, t in terms))
    return LowRank(
        (u[..., :rank] * root[..., None, :]).astype(out),
        (root[..., :, None] * vt[..., :rank, :]).astype(out),
        scale,
    )
