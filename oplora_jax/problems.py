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

from oplora_jax.matrix import (
    HIGHEST,
    LowRank,
    Matrix,
    from_unit_scale,
    left_product,
    matmul,
    to_unit_scale,
    transpose,
    transposed,
)
from oplora_jax.metrics import KroneckerMetric, times_output
from oplora_jax.solve import inverse


class Rule(NamedTuple):
    """The numbers of one of the sums of a problem."""

    anchors: Sequence[Any]  # the coefficients of the anchors of all sums
    matrices: Sequence[Any]  # those of the matrices
    regularization: Any = 0.0
    shrinkage: Any = 0.0  # added to the Gram matrices as well, but pulls towards zero, not the anchor
    balanced: bool = False  # whether the norm of a is not to be below that of b


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
    """What a problem comes to, with the anchors' shapes, types and scales."""

    sums: list[LowRank]
    changes: list[LowRank]  # from the anchors' factors to those of the sums, before these are balanced
    finite: Array  # bool (): whether the norms of all factors are, before the factors take these types


def solve_problems(
    rules: Sequence[Rule], problems: Sequence[Problem], *, num_iters: Any = 1, first: str = "a"
) -> list[Solution]:
    """LoRSums of several matrices: of all LoRA parameters of a model.

    The factors of a problem's sums are stacked: F has the rows of all a^T, or of all b, one sum below the
    other. A half-step adds A F + sum_i B_i F' T_i, with F' the other stack, T_i the matrices, and A and B_i
    small and square: those of all problems are made together.

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
    solve = _solve_static if static else _solve
    balanced = tuple(rule.balanced for rule in rules)
    rules = [_checked(rule) for rule in rules]
    return solve(rules, problems, num_iters=num_iters, first=first, balanced=balanced)


def _checked(rule: Rule) -> Rule:
    """The rule, with a regularization of None, for pseudo-inverses, where it is known to be zero.

    A traced zero is left to the floor in `inverse`.
    """
    reg = rule.regularization
    known = isinstance(reg, int | float)
    if known and reg < 0:
        raise ValueError(f"regularization is {reg}; expected a non-negative number")
    return rule._replace(regularization=None if known and reg == 0 else reg, balanced=None)


class _Stack(NamedTuple):
    """The sums of one problem: rows of all of them, R in all."""

    factors: tuple[Array, Array]  # a^T (*batch, R, n) and b (*batch, R, m), of the anchors
    metrics: list[KroneckerMetric | None]
    inverse_metrics: list[KroneckerMetric | None]


def _solve(rules, problems, *, num_iters, first, balanced):
    stacks = [_stack(sums) for _, sums in problems]
    ranks = [tuple(total.anchor.a.shape[-1] for total in sums) for _, sums in problems]
    matrices = [list(matrices) for matrices, _ in problems]
    sides = [list(map(transposed, each)) for each in matrices], matrices

    def half_step(side, changes):
        """The changes of one factor of all stacks, a^T (0) or b (1), from the other one's."""
        grams = [_grams(side, *z) for z in zip(ranks, stacks, changes, strict=True)]
        steps = _steps(rules, ranks, grams)
        return [_change(side, *z) for z in zip(ranks, sides[side], stacks, changes, steps, strict=True)]

    def iterate(_, changes):
        side = 0 if first == "a" else 1
        other = half_step(side, changes[1 - side])
        pair = other, half_step(1 - side, other)
        return pair if side == 0 else pair[::-1]

    def alternate(changes):
        return jax.lax.fori_loop(0, num_iters, iterate, changes)

    def jacobi(changes):
        return half_step(0, changes[1]), half_step(1, changes[0])

    nothing = tuple([jnp.zeros_like(stack.factors[side]) for stack in stacks] for side in (0, 1))
    none = ([None] * len(stacks),) * 2
    if not isinstance(num_iters, int):
        changes = jax.lax.cond(num_iters > 0, alternate, jacobi, nothing)
    elif num_iters > 1:
        changes = alternate(nothing)
    else:
        changes = iterate(0, none) if num_iters else jacobi(none)
    anchors = [[total.anchor for total in sums] for _, sums in problems]
    return [_finish(balanced, *z) for z in zip(anchors, stacks, *changes, strict=True)]


_solve_static = jax.jit(_solve, static_argnames=("num_iters", "first", "balanced"))


# Compiled by themselves, the parts of a problem are traced once for all layers of a shape.
@jax.jit
def _stack(sums: Sequence[Sum]) -> _Stack:
    """The anchors at scale 1, and all arrays in the type of the solves."""
    anchors = [to_unit_scale(total.anchor) for total in sums]
    dtype = jnp.result_type(*(anchor.dtype for anchor in anchors))
    cast = lambda tree: jax.tree.map(lambda z: z.astype(dtype), tree)
    return _Stack(
        factors=(
            _joined(cast([transpose(anchor.a) for anchor in anchors])),
            _joined(cast([anchor.b for anchor in anchors])),
        ),
        metrics=cast([total.metric for total in sums]),
        inverse_metrics=cast([total.inverse_metric for total in sums]),
    )


