"""Flax NNX layers with LoRA: subclasses of Flax's own, which keep every option of them.

A dense layer's `dot_general` and `preferred_element_type` are those of the product with its kernel alone; the
increment is multiplied in the type that `dtype` and `promote_dtype` say, at the layer's `precision`.
"""

import copy
from collections.abc import Sequence
from typing import Any

from flax import nnx
from flax.nnx import Rngs
from jaxtyping import Array

from oplora_jax.adapters.checks import check_roles
from oplora_jax.adapters.init import Alpha, Rank, init_beside
from oplora_jax.adapters.kernel_axes import add_einsum_increment, add_increment, dense_equation, kernel_roles
from oplora_jax.matrix import LowRank

Shape = Sequence[int]
Size = int | Shape


def kernel_of(layer: nnx.Module) -> Any:
    """A layer's kernel; one that Qwix has quantised is no variable."""
    return layer.kernel.get_value() if isinstance(layer.kernel, nnx.Variable) else layer.kernel


def lora_param(layer: nnx.Module, rank: Rank, alpha: Alpha, rngs: Rngs, dtype: Any = None) -> nnx.LoRAParam:
    """The LoRA parameter of a layer that has its kernel: a `LowRank` of a type, the kernel's if None."""
    kernel = kernel_of(layer)
    return nnx.LoRAParam(init_beside(rngs.params(), kernel, roles(layer), rank, alpha, dtype))


def roles(layer: nnx.Module) -> str:
    """The roles of the axes that a layer knows of its kernel; others, in front of them, stack layers."""
    if isinstance(layer, nnx.Linear):
        known, shape = "io", (layer.in_features, layer.out_features)
    elif isinstance(layer, nnx.LinearGeneral):
        sides = tuple(layer.batch_axis.values()), layer.in_features, layer.out_features
        known = "".join(role * len(sizes) for role, sizes in zip("bio", sides, strict=True))
        shape = tuple(size for sizes in sides for size in sizes)
    elif isinstance(layer, nnx.Einsum):
        known, shape = kernel_roles(layer.einsum_str, len(layer.kernel_shape)), tuple(layer.kernel_shape)
    else:
        transposed = getattr(layer, "transpose_kernel", False)
        known = "i" * len(layer.kernel_size) + ("oi" if transposed else "io")
        shape = tuple(layer.kernel_shape)
    if (got := layer.kernel.shape)[-len(shape) :] != shape:
        raise ValueError(f"the kernel is {got}; expected {shape}, with axes in front if layers are stacked")
    return known


def lora_of(layer: nnx.Module) -> LowRank:
    """A layer's LoRA parameter."""
    lora = layer.lora.get_value()
    check_roles(lora, roles(layer), f"the lora of a {type(layer).__name__}")
    return lora


def promoted(layer: nnx.Module, x: Any) -> Array:
    """x in the type in which a layer multiplies."""
    bias = None if layer.bias is None else layer.bias[...]
    return layer.promote_dtype((x, layer.kernel[...], bias), dtype=layer.dtype)[0]


class WithLoRA(nnx.Module):
    """Mixed into a layer of Flax's that has a LoRA parameter of this name."""

    lora_name = "lora"

    def merged_kernel(self) -> Array:
        """The kernel with all increments added."""
        return add_increment(self.kernel[...], lora_of(self))


class Split(WithLoRA):
    """Mixed into a dense layer: its own product, and the increment's beside it."""

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Array:
        y, x = super().__call__(inputs, *args, **kwargs), promoted(self, inputs)
        equation = _equation(self, x.ndim, *args, **kwargs)
        return add_einsum_increment(y, equation, x, self.kernel.shape, lora_of(self), self.precision)


def _equation(layer: nnx.Module, ndim: int, einsum_str: Any = None, *args: Any, **kwargs: Any) -> str:
    """What a dense layer does with inputs of ndim axes; the other arguments are those of its call."""
    if isinstance(layer, nnx.Linear):
        return dense_equation(ndim, (-1,), 0, 1)
    if isinstance(layer, nnx.LinearGeneral):
        return dense_equation(ndim, layer.axis, len(layer.batch_axis), len(layer.out_features))
    return layer.einsum_str if einsum_str is None else einsum_str


