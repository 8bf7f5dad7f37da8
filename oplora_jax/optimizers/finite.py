"""A step that would not be finite is not taken."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from oplora_jax.matrix import LowRank, is_low_rank


class Checked(NamedTuple):
    """Updates from an optimizer that has seen for itself, more cheaply, whether they are finite."""

    updates: Any
    finite: Any  # at each LoRA parameter, bool (): of its update and of the `LowRank` nodes of its new state


def skip_nonfinite(tx: Any, updates: Any, state: Any, old_state: Any) -> tuple[Any, Any, Array]:
    """Zero updates and the old state for the LoRA parameters with a non-finite update or state.

    Args:
      tx: the optimizer, of LoRA parameters alone.
      updates: what it returned, or `Checked`.
      state: what it returned.
      old_state: the state before.

    Returns:
      The updates, the state, and for how many parameters they are not what `tx` returned.
    """
    updates, known = updates if isinstance(updates, Checked) else (updates, None)
    nodes, treedef = jax.tree.flatten(updates, is_leaf=is_low_rank)
    owners = treedef.unflatten(range(len(nodes)))
    # Which parameter each array of the state belongs to; None for counters and the like. A node may hold
    # the state of one factor alone.
    owner_of = optax.tree.map_params(
        tx,
        lambda node, owner: jax.tree.map(lambda _: _Owner(owner, isinstance(node, LowRank)), node),
        state,
        owners,
        transform_non_params=lambda _: _Owner(None, False),
        is_leaf=lambda node: isinstance(node, LowRank),
    )
    owned = jax.tree.leaves(owner_of, is_leaf=lambda node: isinstance(node, _Owner))
    finite = [jnp.array(True)] * len(nodes) if known is None else treedef.flatten_up_to(known)
    arrays = [(_Owner(i, True), array) for i, node in enumerate(nodes) for array in jax.tree.leaves(node)]
    for owner, array in [*arrays, *zip(owned, jax.tree.leaves(state), strict=True)]:
        # What was finite in the type of the solves may not be in a narrow one.
        seen = known is not None and owner.low_rank and jnp.finfo(array.dtype).bits >= 32
        if owner.index is not None and not seen:
            finite[owner.index] &= jnp.sum(array * 0) == 0  # one pass
    keep = lambda index, new, old: new if index is None else jax.lax.select(finite[index], new, old)
    kept = [
        keep(owner.index, new, old)
        for owner, new, old in zip(owned, jax.tree.leaves(state), jax.tree.leaves(old_state), strict=True)
    ]
    updates = treedef.unflatten(
        jax.tree.map(lambda u, i=i: keep(i, u, jnp.zeros_like(u)), node) for i, node in enumerate(nodes)
    )
    skipped = jnp.sum(~jnp.asarray(finite, bool), dtype=jnp.int32)
    return updates, jax.tree.unflatten(jax.tree.structure(state), kept), skipped


class _Owner:
    """A leaf that names the parameter an array of the state belongs to."""

    def __init__(self, index: int | None, low_rank: bool):
        self.index, self.low_rank = index, low_rank
