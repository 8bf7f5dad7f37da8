"""ResLoRA (https://arxiv.org/abs/2402.18039) for linen: residual paths between layers' LoRA parameters."""

import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any, no_type_check

import flax.linen as nn
import jax
from flax.core import meta
from jaxtyping import Array

from oplora_jax.adapters.checks import refuse_old_names
from oplora_jax.adapters.init import init_beside
from oplora_jax.adapters.reslora import SHORTCUTS, add_increments, add_inputs, check, merge_block
from oplora_jax.linen.apply import WithLoRA, param_of, promoted, refuse_computed_kernel
from oplora_jax.linen.parameters import map_layers, merge_layer
from oplora_jax.matrix import LowRank


@no_type_check
class BlockShortcutDense(WithLoRA, nn.Dense, kw_only=True):
    r"""`LoRADense` whose inputs go through the LoRA increments of layers before it too, while it trains.

    Its own LoRA parameter is `block_lora`. The exact gradient of an increment adds up over the layers that
    use it: it is an array. Other attributes are those of `LoRADense`.

    Attributes:
      previous: the layers whose increments it shares, of shape (n, m), called before it in the same model: at
        layer l of a stack, with shortcuts over k layers, `layers[max(0, l - k + 1) : l]`.

    Raises:
      ValueError: a previous layer without an increment, or with one of another shape; a rank out of range.

    It computes $y = x\,(W + \sum_i s_i\,a_i b_i) + \text{bias}$, over the previous layers' increments and its
    own.

    From [ResLoRA](https://arxiv.org/abs/2402.18039).

    Examples:
      >>> import flax.linen as nn
      >>> import jax, jax.numpy as jnp
      >>> from oplora_jax.linen import BlockShortcutDense, LoRADense
      >>> first = LoRADense(4, rank=2)
      >>> model = nn.Sequential([first, nn.tanh, BlockShortcutDense(4, rank=2, previous=[first])])
      >>> params = model.init(jax.random.key(0), jnp.ones((5, 4)))["params"]
      >>> {name: sorted(layer) for name, layer in params.items()}
      {'layers_0': ['bias', 'kernel', 'lora'], 'layers_2': ['bias', 'block_lora', 'kernel']}
    """

    previous: Sequence[nn.Module]

    @nn.compact
    def __call__(self, inputs: Any) -> Array:
        y, own = super().__call__(inputs), _own(self, "block_lora")
        loras = [*map(_of, self.previous), own]
        check(own.shape, loras)
        return add_increments(y, promoted(self, inputs), loras, self.precision)


@no_type_check
class InputShortcutDense(WithLoRA, nn.Dense):
    r"""`LoRADense` whose LoRA increment sees the previous layer's inputs too, while it trains.

    It is called as `layer(x, previous_x)` with two arrays (..., n) of one shape. Its LoRA parameter is
    `input_lora`. No plain layer computes the same: `merge` and `merge_shortcuts` refuse it.

    It computes $y = x W + s\,((x + x')\,a)\,b + \text{bias}$, where $x'$ are the previous layer's inputs.

    From [ResLoRA](https://arxiv.org/abs/2402.18039).

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from oplora_jax.linen import InputShortcutDense
      >>> layer, x = InputShortcutDense(3, rank=2), jnp.ones((5, 4))
      >>> y, variables = layer.init_with_output(jax.random.key(0), x, previous_inputs=x)
      >>> y.shape, sorted(variables["params"])
      ((5, 3), ['bias', 'input_lora', 'kernel'])
    """

    @nn.compact
    def __call__(self, inputs: Any, previous_inputs: Any) -> Array:
        y, lora = super().__call__(inputs), _own(self, "input_lora")
        both = add_inputs(promoted(self, inputs), promoted(self, previous_inputs))
        return add_increments(y, both, [lora], self.precision)


def merge_shortcuts(model: nn.Module, params: Any, *args: Any, **kwargs: Any) -> Any:
    """`merge` for a model with `BlockShortcutDense` layers, whose place `nn.Dense` takes.

    Args:
      model: the model.
      params: its parameters.
      *args: example inputs, as for `model.init`, to trace whose increments a layer shares.
      **kwargs: likewise.

    Returns:
      A tree of dicts without LoRA parameters.

    Raises:
      ValueError: as for `merge`; an `InputShortcutDense`, of which there is no plain layer.

    Examples:
      >>> import flax.linen as nn
      >>> import jax, jax.numpy as jnp
      >>> from oplora_jax.linen import BlockShortcutDense, LoRADense, merge_shortcuts
      >>> x, first = jnp.ones((5, 4)), LoRADense(4, rank=2)
      >>> model = nn.Sequential([first, BlockShortcutDense(4, rank=2, previous=[first])])
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> {name: sorted(layer) for name, layer in merge_shortcuts(model, params, x).items()}
      {'layers_0': ['bias', 'kernel'], 'layers_1': ['bias', 'kernel']}
    """
    refuse_old_names(params)
    previous: dict[str, list[tuple[str, ...]]] = {}

    def note(call: Any, call_args: Any, call_kwargs: Any, context: Any) -> Any:
        layer = context.module
        if isinstance(layer, BlockShortcutDense) and context.method_name == "__call__":
            previous["/".join(layer.path)] = [other.path for other in layer.previous]
        return call(*call_args, **call_kwargs)

    with nn.intercept_methods(note):
        model.lazy_init(jax.random.key(0), *args, **kwargs)
    at = lambda path: _find(functools.reduce(operator.getitem, path, params))

    def merge_one(layer: dict[str, Any], path: str) -> dict[str, Any]:
        if path in previous:
            loras = [*map(at, previous[path]), meta.unbox(layer.pop("block_lora"))]
            kernel = merge_block(meta.unbox(layer["kernel"]), loras)
            layer["kernel"] = meta.replace_boxed(layer["kernel"], kernel)
        return merge_layer(layer, path)

    return map_layers(merge_one, params)


def _own(layer: WithLoRA, name: str) -> LowRank:
    """A layer's increment, which is created after the layer's own parameters."""
    refuse_computed_kernel(layer)
    if not layer.has_variable("params", name):
        new = layer.rank, layer.alpha, None
        layer.scope.param(name, init_beside, param_of(layer, "kernel"), "io", *new)
    return param_of(layer, name)


def _of(layer: nn.Module) -> LowRank:
    """The increment of another layer of the model."""
    if (lora := _find(layer.variables.get("params", {}))) is None:
        name = "/".join(layer.path)
        raise ValueError(f"the previous layer {name!r} has no LoRA parameter yet; call it before this one")
    return lora


def _find(params: Mapping[str, Any]) -> LowRank | None:
    return next((meta.unbox(params[name]) for name in ("lora", *SHORTCUTS) if name in params), None)
