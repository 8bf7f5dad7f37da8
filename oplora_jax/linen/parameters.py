"""From a plain model's parameters to those with LoRA, and back."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax.core import meta

from oplora_jax.adapters.checks import refuse_old_names
from oplora_jax.adapters.init import beside
from oplora_jax.adapters.kernel_axes import add_increment, with_space
from oplora_jax.adapters.paths import path_name
from oplora_jax.adapters.reslora import SHORTCUTS
from oplora_jax.matrix import LowRank, check_factors, is_low_rank


def add_lora(model: nn.Module, rngs: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
    """The parameters of a model with LoRA, from pretrained ones without.

    Args:
      model: a model with LoRA layers, as from `loraize`. It is traced for its shapes alone.
      rngs: as for `model.init`.
      params: the pretrained parameters, a tree as the model's without LoRA.
      *args: example inputs, as for `model.init`; they may be of `jax.ShapeDtypeStruct`.
      **kwargs: likewise.

    Returns:
      A tree of dicts, with the arrays of params as they are, and new ones where params has none: the LoRA
      parameters, on a mesh sharded as the rows and the columns of their kernels, and a new head, say.

    Raises:
      ValueError: params has an array that the model lacks, or one of another shape; no layer matched.

    Examples:
      >>> import flax.linen as nn
      >>> import jax, jax.numpy as jnp
      >>> from oplora_jax.linen import add_lora, loraize
      >>> x, plain = jnp.ones((1, 4)), nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(3)])
      >>> pretrained = plain.init(jax.random.key(0), x)["params"]
      >>> model = loraize(plain, rank=2, targets="layers_*")
      >>> params = add_lora(model, jax.random.key(1), pretrained, x)
      >>> bool((model.apply({"params": params}, x) == plain.apply({"params": pretrained}, x)).all())
      True
    """
    refuse_old_names(params)
    by_name = lambda tree: {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
    given = by_name(params)
    is_box = lambda node: isinstance(node, meta.AxisMetadata)
    boxed = any(map(is_box, jax.tree.leaves(params, is_leaf=is_box)))
    expected: dict[str, tuple[int, ...]] = {}

    @jax.jit  # so that no array is made that is given
    def missing(rngs: Any) -> Any:
        tree = model.lazy_init(rngs, *args, **kwargs)["params"]
        tree = map_layers(spaced, tree if boxed else meta.unbox(tree))
        expected.update((name, leaf.shape) for name, leaf in by_name(tree).items())
        if not any(map(is_low_rank, jax.tree.leaves(tree, is_leaf=is_low_rank))):
            raise ValueError(f"the model has no LoRA parameter; it has: {', '.join(expected)}")
        return jax.tree.map_with_path(lambda path, leaf: None if path_name(path) in given else leaf, tree)

    tree = missing(rngs)
    for name, leaf in given.items():
        if name not in expected:
            quantised = ". The model's is quantised: quantise this one too, by qwix.quantize_params"
            hint = quantised if f"{name}/array/qvalue" in expected else ""
            raise ValueError(f"{name}: the model has no such parameter; it has: {', '.join(expected)}{hint}")
        if leaf.shape != expected[name]:
            raise ValueError(f"{name}: the array is {leaf.shape}; the model needs {expected[name]}")
    # A None of the model's own is no parameter, and stays.
    fill = lambda path, leaf: given.get(path_name(path)) if leaf is None else leaf
    tree = jax.tree.map_with_path(fill, tree, is_leaf=lambda leaf: leaf is None)

    def placed(layer: dict[str, Any], path: str) -> dict[str, Any]:  # over a mesh, as the kernels are
        put = lambda lora, weight: beside(meta.unbox(layer[weight]), lora) if weight in layer else lora
        names = [name for name in ("lora", *SHORTCUTS) if isinstance(layer.get(name), LowRank)]
        new = {name: put(layer[name], "kernel") for name in names}
        if (lora := loras_of(layer)) and not names:
            new = {"lora": {**layer["lora"], **{weight: put(z, weight) for weight, z in lora.items()}}}
        return layer | new

    return map_layers(placed, tree)


def spaced(layer: dict[str, Any], path: str) -> dict[str, Any]:
    """A layer's parameters, its LoRA stacked as the optimizers need it: see `with_space`."""
    return layer | {name: with_space(z) for name, z in layer.items() if isinstance(z, LowRank)}


def map_layers(function: Callable[[dict[str, Any], str], Any], tree: Any, path: str = "") -> Any:
    """A tree of dicts in which a function of it and of its path has changed each dict, inner ones first."""
    if not isinstance(tree, Mapping):
        return tree
    below = f"{path}/" if path else ""
    return function({name: map_layers(function, z, below + name) for name, z in tree.items()}, path)


def merge(params: Any) -> Any:
    """The parameters of the plain model, with the LoRA increments added to its kernels.

    Args:
      params: the parameters of a model with LoRA layers, or all its variables.

    Returns:
      A tree of dicts without LoRA parameters, with which the plain model computes the same, to rounding.

    Raises:
      ValueError: there is no LoRA parameter, or one without a kernel of its size, or one of a layer with a
        shortcut: see `merge_shortcuts`.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from oplora_jax.linen import LoRADense, merge
      >>> params = LoRADense(6, rank=2).init(jax.random.key(0), jnp.ones((1, 4)))["params"]
      >>> sorted(merge(params))
      ['bias', 'kernel']
    """
    refuse_old_names(params)
    if not any(map(is_low_rank, jax.tree.leaves(params, is_leaf=is_low_rank))):
        raise ValueError("the parameters have no LoRA parameter to merge")
    return map_layers(merge_layer, params)


def merge_layer(layer: dict[str, Any], path: str) -> dict[str, Any]:
    """A layer's parameters, with its increment, if it has one, in its kernel."""
    for name in SHORTCUTS:
        if name in layer:
            raise ValueError(f"{path}/{name}: {SHORTCUTS[name]}")
    if not (loras := loras_of(layer)):
        return layer
    merged = {name: z for name, z in layer.items() if name != "lora"}
    for name, lora in loras.items():
        if name not in layer:
            raise ValueError(f"{path}: there is no {name} beside its LoRA parameter in 'lora'")
        check_factors(lora, f"{path}/lora")
        try:
            increased = add_increment(meta.unbox(layer[name]), lora)
        except ValueError as error:
            raise ValueError(f"{path}/lora: {error}") from error
        merged[name] = meta.replace_boxed(layer[name], increased)
    return merged


def loras_of(layer: Mapping[str, Any]) -> dict[str, LowRank]:
    """The LoRA parameters of a layer by the names of their weights; those of `oplora_jax.qwix` are a dict."""
    lora = layer.get("lora")
    lora = {"kernel": lora} if isinstance(lora, LowRank) else lora
    of = lora if isinstance(lora, Mapping) else {}
    return {name: z for name, z in of.items() if isinstance(z, LowRank)}
