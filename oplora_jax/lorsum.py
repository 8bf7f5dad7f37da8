"""LoRSum: a sum of low-rank matrices, approximated by one of the anchor's rank."""

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from oplora_jax.matrix import (
    HIGHEST,
    LowRank,
    Matrix,
    Terms,
    absorb_scale,
    common_shape,
    left_product,
    matmul,
    share_scale,
    solve_dtype,
    transpose,
    transposed,
)
from oplora_jax.metrics import KroneckerMetric, as_type, check_metric, powers, times_output
from oplora_jax.sharding import in_auto_axes, specs_of


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
    return in_auto_axes(step, lambda: specs_of(terms[0][1]), list(terms), regularization, metric)


def _lorsum(terms, regularization, metric, *, num_iters, first):
    shape = common_shape(terms)
    (weight, anchor), *rest = terms
    total = Sum(weight, anchor, [coefficient for coefficient, _ in rest], regularization)
    if metric is not None:
        check_metric(metric, shape)
        metric = as_type(metric, solve_dtype(anchor.a, anchor.b))
        forward, backward = powers(metric, 1, batch_ndim=len(shape) - 2)
        total = total._replace(metric=forward, inverse_metric=backward)
    problem = Problem([matrix for _, matrix in rest], [total])
    [[result]] = solve_problems([problem], num_iters=num_iters, first=first)
    return result


class Sum(NamedTuple):
    """One of several sums over the same matrices."""

    weight: Any  # the anchor's coefficient
    anchor: LowRank
    coefficients: Sequence[Any]  # one for each of the matrices; None where the sum lacks it
    regularization: Any = 0.0
    shrinkage: Any = 0.0  # added to the Gram matrices as well, but pulls towards zero, not the anchor
    metric: KroneckerMetric | None = None
    inverse_metric: KroneckerMetric | None = None


class Problem(NamedTuple):
    """Several LoRSums over the same matrices, each of which is passed over once for all of them."""

    matrices: Sequence[Matrix]  # the terms besides the anchors
    sums: Sequence[Sum]


def solve_problems(
    problems: Sequence[Problem], *, num_iters: Any = 1, first: str = "a"
) -> list[list[LowRank]]:
    """LoRSums of several matrices: of all LoRA parameters of a model.

    In a single iteration, without metrics, the small solves of all problems are done together. Otherwise the
    matrices of each would wait in memory for all others, and the problems are solved one after the other.

    Args:
      problems: what is to be solved.
      num_iters: as for `lorsum`.
      first: as for `lorsum`.

    Returns:
      For each problem one `LowRank` for each of its sums.
    """
    if first not in ("a", "b"):
        raise ValueError(f"first is {first!r}; expected 'a' or 'b'")
    static = isinstance(num_iters, int)
    if static and num_iters < 0:
        raise ValueError(f"num_iters is {num_iters}; expected 0 (the Jacobi step) or more")
    checked = [Problem(list(matrices), list(map(_checked, sums))) for matrices, sums in problems]
    solve = partial(_solve_static if static else _solve, num_iters=num_iters, first=first)
    together = static and num_iters <= 1 and all(z.metric is None for _, sums in checked for z in sums)
    solved = solve(checked) if together else [solve([problem])[0] for problem in checked]
    return [
        [share_scale(new, like=total.anchor) for new, total in zip(results, sums, strict=True)]
        for results, (_, sums) in zip(solved, problems, strict=True)
    ]


def _checked(total: Sum) -> Sum:
    """The sum, with a regularization of None, for pseudo-inverses, where it is known to be zero.

    A traced zero is left to the Cholesky solve's floor.
    """
    reg = total.regularization
    known = isinstance(reg, int | float)
    if known and reg < 0:
        raise ValueError(f"regularization is {reg}; expected a non-negative number")
    return total._replace(regularization=None if known and reg == 0 else reg)


class _Stack(NamedTuple):
    """Sums of one shape, along a new first axis of all arrays: one solve for all of them.

    Factors are wide here, a^T and b: the solve for a is that for b of the transposed problem.
    """

    weight: Array  # (S, 1, ..., 1), as the other numbers
    anchor: tuple[Array, Array]  # a^T (S, *batch, r, n) and b (S, *batch, r, m)
    coefficients: Sequence[Any]  # None where none of the sums has the matrix
    regularization: Any  # None for pseudo-inverses
    shrinkage: Array
    metric: KroneckerMetric | None
    inverse_metric: KroneckerMetric | None


