"""LoRSum: a sum of low-rank matrices, approximated by one of the anchor's rank."""

from typing import Any, Literal

from oplora_jax.matrix import LowRank, Terms, common_shape, compute_dtype
from oplora_jax.metrics import KroneckerMetric, as_type, check_metric, powers
from oplora_jax.problems import Problem, Rule, Sum, solve_problems
from oplora_jax.sharding import specs_of, under_auto_sharding


def lorsum(
    terms: Terms,
    *,
    num_iters: Any = 1,
    regularization: Any = 0.0,
    metric: KroneckerMetric | None = None,
    first: Literal["a", "b"] = "a",
) -> LowRank:
    r"""Approximates :math:`S = \sum_i c_i T_i` by proximal alternating least squares on two factors.

    From the factors :math:`a_0, b_0` of the first term, the anchor, repeats

    .. math::
      a \leftarrow (\lambda a_0 + S b^\top)(b b^\top + \lambda I)^{-1}, \qquad
      b \leftarrow (a^\top a + \lambda I)^{-1} (\lambda b_0 + a^\top S).

    S is never formed. Each iteration is one of block power iteration: without regularization the result
    tends to the truncated SVD of S, and reaches S at once if its rank allows. Without regularization a
    rank-deficient solve (b = 0, LoRA's usual start) takes the solution closest to the anchor, the limit
    :math:`\lambda \to 0`.

    With a metric every term but the anchor is preconditioned, :math:`S = c_0 T_0 + \sum_{i>0} c_i\,
    D_{in}^{-1} T_i D_{out}^{-1}`, and S is approximated in the metric's norm:

    .. math::
      a \leftarrow (\lambda a_0 + S D_{out} b^\top)(b D_{out} b^\top + \lambda I)^{-1}, \qquad
      b \leftarrow (a^\top D_{in} a + \lambda I)^{-1} (\lambda b_0 + a^\top D_{in} S).

    Args:
      terms: pairs of a coefficient (a scalar) and a matrix (`LowRank`, `OuterProduct` or array) of shape
        (*batch, n, m). The first matrix, the anchor, is a `LowRank`; its rank is that of the result.
      num_iters: alternating iterations. 0 is the Jacobi step: both factors from the old ones, which
        for terms (1, P), (-lr, G) is preconditioned LoRA.
      regularization: lambda, non-negative, in the units of the squared factors of the anchor at scale 1.
      metric: a `KroneckerMetric`; the Frobenius norm if None.
      first: the factor that is solved first.

    Returns:
      A `LowRank` with the anchor's shapes, types and scale.

    Raises:
      ValueError: an anchor that is no `LowRank`, shapes that differ, or an argument out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from oplora_jax import LowRank, lorsum, to_dense
      >>> anchor = LowRank(a=jnp.array([[1.0], [1.0]]), b=jnp.array([[1.0, 2.0]]))
      >>> step = LowRank(a=jnp.array([[1.0], [1.0]]), b=jnp.array([[4.0, 0.0]]))
      >>> jnp.round(to_dense(lorsum([(1.0, anchor), (-0.5, step)])), 4).tolist()
      [[-1.0, 2.0], [-1.0, 2.0]]

    References:
      OPLoRA, https://arxiv.org/abs/2509.19977, section 3; the metric, https://arxiv.org/abs/2602.16456.
    """
    if not terms or not isinstance(terms[0][1], LowRank):
        raise ValueError("terms must begin with the anchor, a pair of a coefficient and a LowRank")
    common_shape(terms)
    step = lambda *arguments: _lorsum(*arguments, num_iters=num_iters, first=first)
    return under_auto_sharding(step, lambda: specs_of(terms[0][1]), list(terms), regularization, metric)


def _lorsum(terms, regularization, metric, *, num_iters, first):
    shape = common_shape(terms)
    (weight, anchor), *rest = terms
    rule, total = Rule([weight], [coefficient for coefficient, _ in rest], regularization), Sum(anchor)
    if metric is not None:
        check_metric(metric, shape)
        metric = as_type(metric, compute_dtype(anchor.a, anchor.b))
        forward, backward = powers(metric, 1, batch_ndim=len(shape) - 2)
        total = Sum(anchor, forward, backward)
    problem = Problem([matrix for _, matrix in rest], [total])
    [solution] = solve_problems([rule], [problem], num_iters=num_iters, first=first)
    return solution.sums[0]