# Solved for the change from the anchor: with d = a D_in (a - c_0 a_0)^T of a wide factor a, that of b is
# (a D_in a^T + lam I)^-1 (a D_in (S - c_0 P) - d b0). Nothing cancels where little changes, and a singular
# Gram matrix leaves the anchor's directions alone.
class _Grams(NamedTuple):
    """Products, R x R, of the factor that is not solved for: in its metric, but for `others`."""

    gram: Array  # with itself
    drift: Any  # with its change; None before there is one
    others: Any  # with the anchors, not in the metric; None of a single sum, and without a metric


@partial(jax.jit, static_argnums=(0, 1))
def _grams(side: int, ranks: tuple[int, ...], stack: _Stack, change: Any) -> _Grams:
    """From the change of the other factor, None before there is any, for a half-step of a^T (0) or b (1)."""
    anchor, product = stack.factors[1 - side], lambda x, y: matmul(x, transpose(y), HIGHEST)
    other = anchor if change is None else anchor + change
    measured = _in_metric(other, [metric and metric[1 - side] for metric in stack.metrics], ranks)
    drift = None if change is None else product(measured, change)
    plain = measured is other or len(ranks) == 1
    return _Grams(product(measured, other), drift, None if plain else product(other, anchor))


def _in_metric(factor: Array, metrics: Sequence[Any], ranks: Sequence[int]) -> Array:
    """The rows of each sum times its side of a metric, if it has one."""
    if all(side is None for side in metrics):
        return factor
    parts = zip(_parts(factor, ranks), metrics, strict=True)
    return _joined([z if side is None else times_output(z, side) for z, side in parts])


def _joined(parts: Sequence[Array]) -> Array:
    """The rows of all, as a sum: XLA compiles each concatenation anew, but one of several equal sums."""
    sizes = [part.shape[-2] for part in parts]
    ends = list(itertools.accumulate(sizes))
    padded = []
    for part, size, end in zip(parts, sizes, ends, strict=True):
        around = [(0, 0, 0)] * (part.ndim - 2) + [(end - size, ends[-1] - end, 0), (0, 0, 0)]
        padded.append(jax.lax.pad(part, jnp.zeros((), part.dtype), around))
    return functools.reduce(operator.add, padded)


def _parts(rows: Array, ranks: Sequence[int]) -> list[Array]:
    """The rows of each sum."""
    return jnp.split(rows, list(itertools.accumulate(ranks))[:-1], axis=-2)


def _steps(rules: Sequence[Rule], ranks: Sequence[tuple[int, ...]], grams: Sequence[_Grams]) -> list[Array]:
    """The half-steps of all problems, those of one structure together."""
    groups: dict[Any, list[int]] = {}
    for place, (of_sums, one) in enumerate(zip(ranks, grams, strict=True)):
        kind = of_sums, one.gram.shape, one.gram.dtype, jax.tree.structure(one)
        groups.setdefault(kind, []).append(place)
    steps: list[Any] = [None] * len(grams)
    for (of_sums, *_), places in groups.items():
        some = [grams[place] for place in places]
        if len(places) == 1:
            steps[places[0]] = _step(of_sums, rules, some[0])
            continue
        together = _step(of_sums, rules, jax.tree.map(lambda *z: jnp.stack(z), *some))
        shape = together.shape[1:]
        rows = together.reshape(-1, shape[-1])
        chosen = np.arange(len(rows)).reshape(len(places), -1, 1)
        for index, place in enumerate(places):
            # Gathered, by one kernel for all layers. Slices would be one each to compile.
            steps[place] = jnp.take(rows, chosen[index], axis=0, mode="clip").reshape(shape)
    return steps


def _step(ranks: Sequence[int], rules: Sequence[Rule], grams: _Grams) -> Float[Array, "*batch R C"]:
    """What to multiply the factor and its products with the matrices with, for its change.

    Its columns are those for the factor, for each matrix and, with a metric, for the other sums' anchors.
    """
    gram, drift, others = grams
    block = np.repeat(range(len(ranks)), ranks)
    same = block[:, None] == block
    over = lambda z: jax.lax.broadcast_in_dim(z, gram.shape, range(gram.ndim)[-z.ndim :])
    spread = lambda some: jnp.stack([jnp.asarray(z, gram.dtype) for z in some])[block]
    anchors = jnp.stack([spread(rule.anchors) for rule in rules])[block]
    own = over(anchors - same) * (gram if drift is None else gram - drift)
    own = own - over(jnp.diag(spread(rule.shrinkage for rule in rules)))
    own = own if drift is None else own - jnp.where(over(same), drift, 0)
    of_matrices = zip(*(rule.matrices for rule in rules), strict=True)
    columns = [own, *(over(jnp.diag(spread(column))) for column in of_matrices)]
    if others is not None:
        columns[0] = jnp.where(over(same), own, 0)
        columns.append(jnp.where(over(same), 0, over(anchors) * others))
    return _solve_blocks(ranks, rules, gram, jnp.concatenate(columns, axis=-1))


