"""What Flax is to know of `LowRank` nodes: how `flax.serialization` and `nnx.Optimizer` keep them."""

from typing import Any

import jax
from flax import serialization
from flax.nnx import State, Variable

from oplora_jax.adapters.checks import refuse_old_names
from oplora_jax.matrix import LowRank


def _to_state(node: LowRank) -> dict[str, Any]:
    return {name: serialization.to_state_dict(getattr(node, name)) for name in "ab"}


def _from_state(node: LowRank, state: dict[str, Any]) -> LowRank:
    if set(state) != {"a", "b"}:
        at = f"{serialization.current_path()}: the state of a LowRank"
        raise ValueError(f"{at} has {', '.join(sorted(state)) or 'nothing'}; expected its factors a and b")
    restored = (serialization.from_state_dict(getattr(node, name), state[name], name=name) for name in "ab")
    return node.with_factors(*restored)


serialization.register_serialization_state(LowRank, _to_state, _from_state)

# Flax refuses a dict that lacks a name before it asks any handler of ours, which could say how to rename. So
# its own handler of dicts gets a check in front; there is no public way to ask Flax for that handler.
_to_dict, _from_dict = serialization._STATE_DICT_REGISTRY[dict]


def _checked_from_dict(target: dict[Any, Any], state: dict[str, Any]) -> dict[Any, Any]:
    if "lora" in target and "lora" not in state:
        refuse_old_names(state, serialization.current_path().split("/")[1:], "state")
    return _from_dict(target, state)


serialization.register_serialization_state(dict, _to_dict, _checked_from_dict, override=True)

# A `State` makes one of every dict in it, and `nnx.Optimizer.update` of every node of the optimizer's state,
# `LowRank` included: what comes back would not fit any more. So a variable that holds LoRA parameters takes
# the arrays alone out of a `State`, and keeps its nodes.
_set_raw_value = Variable.set_raw_value


def _keep_nodes(variable: Variable, value: Any, **options: Any) -> None:
    old = variable.get_raw_value()
    is_node = lambda z: isinstance(z, LowRank)
    if isinstance(value, State) and any(map(is_node, jax.tree.leaves(old, is_leaf=is_node))):
        value = jax.tree.map_with_path(lambda path, _: _at(value, path), old)
    _set_raw_value(variable, value, **options)


def _at(state: Any, path: Any) -> Any:
    for key in path:
        name = next(getattr(key, kind) for kind in ("key", "idx", "name") if hasattr(key, kind))
        state = getattr(state, name) if isinstance(state, LowRank) else state[name]
    return state


Variable.set_raw_value = _keep_nodes