def _solve(problems, *, num_iters, first):
    alike = [_alike(sums) for _, sums in problems]
    stacks = [_stacks(sums, indices) for (_, sums), indices in zip(problems, alike, strict=True)]
    matrices = [matrices for matrices, _ in problems]
    sides = [list(map(transposed, each)) for each in matrices], matrices

    def half_step(side, others):
        """One factor of each stack of each problem, a^T (0) or b (1), from the other one."""
        systems = [_systems(side, *z) for z in zip(stacks, others, strict=True)]
        inverses = _inverses(systems)
        return [_new_factors(side, *z) for z in zip(sides[side], stacks, others, inverses, strict=True)]

    def iterate(_, factors):
        side = 0 if first == "a" else 1
        other = half_step(side, factors[1 - side])
        pair = other, half_step(1 - side, other)
        return pair if side == 0 else pair[::-1]

    def alternate(factors):
        return jax.lax.fori_loop(0, num_iters, iterate, factors)

    def jacobi(factors):
        return half_step(0, factors[1]), half_step(1, factors[0])

    factors = tuple([[stack.anchor[side] for stack in of_one] for of_one in stacks] for side in (0, 1))
    if isinstance(num_iters, int):
        factors = alternate(factors) if num_iters else jacobi(factors)
    else:
        factors = jax.lax.cond(num_iters > 0, alternate, jacobi, factors)
    return [_unstack(*z) for z in zip(alike, *factors, strict=True)]


_solve_static = jax.jit(_solve, static_argnames=("num_iters", "first"))


def _alike(sums: Sequence[Sum]) -> tuple[tuple[int, ...], ...]:
    """The indices of sums that can be stacked with each other."""
    groups: dict[Any, list[int]] = {}
    for index, total in enumerate(sums):
        shapes = total.anchor.a.shape, total.anchor.b.shape, solve_dtype(*jax.tree.leaves(total.anchor))
        kind = total.regularization is None, jax.tree.structure(total.metric)
        groups.setdefault((*shapes, *kind), []).append(index)
    return tuple(map(tuple, groups.values()))


# Compiled by themselves, the parts of a problem are traced once for all layers of a shape.
@partial(jax.jit, static_argnums=1)
def _stacks(sums: Sequence[Sum], alike: tuple[tuple[int, ...], ...]) -> list[_Stack]:
    return [_stack([sums[index] for index in indices]) for indices in alike]


def _unstack(alike, lefts, rights) -> list[LowRank]:
    solved = {
        index: LowRank(transpose(at[place]), b[place])
        for indices, at, b in zip(alike, lefts, rights, strict=True)
        for place, index in enumerate(indices)
    }
    return [solved[index] for index in range(len(solved))]


def _stack(sums: Sequence[Sum]) -> _Stack:
    """Sums with their anchors at scale 1, and all of them in the type of the solves."""
    anchors = [absorb_scale(total.anchor) for total in sums]
    dtype, ndim = anchors[0].dtype, anchors[0].a.ndim + 1
    numbers = lambda values: jnp.stack([jnp.asarray(z, dtype) for z in values]).reshape(-1, *[1] * (ndim - 1))
    arrays = lambda trees: jax.tree.map(lambda *z: jnp.stack([w.astype(dtype) for w in z]), *trees)
    coefficients = [
        None if all(z is None for z in column) else numbers(0.0 if z is None else z for z in column)
        for column in zip(*(total.coefficients for total in sums), strict=True)
    ]
    exact = sums[0].regularization is None
    return _Stack(
        weight=numbers(total.weight for total in sums),
        anchor=arrays([(transpose(anchor.a), anchor.b) for anchor in anchors]),
        coefficients=coefficients,
        regularization=None if exact else numbers(total.regularization for total in sums),
        shrinkage=numbers(total.shrinkage for total in sums),
        metric=arrays([total.metric for total in sums]),
        inverse_metric=arrays([total.inverse_metric for total in sums]),
    )


# Solved for the change from the anchor: with d = a D_in (a - c_0 a_0)^T of a wide factor a, the new b is
# b0 + (a D_in a^T + lam I)^-1 (a D_in (S - c_0 P) - d b0). Nothing cancels where little changes, and a
# singular Gram matrix leaves the anchor's directions alone.
@partial(jax.jit, static_argnums=0)
def _systems(side: int, stacks: Sequence[_Stack], others: Sequence[Array]) -> list[tuple[Array, Any]]:
    """The Gram matrices to invert for a^T (side 0) or b (side 1), and what is added to their diagonals."""
    systems = []
    for stack, other in zip(stacks, others, strict=True):
        gram = matmul(other, transpose(_measured(side, stack, other)), HIGHEST)
        exact = stack.regularization is None
        systems.append((gram, None if exact else stack.regularization + stack.shrinkage))
    return systems


def _measured(side: int, stack: _Stack, other: Array) -> Array:
    return other if stack.metric is None else times_output(other, stack.metric[1 - side])


