"""Many LoRSums at once: those of all LoRA parameters of a model."""

import functools
import itertools
import operator
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from oplora_jax.inverse import inverse
from oplora_jax.matrix import (
    HIGHEST,
    LowRank,
    Matrix,
    absorb_scale,
    left_product,
    matmul,
    share_scale,
    solve_dtype,
    transpose,
    transposed,
)
from oplora_jax.metrics import KroneckerMetric, times_output


class Sum(NamedTuple):
    """One of several sums over the same matrices."""

    weight: Any  # the anchor's coefficient
    anchor: LowRank
    coefficients: Sequence[Any]  # one for each of the matrices; None where the sum lacks it
    regularization: Any = 0.0
    shrinkage: Any = 0.0  # added to the Gram matrices as well, but pulls towards zero, not the anchor
    metric: KroneckerMetric | None = None
    inverse_metric: KroneckerMetric | None = None
    balanced: Any = None  # True for factors of equal norms where that of a would be below that of b


class Problem(NamedTuple):
    """Several LoRSums over the same matrices, each of which is passed over once for all of them."""

    matrices: Sequence[Matrix]  # the terms besides the anchors
    sums: Sequence[Sum]


class Solution(NamedTuple):
    """What a problem comes to."""

    sums: list[LowRank]  # each with the anchor's shapes, types and scale
    finite: Array  # bool (): whether the norms of all factors are, before the factors take these types


def solve_problems(problems: Sequence[Problem], *, num_iters: Any = 1, first: str = "a") -> list[Solution]:
    """LoRSums of several matrices: of all LoRA parameters of a model.

    In a single iteration, without metrics, the small solves of all problems are done together. Otherwise the
    matrices of each would wait in memory for all others, and the problems are solved one after the other.

    Args:
      problems: what is to be solved.
      num_iters: as for `lorsum`.
      first: as for `lorsum`.

    Returns:
      A solution for each problem.
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
        Solution([share_scale(*z) for z in zip(new, [total.anchor for total in sums], strict=True)], finite)
        for (new, finite), (_, sums) in zip(solved, problems, strict=True)
    ]


def _checked(total: Sum) -> Sum:
    """The sum, with a regularization of None, for pseudo-inverses, where it is known to be zero.

    A traced zero is left to the floor in `inverse`.
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

    weight: Array  # (S,), as the other numbers
    anchor: tuple[Array, Array]  # a^T (S, *batch, r, n) and b (S, *batch, r, m)
    coefficients: Sequence[Any]  # None where none of the sums has the matrix
    regularization: Any  # None for pseudo-inverses
    shrinkage: Array
    metric: KroneckerMetric | None
    inverse_metric: KroneckerMetric | None
    balanced: Any  # None where none of the sums is to be


def _solve(problems, *, num_iters, first):
    alike = [_alike(sums) for _, sums in problems]
    stacks = [_stacks(sums, indices) for (_, sums), indices in zip(problems, alike, strict=True)]
    matrices = [matrices for matrices, _ in problems]
    sides = [list(map(transposed, each)) for each in matrices], matrices

    def half_step(side, changes):
        """The changes of one factor of all stacks, a^T (0) or b (1), from the other one's."""
        systems = [_systems(side, *z) for z in zip(stacks, changes, strict=True)]
        inverses = _inverses(systems)
        return [_changes(side, *z) for z in zip(sides[side], stacks, changes, inverses, strict=True)]

    def iterate(_, changes):
        side = 0 if first == "a" else 1
        other = half_step(side, changes[1 - side])
        pair = other, half_step(1 - side, other)
        return pair if side == 0 else pair[::-1]

    def alternate(changes):
        return jax.lax.fori_loop(0, num_iters, iterate, changes)

    def jacobi(changes):
        return half_step(0, changes[1]), half_step(1, changes[0])

    def nothing(side):
        return [[jnp.zeros_like(stack.anchor[side]) for stack in of_one] for of_one in stacks]

    none = [[None] * len(of_one) for of_one in stacks]
    if not isinstance(num_iters, int):
        changes = jax.lax.cond(num_iters > 0, alternate, jacobi, (nothing(0), nothing(1)))
    elif num_iters > 1:
        changes = alternate((nothing(0), nothing(1)))
    else:
        changes = iterate(0, (none, none)) if num_iters else jacobi((none, none))
    return [_finish(*z) for z in zip(alike, stacks, *changes, strict=True)]


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


