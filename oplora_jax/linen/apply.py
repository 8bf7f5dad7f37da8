"""A linen layer's call with LoRA: what the LoRA layers and the layers of a loraized model share."""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from flax.core import meta

from oplora_jax.adapters.checks import COMPUTED, check_roles, refuse_old_names
from oplora_jax.adapters.init import Alpha, Rank, init_beside
from oplora_jax.adapters.kernel_axes import (
    add_einsum_increment,
    add_increment,
    dense_equation,
    kernel_roles,
    without_space,
)
from oplora_jax.matrix import LowRank

SPLIT = (nn.Dense, nn.DenseGeneral, nn.Einsum)  # their increments can be added to the outputs
LAYERS = (*SPLIT, nn.Conv, nn.ConvTranspose)


class WithLoRA(nn.Module, kw_only=True):
    """Mixed into a layer that has LoRA of its own."""

    rank: Rank
    alpha: Alpha = None


def param_of(layer: nn.Module, name: str) -> Any:
    """A parameter of a layer, out of the box that Flax keeps it in; None if there is none."""
    return meta.unbox(layer.get_variable("params", name))


def refuse_computed_kernel(layer: nn.Module) -> None:
    """Raises ValueError where a layer's kernel is not its parameter, but computed from it.

    It would be computed from merged weights too, which is not what the layer and its increment do.
    """
    kernel = jax.tree.leaves(layer.get_variable("params", "kernel"))
    for module in nn.module._context.module_stack:  # there is no public way to ask what is being called
        if module is None or module.scope is None or module is layer:
            continue
        outer = jax.tree.leaves(_kernel_within(module, layer.path))
        # A transformation of JAX in between, as of nn.scan, has arrays of its own.
        comparable = len(outer) == len(kernel) and module.scope.trace_level == layer.scope.trace_level
        changed = comparable and any(x is not y for x, y in zip(outer, kernel, strict=True))
        if changed or isinstance(module, nn.WeightNorm | nn.SpectralNorm):
            name = f"the kernel of the {type(layer).__name__} {'/'.join(layer.path)!r}"
            how = "as by nn.WeightNorm, nn.SpectralNorm or nn.map_variables"
            raise ValueError(f"{name} is computed from its parameter, {how}: {COMPUTED}")


def _kernel_within(module: nn.Module, path: tuple[str, ...]) -> Any:
    """The kernel of the layer at a path, among the variables of a module around it; None if there is none."""
    below = path[len(module.path) :]
    if module.path != path[: len(module.path)] or not below:
        return None
    node = module.scope.get_variable("params", below[0])
    for name in (*below[1:], "kernel"):
        node = node.get(name) if isinstance(node, Mapping) else None
    return node


def call_with_lora(layer: nn.Module, call: Any, args: Any, kwargs: Any, new: tuple, split: bool) -> Any:
    """What a layer, one of LAYERS or of a subclass, returns with LoRA.

    The parameter stands beside the layer's kernel. One that does not exist yet is created, of the rank, the
    alpha and the type in `new`, after the layer's own, which get the random keys that they would without it.

    `call` is the layer's own method, without LoRA. With `split` the increment is added to the outputs, which
    is right for a dense layer's own call alone; otherwise the layer runs with merged weights.
    """
    einsum = None
    if isinstance(layer, nn.Einsum):  # its call may be given the equation
        given = args[1] if len(args) > 1 else kwargs.get("einsum_str")
        einsum = nn.merge_param("einsum_str", layer.einsum_str, given)
    roles = _roles(layer, einsum)
    refuse_computed_kernel(layer)
    lora = param_of(layer, "lora")
    if lora is None:
        refuse_old_names(layer.variables.get("params", {}), layer.path)
    else:
        lora = without_space(lora, roles)
        check_roles(lora, roles, "/".join((*layer.path, "lora")))
        if not split:
            return _call_merged(layer, call, args, kwargs, lora)
    y, kernel = call(*args, **kwargs), param_of(layer, "kernel")
    if kernel is None:  # a setup, or a method that does not need the kernel
        return y
    if lora is None:  # scope.param raises Flax's own error where parameters cannot be created
        if layer.scope.has_variable("params", "lora"):
            raise ValueError(
                f"{'/'.join(layer.path)}: this {type(layer).__name__} has LoRA of its own; leave it out of "
                "the module_path of Qwix's rules"
            )
        layer.scope.param("lora", init_beside, kernel, roles, *new)
        return y  # the increment is zero
    x = promoted(layer, args[0] if args else kwargs["inputs"])
    if einsum is None:
        batch, axes, features = _sides(layer)
        einsum = dense_equation(x.ndim, axes, len(batch), len(features))
    return add_einsum_increment(y, einsum, x, kernel.shape, lora, layer.precision)


def promoted(layer: nn.Module, x: Any) -> Any:
    """x in the type in which a layer multiplies."""
    bias = param_of(layer, "bias") if layer.use_bias else None
    return layer.promote_dtype(x, param_of(layer, "kernel"), bias, dtype=layer.dtype)[0]


def _roles(layer: nn.Module, einsum: str | None) -> str:
    """The roles of the axes of a layer's kernel."""
    if isinstance(layer, nn.Dense | nn.DenseGeneral):
        return "".join(role * len(side) for role, side in zip("bio", _sides(layer), strict=True))
    if isinstance(layer, nn.Einsum):
        return kernel_roles(einsum, len(layer.shape))
    transposed = getattr(layer, "transpose_kernel", False)
    return "i" * len(_as_tuple(layer.kernel_size)) + ("oi" if transposed else "io")


def _sides(layer: nn.Dense | nn.DenseGeneral) -> tuple[tuple[int, ...], ...]:
    """The batch axes and the contracted axes of a dense layer's inputs, and its features."""
    batch, axes = (layer.batch_dims, layer.axis) if isinstance(layer, nn.DenseGeneral) else ((), -1)
    return _as_tuple(batch), _as_tuple(axes), _as_tuple(layer.features)


def _as_tuple(value: int | Sequence[int]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def _call_merged(layer: nn.Module, call: Any, args: Any, kwargs: Any, lora: LowRank) -> Any:
    """The layer's own call, in which its parameter "kernel" is the merged one."""

    def param(name: str, *init_args: Any, **init_kwargs: Any) -> Any:
        value = type(layer).param(layer, name, *init_args, **init_kwargs)
        return add_increment(value, lora) if name == "kernel" else value

    object.__setattr__(layer, "param", param)
    try:
        return call(*args, **kwargs)
    finally:
        object.__delattr__(layer, "param")