def _inverses(systems: Sequence[Sequence[tuple[Array, Any]]]) -> list[list[Array]]:
    """The inverses of all Gram matrices, those of one shape together."""
    groups: dict[Any, list[tuple[int, int]]] = {}
    for i, of_one in enumerate(systems):
        for j, (gram, added) in enumerate(of_one):
            groups.setdefault((gram.shape[1:], gram.dtype, added is None), []).append((i, j))
    out: list[list[Any]] = [[None] * len(of_one) for of_one in systems]
    for places in groups.values():
        grams, added = zip(*(systems[i][j] for i, j in places), strict=True)
        ends = list(itertools.accumulate(map(len, grams)))
        together = inverse(jnp.concatenate(grams), None if added[0] is None else jnp.concatenate(added))
        for (i, j), part in zip(places, jnp.split(together, ends[:-1]), strict=True):
            out[i][j] = part
    return out


@partial(jax.jit, static_argnums=0)
def _new_factors(
    side: int,
    matrices: Sequence[Matrix],
    stacks: Sequence[_Stack],
    others: Sequence[Array],
    inverses: Sequence[Array],
) -> list[Array]:
    """a^T (side 0) or b (side 1), from the other factors and the inverses of their Gram matrices."""
    new = []
    products = _weighted_products(matrices, stacks, others)
    for stack, other, solver, product in zip(stacks, others, inverses, products, strict=True):
        anchor, measured = stack.anchor[side], _measured(side, stack, other)
        if stack.metric is not None:
            product = times_output(product, stack.inverse_metric[side])
        drift = matmul(measured, transpose(other - stack.weight * stack.anchor[1 - side]), HIGHEST)
        residual = product - matmul(drift, anchor, HIGHEST) - stack.shrinkage * anchor
        new.append(anchor + matmul(solver, residual, HIGHEST))
    return new


def _weighted_products(matrices, stacks, thins):
    """sum_i c_i thin T_i for each stack, with its own thin matrices, in one pass over each T_i."""
    totals = [jnp.zeros((), thin.dtype) for thin in thins]
    for i, matrix in enumerate(matrices):
        users = [p for p, stack in enumerate(stacks) if stack.coefficients[i] is not None]
        rows = [_as_rows(thins[p]) for p in users]
        ends = list(itertools.accumulate(z.shape[-2] for z in rows))
        parts = jnp.split(left_product(jnp.concatenate(rows, axis=-2), matrix), ends[:-1], axis=-2)
        for p, part in zip(users, parts, strict=True):
            part = part.reshape(*part.shape[:-2], len(thins[p]), -1, part.shape[-1])
            totals[p] += stacks[p].coefficients[i] * jnp.moveaxis(part, -3, 0).astype(thins[p].dtype)
    return totals


def _as_rows(thin: Float[Array, "S *batch r m"]) -> Float[Array, "*batch S*r m"]:
    thin = jnp.moveaxis(thin, 0, -3)
    return thin.reshape(*thin.shape[:-3], -1, thin.shape[-1])


def inverse(gram: Float[Array, "*batch r r"], regularization: Any) -> Float[Array, "*batch r r"]:
    """(gram + regularization I)^-1 of a Gram matrix; the pseudo-inverse where regularization is None.

    Finite for every finite Gram matrix. Rounding leaves the small eigenvalues of a float32 Gram matrix
    undetermined to eps times the largest, so directions below that are cut off (pseudo-inverse) or
    floored (Cholesky of the matrix scaled to a unit diagonal). One Newton step takes the floor's bias out
    of all directions that are determined.
    """
    r = gram.shape[-1]
    eps, tiny = jnp.finfo(gram.dtype).eps, jnp.finfo(gram.dtype).tiny
    if regularization is None:
        values, vectors = jnp.linalg.eigh(gram)
        kept = values > jnp.maximum(r * eps * values[..., -1:], tiny)
        reciprocals = jnp.where(kept, 1 / jnp.where(kept, values, 1), 0)
        return matmul(vectors * reciprocals[..., None, :], transpose(vectors), HIGHEST)
    eye = jnp.broadcast_to(jnp.eye(r, dtype=gram.dtype), gram.shape)
    matrix = gram + jnp.asarray(regularization, gram.dtype) * eye
    diagonal = jnp.sum(matrix * eye, axis=-1)
    # Not `diagonal > tiny`, so that a NaN stays one and is seen.
    root = jnp.where(diagonal <= tiny, 0, jax.lax.rsqrt(jnp.where(diagonal <= tiny, 1, diagonal)))
    unit = matrix * root[..., :, None] * root[..., None, :]
    factor = jax.lax.linalg.cholesky(unit + 8 * r * eps * eye, symmetrize_input=False)
    half = jax.lax.linalg.triangular_solve(factor, eye, left_side=True, lower=True)
    guess = matmul(transpose(half), half, HIGHEST)
    guess = guess + matmul(guess, eye - matmul(unit, guess, HIGHEST), HIGHEST)
    return guess * root[..., :, None] * root[..., None, :]
