"""The low-rank momentum that several optimizers keep."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from oplora_jax.lorsum import Problem, Sum, solve_problems
from oplora_jax.matrix import LowRank, Matrix, is_low_rank, share_scale, solve_dtype
from oplora_jax.optimizers.low_rank import difference, is_zero, map_lora


def init_momentum(params: Any, seed: Any, rank: Any = None) -> Any:
    """A momentum of zero for each LoRA parameter, of its rank if None: a tree of `LowRank` nodes."""
    number = len(jax.tree.leaves(params, is_leaf=is_low_rank))
    keys = iter(jax.random.split(jax.random.key(seed), number or 1))
    return map_lora(lambda param: (_random_start(next(keys), param, rank),), 1, params)[0]


def _random_start(key, param, rank):
    """A zero momentum whose left factor is normal, at scale 1 of unit variance."""
    (*batch, n, _), rank = param.shape, param.a.shape[-1] if rank is None else int(rank)
    # Built on zeros made from the parameter, for its sharding.
    column, row = jnp.zeros_like(param.a[..., :1]), jnp.zeros_like(param.b[..., :1, :])
    # Drawn in the type of the solves and then rounded, so that every type starts from the same numbers.
    a = column + jax.random.normal(key, (*batch, n, rank), solve_dtype(param.a))
    b = row + jnp.zeros((*batch, rank, 1), param.b.dtype)
    return share_scale(LowRank(a, b), param)


def with_momentum(
    gradient: Matrix, momentum: LowRank, weights: Sum, decay: Any, share: Any, regularization: Any
) -> Problem:
    """The new weights, a sum over [gradient, momentum], and the new momentum, in one pass over the gradient.

    The momentum is LoRSum[(decay, momentum), (share, gradient)].
    """
    # The authors' code adds 1e-6 to the diagonal of every Gram matrix. It shows in the momentum alone,
    # which starts at zero: at most 0.2 % of the regularization, so that a step of size 0 changes nothing.
    shrinkage = 0.0 if is_zero(regularization) else jnp.minimum(1e-6, 2e-3 * regularization)
    moments = Sum(decay, momentum, [share, None], regularization, shrinkage)
    return Problem([gradient, momentum], [weights, moments])


def take_steps(
    problem_of: Callable[..., Problem], num_iters: Any, params: Any, *rest: Any
) -> tuple[Any, Any]:
    """Solves one problem for each LoRA parameter.

    Args:
      problem_of: the problem of one parameter, whose first sum is the new weights and whose second one, if
        there is one, the new momentum. Called with the parameter and what stands there in `rest`.
      num_iters: as for `lorsum`.
      params: a tree of parameters.
      rest: trees like it.

    Returns:
      The increments of the parameters, and the new momenta, None where there is none: two trees.
    """
    nodes, treedef = jax.tree.flatten(params, is_leaf=is_low_rank)
    rest = [treedef.flatten_up_to(tree) for tree in rest]
    problems = [problem_of(*arguments) for arguments in zip(nodes, *rest, strict=True)]
    solved = solve_problems(problems, num_iters=num_iters)
    updates = [difference(new, param) for (new, *_), param in zip(solved, nodes, strict=True)]
    moments = [_rebalance(*moment) if moment else None for _, *moment in solved]
    return treedef.unflatten(updates), treedef.unflatten(moments)


def _rebalance(moment: LowRank) -> LowRank:
    """The same matrix, with the norm of a not below that of b.

    The decay by mu falls on the factor that is solved first, and the other one grows in return. Left alone,
    a would vanish like mu^k, until the regularization outweighed it and froze b.
    """
    norm = lambda z: jnp.linalg.norm(z.astype(solve_dtype(z)), axis=(-2, -1), keepdims=True)
    left, right = norm(moment.a), norm(moment.b)
    smaller = (left > 0) & (left < right)
    root = jnp.sqrt(jnp.where(smaller, right / jnp.where(smaller, left, 1), 1))
    balanced = LowRank(moment.a * root, moment.b / root, moment.scale)
    return jax.tree.map(lambda new, old: new.astype(old.dtype), balanced, moment)
