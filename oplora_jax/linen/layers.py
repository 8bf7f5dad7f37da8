"""Flax linen layers with LoRA: subclasses of Flax's own, which keep every option of them.

A dense layer's `dot_general` is that of the product with its kernel alone; the increment is multiplied in the
type that `dtype` and `promote_dtype` say, at the layer's `precision`.

The classes are exempt from checks of types at run time: Flax annotates `promote_dtype` with a protocol that
no checker can test an instance for.
"""

from typing import Any, no_type_check

import flax.linen as nn

from oplora_jax.linen.apply import SPLIT, WithLoRA, call_with_lora


@no_type_check
class _Layer(WithLoRA, kw_only=True):
    @nn.compact
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's outputs; the arguments are those of Flax's layer."""
        new, split = (self.rank, self.alpha, None), isinstance(self, SPLIT)
        return call_with_lora(self, super().__call__, args, kwargs, new, split)


@no_type_check
class LoRADense(_Layer, nn.Dense):
    """`flax.linen.Dense` with a LoRA increment: y = x (kernel + alpha / rank * a b) + bias.

    Its parameters are `kernel` (n, m), `bias` (m,) and `lora`, a `LowRank` of shape (n, m). Nothing is
    frozen here: which parameters train is the optimizer's business, see `optax.partition`.

    Attributes:
      rank: r, at most min(n, m).
      alpha: the scale is alpha / rank; 1 when alpha is None.

    The others are those of `flax.linen.Dense`.

    Raises:
      ValueError: when it is initialised, a rank that is not between 1 and min(n, m).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from oplora_jax.linen import LoRADense
      >>> layer = LoRADense(features=6, rank=2)
      >>> params = layer.init(jax.random.key(0), jnp.ones((1, 4)))["params"]
      >>> params["lora"].shape, params["lora"].a.shape
      ((4, 6), (4, 2))
    """


@no_type_check
class LoRADenseGeneral(_Layer, nn.DenseGeneral):
    """`flax.linen.DenseGeneral` with a LoRA increment.

    The contracted axes of the kernel together are n, those of the features m; `batch_dims` give each of
    their entries factors of its own. `rank` and `alpha` are as for `LoRADense`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from oplora_jax.linen import LoRADenseGeneral
      >>> layer = LoRADenseGeneral(features=(4, 5), axis=(1, -1), rank=2)
      >>> params = layer.init(jax.random.key(0), jnp.ones((7, 2, 3)))["params"]
      >>> params["kernel"].shape, params["lora"].shape
      ((2, 3, 4, 5), (6, 20))
    """


@no_type_check
class LoRAEinsum(_Layer, nn.Einsum):
    """`flax.linen.Einsum` with a LoRA increment.

    The axes of the kernel that the inputs have and the outputs lack are contracted: together they are n.
    Those that the outputs have and the inputs lack are m; those that both have are batch axes. Where they
    are not in the order batch, n, m, the `roles` of the LoRA parameter say what each axis is: "oio" for
    "btd,ndh->btnh". An einsum that is no matrix product of the two, or of other roles when it is called than
    when it was initialised, raises ValueError. `rank` and `alpha` are as for `LoRADense`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from oplora_jax.linen import LoRAEinsum
      >>> layer = LoRAEinsum((2, 8, 3), "btd,ndh->btnh", rank=2)
      >>> params = layer.init(jax.random.key(0), jnp.ones((5, 7, 8)))["params"]
      >>> params["lora"].shape, params["lora"].roles
      ((8, 6), 'oio')
    """


@no_type_check
class LoRAConv(_Layer, nn.Conv):
    """`flax.linen.Conv` with a LoRA increment: one convolution with the kernel and a b added up.

    The kernel (*kernel_size, in_features / groups, features) is the matrix of all its axes but the last by
    the last. The gradient of that matrix is captured dense. `rank` and `alpha` are as for `LoRADense`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from oplora_jax.linen import LoRAConv
      >>> layer = LoRAConv(8, (5, 5), padding="VALID", rank=4)
      >>> params = layer.init(jax.random.key(0), jnp.ones((1, 12, 12, 3)))["params"]
      >>> params["kernel"].shape, params["lora"].shape
      ((5, 5, 3, 8), (75, 8))
    """


@no_type_check
class LoRAConvTranspose(_Layer, nn.ConvTranspose):
    """`flax.linen.ConvTranspose` with a LoRA increment, like `LoRAConv`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from oplora_jax.linen import LoRAConvTranspose
      >>> layer = LoRAConvTranspose(8, (2, 2), strides=(2, 2), rank=4)
      >>> params = layer.init(jax.random.key(0), jnp.ones((1, 6, 6, 3)))["params"]
      >>> params["kernel"].shape, params["lora"].shape
      ((2, 2, 3, 8), (12, 8))
    """