@partial(jax.jit, static_argnums=0)
def _finish(alike, stacks, *changes) -> Solution:
    """The sums in their order, and whether all of them are finite."""
    new, total = {}, 0.0
    for indices, stack, *of_both in zip(alike, stacks, *changes, strict=True):
        at, b = (_factor(side, stack, change) for side, change in enumerate(of_both))
        left, right = (jnp.sum(z * z, axis=(-2, -1)) for z in (at, b))
        total += jnp.sum(left + right)
        if stack.balanced is not None:
            to_a, to_b = _balance(stack.balanced, left, right)
            at, b = _times(to_a, at), _times(to_b, b)
        new |= {index: LowRank(transpose(at[place]), b[place]) for place, index in enumerate(indices)}
    return Solution([new[index] for index in range(len(new))], total < jnp.inf)


def _balance(chosen: Array, left: Array, right: Array) -> Float[Array, "2 S *batch"]:
    """What to multiply a and b with, so that the norm of a is not below that of b, in the chosen matrices.

    A momentum's decay by mu falls on the factor that is solved first, and the other one grows in return. Left
    alone, a would vanish like mu^k, until the regularization outweighed it and froze b.

    Args:
      chosen: bool (S,).
      left: the squared norms of a, (S, *batch), and
      right: those of b.
    """
    chosen = jax.lax.broadcast_in_dim(chosen, left.shape, [0])
    smaller = chosen & (left > 0) & (left < right) & (right < jnp.inf)
    ratios, limits = jnp.stack([right / left, left / right]), jnp.finfo(left.dtype)
    ratios = jnp.where(smaller, jax.lax.clamp(limits.tiny, ratios, 1 / limits.tiny), 1)
    return jnp.sqrt(jnp.sqrt(ratios))


def _stack(sums: Sequence[Sum]) -> _Stack:
    """Sums with their anchors at scale 1, and all of them in the type of the solves."""
    anchors = [absorb_scale(total.anchor) for total in sums]
    dtype = anchors[0].dtype
    numbers = lambda values: jnp.stack([jnp.asarray(z, dtype) for z in values])
    arrays = lambda trees: jax.tree.map(lambda *z: _stacked([w.astype(dtype) for w in z]), *trees)
    coefficients = [
        None if all(z is None for z in column) else numbers(0.0 if z is None else z for z in column)
        for column in zip(*(total.coefficients for total in sums), strict=True)
    ]
    exact, chosen = sums[0].regularization is None, [total.balanced is not None for total in sums]
    return _Stack(
        weight=numbers(total.weight for total in sums),
        anchor=arrays([(transpose(anchor.a), anchor.b) for anchor in anchors]),
        coefficients=coefficients,
        regularization=None if exact else numbers(total.regularization for total in sums),
        shrinkage=numbers(total.shrinkage for total in sums),
        metric=arrays([total.metric for total in sums]),
        inverse_metric=arrays([total.inverse_metric for total in sums]),
        balanced=np.asarray(chosen) if any(chosen) else None,
    )


def _stacked(arrays: Sequence[Array]) -> Array:
    """jnp.stack for finite arrays, as a sum: XLA makes several times as much code of a concatenation."""
    shape = len(arrays), *arrays[0].shape
    masks = np.eye(len(arrays), dtype=arrays[0].dtype)
    spread = (jax.lax.broadcast_in_dim(array, shape, range(1, len(shape))) for array in arrays)
    return functools.reduce(operator.add, map(_times, masks, spread))


def _times(numbers: Array | np.ndarray, arrays: Array) -> Array:
    """Each array along the first axes times its number. An axis of size 1 would cost more to compile."""
    return jax.lax.broadcast_in_dim(numbers, arrays.shape, range(np.ndim(numbers))) * arrays


# Solved for the change from the anchor: with d = a D_in (a - c_0 a_0)^T of a wide factor a, that of b is
# (a D_in a^T + lam I)^-1 (a D_in (S - c_0 P) - d b0). Nothing cancels where little changes, and a singular
# Gram matrix leaves the anchor's directions alone.
@partial(jax.jit, static_argnums=0)
def _systems(side: int, stacks: Sequence[_Stack], changes: Sequence[Any]) -> list[tuple[Array, Any]]:
    """The Gram matrices to invert for a^T (side 0) or b (side 1), and what is added to their diagonals.

    From the changes of the other factors, None before there are any.
    """
    systems = []
    for stack, change in zip(stacks, changes, strict=True):
        other = _factor(1 - side, stack, change)
        gram = matmul(other, transpose(_measured(side, stack, other)), HIGHEST)
        exact = stack.regularization is None
        systems.append((gram, None if exact else stack.regularization + stack.shrinkage))
    return systems


