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


class Rule(NamedTuple):
    """The numbers of a sum of an anchor and other matrices, which may be one sum in each layer."""

    weight: Any  # the anchor's coefficient
    coefficients: Sequence[Any]  # one for each of the matrices; None where the sum lacks it
    regularization: Any = 0.0
    shrinkage: Any = 0.0  # added to the Gram matrices as well, but pulls towards zero, not the anchor
    balanced: Any = None  # True for factors of equal norms where that of a would be below that of b


class Sum(NamedTuple):
    """What one sum has for itself."""

    anchor: LowRank
    metric: KroneckerMetric | None = None
    inverse_metric: KroneckerMetric | None = None


class Problem(NamedTuple):
    """Several LoRSums over the same matrices, each of which is passed over once for all of them."""

    matrices: Sequence[Matrix]  # the terms besides the anchors
    sums: Sequence[Sum]


class Solution(NamedTuple):
    """What a problem comes to."""

    sums: list[LowRank]  # each with the anchor's shapes, types and scale
    finite: Array  # bool (): whether the norms of all factors are, before the factors take these types


def solve_problems(
    rules: Sequence[Rule], problems: Sequence[Problem], *, num_iters: Any = 1, first: str = "a"
) -> list[Solution]:
    """LoRSums of several matrices: of all LoRA parameters of a model.

    In a single iteration, without metrics, the small solves of all problems are done together. Otherwise the
    matrices of each would wait in memory for all others, and the problems are solved one after the other.

    Args:
      rules: one for each sum of a problem, the same for all problems.
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
    solve = partial(_solve_static if static else _solve, num_iters=num_iters, first=first)
    together = static and num_iters <= 1 and all(z.metric is None for _, sums in problems for z in sums)
    rules = list(map(_checked, rules))
    groups = [problems] if together else [[problem] for problem in problems]
    solved = [solution for group in groups for solution in solve(rules, group)]
    return [
        Solution([share_scale(*z) for z in zip(new, [total.anchor for total in sums], strict=True)], finite)
        for (new, finite), (_, sums) in zip(solved, problems, strict=True)
    ]


def _checked(rule: Rule) -> Rule:
    """The rule, with a regularization of None, for pseudo-inverses, where it is known to be zero.

    A traced zero is left to the floor in `inverse`.
    """
    reg = rule.regularization
    known = isinstance(reg, int | float)
    if known and reg < 0:
        raise ValueError(f"regularization is {reg}; expected a non-negative number")
    return rule._replace(regularization=None if known and reg == 0 else reg)


class _Numbers(NamedTuple):
    """Those of the rules of several sums, each of shape (S,)."""

    decay: Array  # 1 - the anchor's coefficient
    coefficients: Sequence[Any]  # None where none of the sums has the matrix
    ridge: Any  # regularization + shrinkage; None for pseudo-inverses
    shrinkage: Array
    balanced: Any  # bool; None where none of the sums is to be


class _Stack(NamedTuple):
    """Sums of one shape, along a new first axis of all arrays: one solve for all of them.

    Factors are wide here, a^T and b: the solve for a is that for b of the transposed problem.
    """

    anchor: tuple[Array, Array]  # a^T (S, *batch, r, n) and b (S, *batch, r, m)
    metric: KroneckerMetric | None
    inverse_metric: KroneckerMetric | None
    numbers: Any = None


def _solve(rules, problems, *, num_iters, first):
    alike = [_alike(rules, sums) for _, sums in problems]
    numbers: dict[Any, _Numbers] = {}
    stacks = []
    for (_, sums), groups in zip(problems, alike, strict=True):
        stacks.append([])
        for indices, stack in zip(groups, _stacks(sums, groups), strict=True):
            key = indices, stack.anchor[0].dtype
            if key not in numbers:
                numbers[key] = _numbers([rules[index] for index in indices], key[1])
            stacks[-1].append(stack._replace(numbers=numbers[key]))
    matrices = [matrices for matrices, _ in problems]
    sides = [list(map(transposed, each)) for each in matrices], matrices

    def half_step(side, changes):
        """The changes of one factor of all stacks, a^T (0) or b (1), from the other one's."""
        grams = [_grams(side, *z) for z in zip(stacks, changes, strict=True)]
        inverses = _inverses(stacks, grams)
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


def _alike(rules: Sequence[Rule], sums: Sequence[Sum]) -> tuple[tuple[int, ...], ...]:
    """The indices of sums that can be stacked with each other."""
    groups: dict[Any, list[int]] = {}
    for index, (rule, total) in enumerate(zip(rules, sums, strict=True)):
        shapes = total.anchor.a.shape, total.anchor.b.shape, solve_dtype(*jax.tree.leaves(total.anchor))
        kind = rule.regularization is None, jax.tree.structure(total.metric)
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
        if stack.numbers.balanced is not None:
            to_a, to_b = _balance(stack.numbers.balanced, left, right)
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
    chosen = jax.lax.broadcast_in_dim(chosen, left.shape, [0]) & (left > 0)
    ratios, limit = jax.lax.select(chosen, right / left, jnp.ones_like(left)), 1 / jnp.finfo(left.dtype).tiny
    ratios = jax.lax.clamp(1.0, ratios, limit)
    return jnp.sqrt(jnp.sqrt(jnp.stack([ratios, 1 / ratios])))