def _solve_blocks(ranks: Sequence[int], rules: Sequence[Rule], gram: Array, right: Array) -> Array:
    """The inverse of each sum's Gram matrix, on the diagonal, times its rows; those of a kind together."""
    kind = lambda p: (ranks[p], rules[p].regularization is None)
    solved, start = [], 0
    for (rank, exact), members in itertools.groupby(range(len(ranks)), kind):
        members = list(members)
        stop = start + rank * len(members)
        ridge = None
        if not exact:
            numbers = (rules[p].regularization + rules[p].shrinkage for p in members)
            ridge = jnp.stack([jnp.asarray(z, gram.dtype) for z in numbers])
        blocks = [gram[..., at : at + rank, at : at + rank] for at in range(start, stop, rank)]
        inverses = inverse(jnp.stack(blocks, axis=-3), ridge)
        rows = right[..., start:stop, :]
        found = matmul(inverses, rows.reshape(*inverses.shape[:-1], -1), HIGHEST)
        solved.append(found.reshape(rows.shape))
        start = stop
    return jnp.concatenate(solved, axis=-2)


@partial(jax.jit, static_argnums=(0, 1))
def _change(
    side: int, ranks: Sequence[int], matrices: Sequence[Matrix], stack: _Stack, change: Any, step: Array
) -> Array:
    """That of a^T (side 0) or b (side 1), from the other factor's."""
    anchor, other = stack.factors[side], stack.factors[1 - side]
    other = other if change is None else other + change
    products = [left_product(other, matrix).astype(anchor.dtype) for matrix in matrices]
    multiply = lambda step, *rows: matmul(step, _joined(rows), HIGHEST)
    in_metric = lambda rows: _in_metric(rows, [z and z[side] for z in stack.inverse_metrics], ranks)
    if step.shape[-1] == (1 + len(products)) * anchor.shape[-2]:
        return multiply(step, anchor, *map(in_metric, products))
    own, rest = jnp.split(step, [anchor.shape[-2]], axis=-1)
    return multiply(own, anchor) + in_metric(multiply(rest, *products, anchor))


@partial(jax.jit, static_argnums=0)
def _finish(balanced: Sequence[bool], anchors: Sequence[LowRank], stack: _Stack, *changes: Array) -> Solution:
    """The sums, and whether all of them are finite."""
    ranks = [anchor.a.shape[-1] for anchor in anchors]
    factors = [z + change for z, change in zip(stack.factors, changes, strict=True)]
    left, right = (_squares(z, ranks) for z in factors)
    sums = []
    for p, (at, b, anchor) in enumerate(zip(*(_parts(z, ranks) for z in factors), anchors, strict=True)):
        if balanced[p]:
            to_a, to_b = _balance(left[..., p], right[..., p])[..., None, None]
            at, b = to_a * at, to_b * b
        sums.append(from_unit_scale(LowRank(transpose(at), b), anchor))
    changes = [
        from_unit_scale(LowRank(transpose(at), b), anchor)
        for at, b, anchor in zip(*(_parts(change, ranks) for change in changes), anchors, strict=True)
    ]
    # Not jnp.sum, which the compiler would not compute where it is used.
    total = sum(jnp.sum((left + right)[..., p]) for p in range(len(ranks)))
    return Solution(sums, changes, total < jnp.inf)


def _squares(factor: Array, ranks: Sequence[int]) -> Float[Array, "*batch P"]:
    """The squared norm of the rows of each sum."""
    norms = lambda z: jnp.sum(jnp.square(z), axis=(-2, -1))
    if len(set(ranks)) == 1:
        *batch, rows, size = factor.shape
        return norms(factor.reshape(*batch, len(ranks), rows // len(ranks), size))
    return jnp.stack([norms(part) for part in _parts(factor, ranks)], axis=-1)


def _balance(left: Float[Array, "*batch"], right: Float[Array, "*batch"]) -> Float[Array, "2 *batch"]:
    """What to multiply a and b with, so that the norm of a is not below that of b.

    A momentum's decay by mu falls on the factor that is solved first, and the other one grows in return. Left
    alone, a would vanish like mu^k, until the regularization outweighed it and froze b.

    Args:
      left: the squared norm of a, and
      right: that of b.
    """
    limit = 1 / jnp.finfo(left.dtype).tiny
    ratio = jax.lax.clamp(1.0, jnp.where(left > 0, right / left, 1.0), limit)
    return jnp.sqrt(jnp.sqrt(jnp.stack([ratio, 1 / ratio])))