def _factor(side: int, stack: _Stack, change: Any) -> Array:
    return stack.anchor[side] if change is None else stack.anchor[side] + change


def _measured(side: int, stack: _Stack, other: Array) -> Array:
    return other if stack.metric is None else times_output(other, stack.metric[1 - side])


class _Inverses(NamedTuple):
    """The inverses of one stack's Gram matrices, among those of all layers."""

    of_all: Array  # (T, *batch, r, r)
    places: Any  # integers (S,); None for all of them

    def pick(self) -> Array:
        """By a gather, which is one kernel for all layers; slices would be one each to compile."""
        return self.of_all if self.places is None else jnp.take(self.of_all, self.places, axis=0, mode="clip")


def _inverses(systems: Sequence[Sequence[tuple[Array, Any]]]) -> list[list[_Inverses]]:
    """The inverses of all Gram matrices, those of one shape together."""
    groups: dict[Any, list[tuple[int, int]]] = {}
    for i, of_one in enumerate(systems):
        for j, (gram, added) in enumerate(of_one):
            groups.setdefault((gram.shape[1:], gram.dtype, added is None), []).append((i, j))
    out: list[list[Any]] = [[None] * len(of_one) for of_one in systems]
    for places in groups.values():
        grams, added = zip(*(systems[i][j] for i, j in places), strict=True)
        if len(places) == 1:
            [(i, j)] = places
            out[i][j] = _Inverses(inverse(grams[0], added[0]), None)
            continue
        added = None if added[0] is None else jnp.concatenate(added)
        of_all = inverse(jnp.concatenate(grams), added)
        ends = itertools.accumulate(map(len, grams), initial=0)
        for (i, j), (start, end) in zip(places, itertools.pairwise(ends), strict=True):
            out[i][j] = _Inverses(of_all, np.arange(start, end))
    return out


@partial(jax.jit, static_argnums=0)
def _changes(
    side: int,
    matrices: Sequence[Matrix],
    stacks: Sequence[_Stack],
    changes: Sequence[Any],
    inverses: Sequence[_Inverses],
) -> list[Array]:
    """Those of a^T (side 0) or b (side 1), from the other factors' and their inverse Gram matrices."""
    new = []
    others = [_factor(1 - side, *z) for z in zip(stacks, changes, strict=True)]
    products = _weighted_products(matrices, stacks, others)
    for stack, other, change, solver, product in zip(
        stacks, others, changes, inverses, products, strict=True
    ):
        anchor, measured = stack.anchor[side], _measured(side, stack, other)
        if stack.metric is not None:
            product = times_output(product, stack.inverse_metric[side])
        moved = _times(1 - stack.weight, stack.anchor[1 - side])
        moved = moved if change is None else moved + change
        drift = matmul(measured, transpose(moved), HIGHEST)
        residual = product - matmul(drift, anchor, HIGHEST) - _times(stack.shrinkage, anchor)
        new.append(matmul(solver.pick(), residual, HIGHEST))
    return new


def _weighted_products(matrices, stacks, thins):
    """sum_i c_i thin T_i for each stack, with its own thin matrices, in one pass over each T_i."""
    totals = [[] for _ in thins]
    for i, matrix in enumerate(matrices):
        users = [p for p, stack in enumerate(stacks) if stack.coefficients[i] is not None]
        rows = [_as_rows(thins[p]) for p in users]
        ends = list(itertools.accumulate(z.shape[-2] for z in rows))
        parts = jnp.split(left_product(jnp.concatenate(rows, axis=-2), matrix), ends[:-1], axis=-2)
        for p, part in zip(users, parts, strict=True):
            part = part.reshape(*part.shape[:-2], len(thins[p]), -1, part.shape[-1])
            part = jnp.moveaxis(part, -3, 0).astype(thins[p].dtype)
            totals[p].append(_times(stacks[p].coefficients[i], part))
    nothing = [jnp.zeros((), thins[0].dtype)]
    return [functools.reduce(operator.add, parts or nothing) for parts in totals]


def _as_rows(thin: Float[Array, "S *batch r m"]) -> Float[Array, "*batch S*r m"]:
    thin = jnp.moveaxis(thin, 0, -3)
    return thin.reshape(*thin.shape[:-3], -1, thin.shape[-1])
