"""LoRA on the layers of an existing NNX model, and off them again."""

import functools
from collections.abc import Iterator
from typing import Any, TypeVar

import jax
from flax import nnx

from oplora_jax.adapters.checks import COMPUTED, refuse_unsupported
from oplora_jax.adapters.init import Alpha, Rank
from oplora_jax.adapters.kernel_axes import check_takes_increments
from oplora_jax.adapters.paths import Targets, check_patterns, matches, path_name, patterns_of
from oplora_jax.adapters.reslora import SHORTCUTS
from oplora_jax.nnx import layers as lora_layers
from oplora_jax.nnx.layers import Merged, Split, WithLoRA, kernel_of, lora_param
from oplora_jax.nnx.reslora import BlockShortcutLinear, InputShortcutLinear

Model = TypeVar("Model", bound=nnx.Module)

_CLASSES = {
    getattr(nnx, name): getattr(lora_layers, f"LoRA{name}")
    for name in ("Linear", "LinearGeneral", "Einsum", "Conv", "ConvTranspose")
}


def loraize(
    model: nnx.Module,
    rank: Rank,
    targets: Targets,
    *,
    alpha: Alpha = None,
    dtype: Any = None,
    rngs: nnx.Rngs,
) -> list[str]:
    """LoRA on the layers of any NNX model whose paths match a pattern, in place.

    Each chosen `nnx.Linear`, `nnx.LinearGeneral`, `nnx.Einsum`, `nnx.Conv` or `nnx.ConvTranspose` becomes the
    LoRA layer of that name: the same object, with its kernel, its bias and all its options, and a `lora`
    besides. The model computes what it did, since the increments start at zero.

    Args:
      model: any module.
      rank: r, at most either side of every kernel chosen.
      targets: one pattern or several, as for `oplora_jax.init_lora`, for the paths of layers, such as
        "encoder/layers/0/attention/query". That of the model itself is "".
      alpha: a positive number; the scale is alpha / rank, or 1 if alpha is None.
      dtype: the LoRA parameters' type, as for `oplora_jax.init_lora`; that of each kernel if None.
      rngs: random number streams; "params" is used.

    Returns:
      The chosen layers' paths.

    Raises:
      ValueError: a pattern that matches no layer, or one of a class that has no LoRA, such as `nnx.Embed`; a
        layer that has LoRA already, or whose kernel is too small for the rank, or computed by an
        `nnx.WeightNorm` or `nnx.SpectralNorm` around it. The model is then as it was.

    Layers that `nnx.vmap` has stacked get stacked factors. A layer of a subclass stays one of that class; if
    that has a `__call__` of its own, it runs with merged weights.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from oplora_jax.nnx import loraize
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(nnx.Linear(4, 8, rngs=rngs), nnx.relu, nnx.Linear(8, 3, rngs=rngs))
      >>> loraize(model, rank=2, targets="layers/*", alpha=4, rngs=rngs)
      ['layers/0', 'layers/2']
      >>> model(jnp.ones((1, 4))).shape, model.layers[0].lora.get_value().shape
      ((1, 3), (4, 8))
    """
    found: dict[int, tuple[nnx.Module, list[str]]] = {}
    others = {}
    for path, module in _modules(model, ()):
        if isinstance(module, tuple(_CLASSES)):
            found.setdefault(id(module), (module, []))[1].append(path)
        elif not isinstance(module, nnx.List | nnx.Dict):
            others[path] = type(module)
    if not any(isinstance(z, nnx.Variable) for z in vars(model).values()):
        others.pop("", None)  # the model is no layer itself
    patterns, layers, chosen = patterns_of(targets), [p for _, paths in found.values() for p in paths], {}
    refuse_unsupported(patterns, layers, others, _CLASSES, nnx)
    check_patterns(patterns, layers, "layer")
    for layer, paths in found.values():
        chosen |= {path: layer for path in [p for p in paths if matches(p, patterns)][:1]}
    params, normalised = {}, _normalised(model)
    for path, layer in chosen.items():
        try:
            if id(layer) in normalised:
                raise ValueError(normalised[id(layer)])
            if isinstance(layer, WithLoRA) or hasattr(layer, "lora"):
                name = type(layer).__name__
                raise ValueError(f"this {name} has LoRA already; leave it out of the targets, or merge it")
            if issubclass(_lora_class(type(layer)), Merged):
                check_takes_increments(kernel_of(layer))
            params[path] = lora_param(layer, rank, alpha, rngs, dtype)
        except ValueError as error:
            raise ValueError(f"{path!r}: {error}") from error
    for path, layer in chosen.items():
        layer.lora = params[path]
        object.__setattr__(layer, "__class__", _lora_class(type(layer)))
    return list(chosen)