class Merged(WithLoRA):
    """Mixed into any layer: it runs with merged weights, a convolution's being small."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        layer = copy.copy(self)
        # Not by assignment, which NNX refuses where a transformation closes over the layer.
        vars(layer)["kernel"] = nnx.Param(self.merged_kernel())
        return super(Merged, layer).__call__(*args, **kwargs)


class Dense(WithLoRA):
    """Mixed into a dense layer: how it is made."""

    def __init__(
        self, in_features: Size, out_features: Size, rank: Rank, *, alpha: Alpha = None, rngs: Rngs, **options
    ):
        super().__init__(in_features, out_features, rngs=rngs, **options)
        setattr(self, self.lora_name, lora_param(self, rank, alpha, rngs))


class LoRALinear(Split, Dense, nnx.Linear):
    """`flax.nnx.Linear` with LoRA: y = x (kernel + alpha / rank * a b) + bias.

    `kernel` and `bias` are `nnx.Param`; `lora` is an `nnx.LoRAParam` that holds a `LowRank`, so
    `nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)` trains LoRA alone.

    Args:
      in_features: n.
      out_features: m.
      rank: r, from 1 to min(n, m).
      alpha: the scale is alpha / rank, or 1 if alpha is None.
      rngs: random number streams; "params" is used.
      **options: those of Flax's layer.

    Raises:
      ValueError: a rank that is not between 1 and min(n, m).

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from oplora_jax.nnx import LoRALinear
      >>> layer = LoRALinear(4, 6, rank=2, use_bias=False, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((1, 4))).shape, layer.lora.get_value().a.shape
      ((1, 6), (4, 2))
    """


class LoRALinearGeneral(Split, Dense, nnx.LinearGeneral):
    """`flax.nnx.LinearGeneral` with LoRA.

    The contracted axes of the kernel, of sizes in_features, together are the n inputs of the `LowRank`, those
    of the outputs its m outputs; a `batch_axis` gives each of its entries factors of its own. The rest is as
    for `LoRALinear`.

    Examples:
      >>> from flax import nnx
      >>> from oplora_jax.nnx import LoRALinearGeneral
      >>> layer = LoRALinearGeneral((2, 3), (4, 5), rank=2, axis=(1, -1), rngs=nnx.Rngs(0))
      >>> layer.kernel.shape, layer.lora.get_value().shape
      ((2, 3, 4, 5), (6, 20))
    """


class LoRAEinsum(Split, nnx.Einsum):
    """`flax.nnx.Einsum` with LoRA.

    The kernel's axes that only the inputs have are together the n inputs of the `LowRank`, those that only
    the outputs have its m outputs, and those that both have are batch axes. In another order than batch,
    inputs, outputs `roles` of the `LowRank` says what each axis is. The rest is as for `LoRALinear`.

    Raises:
      ValueError: an einsum that is no product of inputs and a matrix, or of other roles when the layer is
        called.

    Examples:
      >>> from flax import nnx
      >>> from oplora_jax.nnx import LoRAEinsum
      >>> lora = LoRAEinsum("btd,ndh->btnh", (2, 8, 3), rank=2, rngs=nnx.Rngs(0)).lora.get_value()
      >>> lora.shape, lora.roles
      ((8, 6), 'oio')
    """

    def __init__(
        self, einsum_str: str, kernel_shape: Shape, rank: Rank, *, alpha: Alpha = None, rngs: Rngs, **options
    ):
        super().__init__(einsum_str, tuple(kernel_shape), rngs=rngs, **options)
        self.lora = lora_param(self, rank, alpha, rngs)


class _Convolution(Merged):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: Size,
        rank: Rank,
        *,
        alpha: Alpha = None,
        rngs: Rngs,
        **options,
    ):
        super().__init__(in_features, out_features, kernel_size, rngs=rngs, **options)
        self.lora = lora_param(self, rank, alpha, rngs)


class LoRAConv(_Convolution, nnx.Conv):
    """`flax.nnx.Conv` with LoRA: one convolution with the kernel and the increment added up.

    The kernel `(*kernel_size, in_features / groups, out_features)` is the matrix of all its axes but the last
    by the last. Its exact gradient is an array. The rest is as for `LoRALinear`.

    Examples:
      >>> from flax import nnx
      >>> from oplora_jax.nnx import LoRAConv
      >>> layer = LoRAConv(3, 8, (5, 5), rank=4, padding="VALID", rngs=nnx.Rngs(0))
      >>> layer.kernel.shape, layer.lora.get_value().shape
      ((5, 5, 3, 8), (75, 8))
    """


class LoRAConvTranspose(_Convolution, nnx.ConvTranspose):
    """`flax.nnx.ConvTranspose` with LoRA, as `LoRAConv`."""
