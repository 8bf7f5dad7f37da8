"""`LowRank` nodes in the checkpoints of `flax.serialization`, and through it of `TrainState`."""

from typing import Any

from flax import serialization

from oplora_jax.adapters.checks import refuse_old_names
from oplora_jax.matrix import LowRank

serialization.register_serialization_state(
    LowRank,
    lambda node: {name: serialization.to_state_dict(getattr(node, name)) for name in "ab"},
    lambda node, state: node.with_factors(
        *(serialization.from_state_dict(getattr(node, name), state[name], name=name) for name in "ab")
    ),
)

# Flax refuses a dict that lacks a name before it asks any handler of ours, which could say how to rename. So
# its own handler of dicts gets a check in front; there is no public way to ask Flax for that handler.
_to_dict, _from_dict = serialization._STATE_DICT_REGISTRY[dict]


def _checked_from_dict(target: dict[Any, Any], state: dict[str, Any]) -> dict[Any, Any]:
    if "lora" in target and "lora" not in state:
        refuse_old_names(state, serialization.current_path().split("/")[1:], "state")
    return _from_dict(target, state)


serialization.register_serialization_state(dict, _to_dict, _checked_from_dict, override=True)