def merge(model: Model) -> Model:
    """A copy of a model with plain layers, with the LoRA increments added to their kernels.

    Args:
      model: any module with LoRA layers; it stays as it is.

    Returns:
      A model of the classes that `loraize` found. It computes the same, to rounding.

    Raises:
      ValueError: the model has no LoRA layer, or one of a class with a `__call__` of its own, or one of which
        there is no plain layer: an `InputShortcutLinear`, or a layer within an `nnx.WeightNorm` or
        `nnx.SpectralNorm`.

    Examples:
      >>> from flax import nnx
      >>> from oplora_jax.nnx import LoRALinear, merge
      >>> layer = LoRALinear(4, 6, rank=2, rngs=nnx.Rngs(0))
      >>> type(merge(layer)).__name__
      'Linear'
    """
    model = nnx.clone(model)
    layers = [(path, z) for path, z in nnx.iter_modules(model) if isinstance(z, WithLoRA)]
    if not layers:
        raise ValueError("the model has no LoRA layer to merge")
    normalised = _normalised(model)
    for path, layer in layers:
        name = repr("/".join(map(str, path)))
        plain = next(c for c in type(layer).__mro__ if not issubclass(c, WithLoRA))
        if id(layer) in normalised:
            raise ValueError(f"{name}: {normalised[id(layer)]}")
        if isinstance(layer, InputShortcutLinear):
            raise ValueError(f"{name}: {SHORTCUTS['input_lora']}")
        if type(layer).__call__ not in (Split.__call__, Merged.__call__, BlockShortcutLinear.__call__):
            own = f"{type(layer).__name__} has a __call__ of its own, which {plain.__name__} would lose"
            raise ValueError(f"{name}: {own}. Merge its lora into its kernel yourself")
        try:
            kernel = layer.merged_kernel()
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        layer.kernel.set_value(kernel)
        if isinstance(layer, BlockShortcutLinear):
            del layer.previous
        delattr(layer, layer.lora_name)
        object.__setattr__(layer, "__class__", plain)
    return model


@functools.cache
def _lora_class(cls: type[nnx.Module]) -> type[nnx.Module]:
    """The class of a layer once it has LoRA."""
    if cls in _CLASSES:
        return _CLASSES[cls]
    base = next(c for c in cls.__mro__ if c in _CLASSES)
    mixin = Split if cls.__call__ is base.__call__ and issubclass(_CLASSES[base], Split) else Merged
    return type(f"LoRA{cls.__name__}", (mixin, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})


def _normalised(model: nnx.Module) -> dict[int, str]:
    """What is wrong with LoRA on modules whose kernels another one around them computes, by their ids."""
    found = {}
    for _, wrapper in _modules(model, ()):
        if isinstance(wrapper, nnx.WeightNorm | nnx.SpectralNorm):
            for _, layer in _modules(wrapper.layer_instance, ()):
                kernel = f"the kernel of this {type(layer).__name__}"
                found[id(layer)] = (
                    f"{kernel} is computed by the {type(wrapper).__name__} around it: {COMPUTED}"
                )
    return found


def _modules(node: Any, parents: tuple[Any, ...], path: str = "") -> Iterator[tuple[str, nnx.Module]]:
    """Every module under a node, by every path: `nnx.iter_modules` names shared ones once."""
    if isinstance(node, nnx.Variable) or any(node is parent for parent in parents):
        return
    if isinstance(node, nnx.Module):
        yield path, node
    if isinstance(node, nnx.Pytree):
        # Before Flax 0.12.4 the names in an `nnx.List` are integers.
        children = [(k, v) for k, v in vars(node).items() if not str(k).startswith("_pytree__")]
    else:
        flat, _ = jax.tree.flatten_with_path(node, is_leaf=lambda z: z is not node)
        children = [(path_name(key), child) for key, child in flat if key]
    for key, child in children:
        yield from _modules(child, (*parents, node), f"{path}/{key}" if path else str(key))