def _stack(sums: Sequence[Sum]) -> _Stack:
    """Sums with their anchors at scale 1, and all of them in the type of the solves."""
    anchors = [absorb_scale(total.anchor) for total in sums]
    dtype = anchors[0].dtype
    arrays = lambda trees: jax.tree.map(lambda *z: _stacked([w.astype(dtype) for w in z]), *trees)
    return _Stack(
        anchor=arrays([(transpose(anchor.a), anchor.b) for anchor in anchors]),
        metric=arrays([total.metric for total in sums]),
        inverse_metric=arrays([total.inverse_metric for total in sums]),
    )


def _numbers(rules: Sequence[Rule], dtype: Any) -> _Numbers:
    numbers = lambda values: jnp.stack([jnp.asarray(z, dtype) for z in values])
    coefficients = [
        None if all(z is None for z in column) else numbers(0.0 if z is None else z for z in column)
        for column in zip(*(rule.coefficients for rule in rules), strict=True)
    ]
    exact, balanced = rules[0].regularization is None, [rule.balanced is not None for rule in rules]
    return _Numbers(
        decay=numbers(1 - rule.weight for rule in rules),
        coefficients=coefficients,
        ridge=None if exact else numbers(rule.regularization + rule.shrinkage for rule in rules),
        shrinkage=numbers(rule.shrinkage for rule in rules),
        balanced=np.asarray(balanced) if any(balanced) else None,
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
def _grams(side: int, stacks: Sequence[_Stack], changes: Sequence[Any]) -> list[Array]:
    """The Gram matrices to invert for a^T (side 0) or b (side 1).

    From the changes of the other factors, None before there are any.
    """
    others = [_factor(1 - side, *z) for z in zip(stacks, changes, strict=True)]
    return [
        matmul(other, transpose(_measured(side, stack, other)), HIGHEST)
        for stack, other in zip(stacks, others, strict=True)
    ]


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


def _inverses(stacks: Sequence[Sequence[_Stack]], grams: Sequence[Sequence[Array]]) -> list[list[_Inverses]]:
    """The inverses of all Gram matrices, those of one shape together."""
    groups: dict[Any, list[tuple[int, int]]] = {}
    for i, of_one in enumerate(grams):
        for j, gram in enumerate(of_one):
            kind = gram.shape[1:], gram.dtype, stacks[i][j].numbers.ridge is None
            groups.setdefault(kind, []).append((i, j))
    out: list[list[Any]] = [[None] * len(of_one) for of_one in grams]
    for places in groups.values():
        of_group = [grams[i][j] for i, j in places]
        ridges = [stacks[i][j].numbers.ridge for i, j in places]
        if len(places) == 1:
            [(i, j)] = places
            out[i][j] = _Inverses(inverse(*of_group, *ridges), None)
            continue
        of_all = inverse(jnp.concatenate(of_group), None if ridges[0] is None else jnp.concatenate(ridges))
        ends = itertools.accumulate(map(len, of_group), initial=0)
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
        moved = _times(stack.numbers.decay, stack.anchor[1 - side])
        moved = moved if change is None else moved + change
        drift = matmul(measured, transpose(moved), HIGHEST)
        residual = product - matmul(drift, anchor, HIGHEST) - _times(stack.numbers.shrinkage, anchor)
        new.append(matmul(solver.pick(), residual, HIGHEST))
    return new


def _weighted_products(matrices, stacks, thins):
    """sum_i c_i thin T_i for each stack, with its own thin matrices, in one pass over each T_i."""
    totals = [[] for _ in thins]
    for i, matrix in enumerate(matrices):
        users = [p for p, stack in enumerate(stacks) if stack.numbers.coefficients[i] is not None]
        rows = [_as_rows(thins[p]) for p in users]
        ends = list(itertools.accumulate(z.shape[-2] for z in rows))
        parts = jnp.split(left_product(jnp.concatenate(rows, axis=-2), matrix), ends[:-1], axis=-2)
        for p, part in zip(users, parts, strict=True):
            part = part.reshape(*part.shape[:-2], len(thins[p]), -1, part.shape[-1])
            part = jnp.moveaxis(part, -3, 0).astype(thins[p].dtype)
            totals[p].append(_times(stacks[p].numbers.coefficients[i], part))
    nothing = [jnp.zeros((), thins[0].dtype)]
    return [functools.reduce(operator.add, parts or nothing) for parts in totals]


def _as_rows(thin: Float[Array, "S *batch r m"]) -> Float[Array, "*batch S*r m"]:
    thin = jnp.moveaxis(thin, 0, -3)
    return thin.reshape(*thin.shape[:-3], -1, thin.shape[-1])
