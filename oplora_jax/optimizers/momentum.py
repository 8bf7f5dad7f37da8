"""The low-rank momentum that several optimizers keep."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from oplora_jax.matrix import LowRank, compute_dtype, from_unit_scale, is_low_rank
from oplora_jax.optimizers._lift import is_zero, map_lora
from oplora_jax.optimizers.finite import Checked
from oplora_jax.problems import Problem, Rule, solve_problems


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
    a = column + jax.random.normal(key, (*batch, n, rank), compute_dtype(param.a))
    b = row + jnp.zeros((*batch, rank, 1), param.b.dtype)
    return from_unit_scale(LowRank(a, b), param)


def momentum_rule(decay: Any, share: Any, regularization: Any) -> Rule:
    """That of the sum (decay, momentum), (share, gradient), the second one of a problem."""
    # The authors' code adds 1e-6 to the diagonal of every Gram matrix. It shows in the momentum alone,
    # which starts at zero: at most 0.2 % of the regularization, so that a step of size 0 changes nothing.
    shrinkage = 0.0 if is_zero(regularization) else jnp.minimum(1e-6, 2e-3 * regularization)
    return Rule([0.0, decay], [share], regularization, shrinkage, balanced=True)


def take_steps(
    rules: Sequence[Rule], problem_of: Callable[..., Problem], num_iters: Any, params: Any, *rest: Any
) -> tuple[Checked, Any]:
    """Solves one problem for each LoRA parameter.

    Args:
      rules: of the new weights and, if there is one, the new momentum.
      problem_of: the problem of one parameter, with these two sums. Called with the parameter and what stands
        there in `rest`.
      num_iters: as for `lorsum`.
      params: a tree of parameters.
      rest: trees like it.

    Returns:
      The increments of the parameters with what is known of them, and the new momenta, None where there is
      none: two trees.
    """
    nodes, treedef = jax.tree.flatten(params, is_leaf=is_low_rank)
    rest = [treedef.flatten_up_to(tree) for tree in rest]
    problems = [problem_of(*arguments) for arguments in zip(nodes, *rest, strict=True)]
    solved = solve_problems(rules, problems, num_iters=num_iters)
    updates = [z.changes[0] for z in solved]
    moments = [z.sums[1] if len(z.sums) > 1 else None for z in solved]
    finite = treedef.unflatten(z.finite for z in solved)
    return Checked(treedef.unflatten(updates), finite), treedef.unflatten(moments)
