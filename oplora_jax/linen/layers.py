"""Flax linen layers with LoRA: subclasses of Flax's own, which keep every option of them.

A dense layer's `dot_general` is that of the product with its kernel alone; the increment is multiplied in the
type that `dtype` and `promote_dtype` say, at the layer's `precision`.

Flax annotates `promote_dtype` with a protocol that no checker of types can test for, hence `no_type_check`.
"""

from typing import Any, no_type_check

import flax.linen as nn

from oplora_jax.linen.apply import SPLIT, WithLoRA, call_with_lora


@no_type_check
class _Layer(WithLoRA, kw_only=True):
    @nn.compact
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        new, split = (self.rank, self.alpha, None), isinstance(self, SPLIT)
        return call_with_lora(self, super().__call__, args, kwargs, new, split)


@no_type_check
class LoRADense(_Layer, nn.Dense):
    """`flax.linen.Dense` with LoRA: y = x (kernel + alpha / rank * a b) + bias.

    Its parameters are `kernel` (n, m), `bias` (m,) and `lora`, a `LowRank` of shape (n, m). To train LoRA
    alone take `optax.partition`.

    Attributes:
      rank: r, from 1 to min(n, m); others raise ValueError when the layer is initialised.
      alpha: the scale is alpha / rank, or 1 if alpha is None.

    All other attributes are Flax's.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from oplora_jax.linen import LoRADense
      >>> layer = LoRADense(features=6, rank=2)
      >>> params = layer.init(jax.random.key(0), jnp.ones((1, 4)))["params"]
      >>> params["lora"].shape, params["lora"].a.shape
      ((4, 6), (4, 2))
    """


@no_type_check
class LoRADenseGeneral(_Layer, nn.DenseGeneral):
    """`flax.linen.DenseGeneral` with LoRA.

    The contracted axes of the kernel together are the n inputs of the `LowRank`, those of the features its m
    outputs; `batch_dims` give each of their entries factors of its own. `rank` and `alpha` are as for
    `LoRADense`.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from oplora_jax.linen import LoRADenseGeneral
      >>> layer = LoRADenseGeneral(features=(4, 5), axis=(1, -1), rank=2)
      >>> params = layer.init(jax.random.key(0), jnp.ones((7, 2, 3)))["params"]
      >>> params["kernel"].shape, params["lora"].shape
      ((2, 3, 4, 5), (6, 20))
    """


@no_type_check
class LoRAEinsum(_Layer, nn.Einsum):
    """`flax.linen.Einsum` with LoRA.

    The kernel's axes that only the inputs have are together the n inputs of the `LowRank`, those that only
    the outputs have its m outputs, and those that both have are batch axes. In another order than batch,
    inputs, outputs `roles` of the `LowRank` says what each axis is. `rank` and `alpha` are as for
    `LoRADense`.

    Raises:
      ValueError: an einsum that is no product of inputs and a matrix, or of other roles when the layer is
        called than when it was initialised.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from oplora_jax.linen import LoRAEinsum
      >>> layer = LoRAEinsum((2, 8, 3), "btd,ndh->btnh", rank=2)
      >>> params = layer.init(jax.random.key(0), jnp.ones((5, 7, 8)))["params"]
      >>> params["lora"].shape, params["lora"].roles
      ((8, 6), 'oio')
    """


@no_type_check
class LoRAConv(_Layer, nn.Conv):
    """`flax.linen.Conv` with LoRA: one convolution with the kernel and the increment added up.

    The kernel `(*kernel_size, in_features / groups, features)` is the matrix of all its axes but the last by
    the last. Its exact gradient is an array. `rank` and `alpha` are as for `LoRADense`.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from oplora_jax.linen import LoRAConv
      >>> layer = LoRAConv(8, (5, 5), padding="VALID", rank=4)
      >>> params = layer.init(jax.random.key(0), jnp.ones((1, 12, 12, 3)))["params"]
      >>> params["kernel"].shape, params["lora"].shape
      ((5, 5, 3, 8), (75, 8))
    """


@no_type_check
class LoRAConvTranspose(_Layer, nn.ConvTranspose):
    """`flax.linen.ConvTranspose` with LoRA, as `LoRAConv`."""
