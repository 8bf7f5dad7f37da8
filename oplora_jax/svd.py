"""The best low-rank approximation of a sum of matrices."""

import jax
import jax.numpy as jnp

from oplora_jax import matrix, solve
from oplora_jax.matrix import LowRank, OuterProduct, Terms, thin_factors, to_dense
from oplora_jax.products import compute_dtype, times, transpose
from oplora_jax.sharding import partition, under_auto_sharding


def svd(terms: Terms, rank: int, scale: float | int = 1.0) -> LowRank:
    r"""The best approximation of a sum of matrices by one of rank r, by a truncated SVD.

    `lorsum` is the cheaper way. A sum whose factors are thin together is not formed here either.

    Args:
      terms: pairs of a coefficient and a matrix (`LowRank`, `OuterProduct` or array) of shape
        `(*batch, n, m)`.
      rank: r, at most min(n, m).
      scale: the scale s of the result.

    Returns:
      A `LowRank` in the terms' type, with balanced factors: a^T a = b b^T.

    Raises:
      ValueError: no terms, shapes that differ, or a rank that is not between 1 and min(n, m).

    Of the decomposition $U S V^\top$ of $\sum_i c_i T_i$, truncated, the factors are $a = U S^{1/2} s^{-1/2}$
    and $b = s^{-1/2} S^{1/2} V^\top$.

    Examples:
      >>> import jax.numpy as jnp
      >>> from oplora_jax import svd, to_dense
      >>> best = svd([(1.0, jnp.diag(jnp.array([3.0, 2.0, 1.0])))], rank=2)
      >>> jnp.round(jnp.diag(to_dense(best)), 4).tolist()
      [3.0, 2.0, 0.0]
    """
    shape = matrix.common_shape(terms)
    if not 1 <= rank <= min(shape[-2:]):
        raise ValueError(f"rank is {rank}; matrices of shape {shape} need 1 to {min(shape[-2:])}")
    *batch, rows, columns = matrix.matrix_entries(terms[0][1])
    like = lambda: LowRank(partition(*batch, rows, None), partition(*batch, None, columns), scale)
    return under_auto_sharding(lambda terms: _svd(terms, rank, scale), like, list(terms))


def _svd(terms: Terms, rank: int, scale: float | int) -> LowRank:
    dtype = compute_dtype(*jax.tree.leaves([t for _, t in terms]))
    factored = all(isinstance(t, LowRank | OuterProduct) for _, t in terms)
    if factored and sum(thin_factors(t)[0].shape[-2] for _, t in terms) < min(terms[0][1].shape[-2:]):
        pairs = [(c * x, y) for c, t in terms for x, y in [thin_factors(t)]]
        sides = [jnp.concatenate([z.astype(dtype) for z in s], axis=-2) for s in zip(*pairs, strict=True)]
        (q_left, r_left), (q_right, r_right) = (solve.qr(transpose(side)) for side in sides)
        u, s, vt = solve.svd(times(r_left, transpose(r_right)))
        u, vt = times(q_left, u), times(vt, transpose(q_right))
    else:
        u, s, vt = solve.svd(sum(c * to_dense(t).astype(dtype) for c, t in terms))
    root = jnp.sqrt(s[..., :rank] / scale)
    wide = [z[..., :rank, :] * root[..., None] for z in (transpose(u), vt)]
    # Where fewer columns are stacked than the rank asked for, the rest is zero.
    missing = [(0, 0)] * (root.ndim - 1) + [(0, rank - root.shape[-1]), (0, 0)]
    out = jnp.result_type(*(t.dtype for _, t in terms))
    a, b = (jnp.pad(z, missing).astype(out) for z in wide)
    return LowRank(transpose(a), b, scale)
