"""LoRSum: a sum of low-rank matrices, approximated by one of the anchor's rank."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from oplora_jax import matrix
from oplora_jax.matrix import LowRank, Terms, is_zero, left_product, opened, transposed
from oplora_jax.metrics import KroneckerMetric, checked_metric, powers, times_output
from oplora_jax.products import compute_dtype, times, transpose
from oplora_jax.sharding import specs_of, under_auto_sharding
from oplora_jax.solve import inverse
from oplora_jax.together import together


def lorsum(
    terms: Terms,
    *,
    num_iters: Any = 1,
    regularization: Any = 0.0,
    metric: KroneckerMetric | None = None,
    first: Literal["a", "b"] = "a",
) -> LowRank:
    r"""LoRSum: a sum of matrices, approximated by one of rank r without an SVD.

    A few alternating least-squares steps on the two factors do it, and the sum is never formed. The
    optimizers bring a step of the full weight back to the factors with it.

    Args:
      terms: pairs of a coefficient (a scalar) and a matrix (`LowRank`, `OuterProduct` or array) of shape
        `(*batch, n, m)`. The first matrix is a `LowRank`, whose factors are the start: the result has its
        rank, types and scale.
      num_iters: alternating iterations. With 0 both factors step from the old ones, as in `scaled_gd`.
      regularization: how strongly the factors are held to the start, 0 or more, in the units of the squared
        factors of the first term at scale 1.
      metric: a `KroneckerMetric` to measure the distance from the sum in; the Frobenius norm if None.
      first: the factor that is solved first.

    Returns:
      The approximation, a `LowRank`.

    Raises:
      ValueError: a first term that is no `LowRank`, shapes that differ, or an argument out of range.

    With $S = \sum_i c_i T_i$ the sum, $a_0, b_0$ the factors at the start and $\lambda$ the regularization it
    repeats

    $$
    a \leftarrow (\lambda a_0 + S b^\top)(b b^\top + \lambda I)^{-1}, \qquad
    b \leftarrow (a^\top a + \lambda I)^{-1} (\lambda b_0 + a^\top S).
    $$

    Without regularization the result tends to the truncated SVD of $S$, and reaches $S$ at once if its rank
    allows. Where $b b^\top$ has no inverse (b = 0, LoRA's usual start) the solution closest to the start is
    taken. In a metric $D$ the other terms are preconditioned, $D_{in}^{-1} T_i D_{out}^{-1}$.

    From [OPLoRA](https://arxiv.org/abs/2509.19977), section 3; the metric from
    [PSI-LoRA](https://arxiv.org/abs/2602.16456).

    Examples:
      >>> import jax.numpy as jnp
      >>> from oplora_jax import LowRank, lorsum, to_dense
      >>> start, step = (LowRank(jnp.ones((2, 1)), jnp.array([b])) for b in ([1.0, 2.0], [4.0, 0.0]))
      >>> jnp.round(to_dense(lorsum([(1.0, start), (-0.5, step)])), 4).tolist()
      [[-1.0, 2.0], [-1.0, 2.0]]
    """
    if not terms or not isinstance(terms[0][1], LowRank):
        raise ValueError("terms must begin with the anchor, a pair of a coefficient and a LowRank")
    if first not in ("a", "b"):
        raise ValueError(f"first is {first!r}; expected 'a' or 'b'")
    shape = matrix.common_shape(terms)
    metric = metric and checked_metric(metric, shape, compute_dtype(terms[0][1]))

    def solve(terms, regularization, metric):
        (weight, anchor), *rest = terms
        sums = Sums([anchor], rest, metric and powers(metric, 1, batch_ndim=len(shape) - 2))
        return lorsums([sums], [[weight]], [1.0], [regularization], num_iters=num_iters, first=first)[0][0]

    return under_auto_sharding(solve, lambda: specs_of(terms[0][1]), list(terms), regularization, metric)


class Sums(NamedTuple):
    """The sums of one LoRA parameter: over itself, its momentum, and the gradient."""

    anchors: Sequence[LowRank]  # the P_p
    gradient: Terms  # G
    metric: tuple[KroneckerMetric, KroneckerMetric] | None = None  # D and its inverse, of the first sum


def lorsums(
    problems: Sequence[Sums],
    mixing: Sequence[Sequence[Any]],
    rates: Sequence[Any],
    regularization: Sequence[Any],
    *,
    shrinkage: Sequence[Any] | None = None,
    num_iters: Any = 1,
    first: str = "a",
    relative: bool = False,
) -> list[list[LowRank]]:
    r"""All $P_p \leftarrow \mathrm{LoRSum}[\sum_q A_{pq} P_q + c_p G]$ of many parameters.

    X and Y have the rows of all a^T and all b of a parameter, one sum below the other, and <X, X> is the Gram
    matrix within each sum. One pass over G serves all sums: given X, Y changes by

    $$
    (\langle X, X \rangle + \lambda I)^{-1}
    ([A \circ X X_0^\top - \langle X, X \rangle - \mu I]\, Y_0 + c X G).
    $$

    A is the mixing, by sum and anchor. By sum are the rates c, the regularization lambda, which pulls to the
    anchor (where it is known to be 0 there are pseudo-inverses; relative ones are multiplied by the mean
    eigenvalue of <X, X> within the sum), and the shrinkage mu, which pulls to zero.
    The R x R algebra of all parameters is done together. What is as wide as a parameter stays with it, so
    that its gradient is free once its own products are taken.
    """
    for name, value in [("num_iters", num_iters), *(("regularization", value) for value in regularization)]:
        if isinstance(value, int | float) and value < 0:
            raise ValueError(f"{name} is {value}; expected 0 or more, a non-negative number")
    ridges = [None if is_zero(value) else value for value in regularization]
    problems = [z._replace(gradient=[(c, opened(term)) for c, term in z.gradient]) for z in problems]
    numbers = mixing, rates, ridges, shrinkage or [0.0] * len(rates)
    solve = _solve_static if isinstance(num_iters, int) else _solve
    return solve(problems, numbers, num_iters, first, relative)


def _solve(problems, numbers, num_iters, first, relative):
    starts = [_rows(problem.anchors) for problem in problems]
    ranks = [tuple(anchor.a.shape[-1] for anchor in problem.anchors) for problem in problems]

    def half_step(side, changes):
        """The changes of all Y, a^T (side 0) or b (1), from those of X."""
        grams = [_grams(side, *z) for z in zip(problems, starts, changes, strict=True)]
        steps = together(lambda ranks, z: _step(ranks, relative, *numbers, *z), ranks, grams)
        return [_change(side, *z) for z in zip(problems, starts, changes, steps, strict=True)]

    def iterate(_, changes):
        one = half_step(*((0, changes[1]) if first == "a" else (1, changes[0])))
        return (one, half_step(1, one)) if first == "a" else (half_step(0, one), one)

    alternate = lambda changes: jax.lax.fori_loop(0, num_iters, iterate, changes)
    jacobi = lambda changes: (half_step(0, changes[1]), half_step(1, changes[0]))
    changes = tuple([jnp.zeros_like(start[side]) for start in starts] for side in (0, 1))
    if isinstance(num_iters, int):
        changes = alternate(changes) if num_iters else jacobi(changes)
    else:
        changes = jax.lax.cond(num_iters > 0, alternate, jacobi, changes)
    return [_sums(*z) for z in zip(problems, starts, *changes, strict=True)]


_solve_static = jax.jit(_solve, static_argnums=(2, 3, 4))


# What is compiled by itself is traced once for all parameters of a shape.
@jax.jit
def _rows(anchors):
    """X_0 of all a^T and that of all b, at scale 1 and in the type of the solves."""
    at = [matrix.to_unit_scale(anchor) for anchor in anchors]
    dtype = jnp.result_type(*(anchor.dtype for anchor in at))
    join = lambda parts: jnp.concatenate([z.astype(dtype) for z in parts], axis=-2)
    return join([transpose(anchor.a) for anchor in at]), join([anchor.b for anchor in at])


@partial(jax.jit, static_argnums=0)
def _grams(side, problem, start, change):
    """X D X^T, X D (X - X_0)^T, in which nothing cancels where little changes, and in a metric X X_0^T."""
    x, inner = start[1 - side] + change, lambda x, y: times(x, transpose(y))
    if problem.metric is None:
        return inner(x, x), inner(x, change), None
    measured = _times_metric(x, problem, problem.metric[0][1 - side])
    cross = None if len(problem.anchors) == 1 else inner(x, start[1 - side])
    return inner(measured, x), inner(measured, change), cross


def _step(ranks, relative, mixing, rates, regularization, shrinkage, gram, drift, cross):
    """R x R matrices: what to multiply Y_0 and X G with; in a metric, then Y_0 in the inverse metric too."""
    of = np.repeat(np.arange(len(ranks)), ranks)  # the sum that a row belongs to
    over = lambda z: jnp.broadcast_to(z, gram.shape)
    rows = lambda values: jnp.stack([jnp.asarray(z, gram.dtype) for z in values])[of]
    mixing, same = over(jnp.stack(list(map(rows, mixing)))[of]), over(of[:, None] == of)
    across = mixing * (gram - drift if cross is None else cross)
    own = jnp.where(same, (mixing - 1) * (gram - drift) - drift, across if cross is None else 0)
    own = own - over(jnp.diag(rows(shrinkage)))
    if None not in regularization:
        ridge, small = (jnp.broadcast_to(rows(z), gram.shape[:-1]) for z in (regularization, shrinkage))
        if relative:
            own_diagonals = same * jnp.diagonal(gram, axis1=-2, axis2=-1)[..., None, :]
            ridge = ridge * jnp.sum(own_diagonals, -1) / jnp.sum(same, -1)
        solve = inverse(jnp.where(same, gram, 0), ridge + small)
    else:
        solve = jnp.zeros_like(gram)
        for end, rank, value, small in zip(np.cumsum(ranks), ranks, regularization, shrinkage, strict=True):
            at = slice(end - rank, end)
            block = inverse(gram[..., at, at], None if value is None else value + small)
            solve = solve.at[..., at, at].set(block)
    across = None if cross is None else times(solve, jnp.where(same, 0, across))
    return times(solve, own), solve * over(rows(rates)), across


@partial(jax.jit, static_argnums=0)
def _change(side, problem, start, change, step):
    """That of Y, from that of X."""
    x, y0, (own, rate, across) = start[1 - side] + change, start[side], step
    moved = jnp.zeros_like(y0) if across is None else times(across, y0)
    for coefficient, term in problem.gradient:
        product = left_product(x, transposed(term) if side == 0 else term)
        moved += jnp.asarray(coefficient, y0.dtype) * times(rate, product.astype(y0.dtype))
    if problem.metric is not None:
        moved = _times_metric(moved, problem, problem.metric[1][side])
    return times(own, y0) + moved


def _times_metric(rows, problem, side):
    """The rows of the first sum times a side of its metric."""
    own, others = jnp.split(rows, [problem.anchors[0].a.shape[-1]], axis=-2)
    return jnp.concatenate([times_output(own, side.astype(rows.dtype)), others], axis=-2)


@jax.jit
def _sums(problem, start, *changes):
    """The new factors, with the anchors' scales and types."""
    ends = np.cumsum([anchor.a.shape[-1] for anchor in problem.anchors])[:-1]
    parts = [jnp.split(z + change, ends, axis=-2) for z, change in zip(start, changes, strict=True)]
    like = zip(*parts, problem.anchors, strict=True)
    return [matrix.from_unit_scale(LowRank(transpose(x), y), anchor) for x, y, anchor in like]
