"""ResLoRA (https://arxiv.org/abs/2402.18039) for NNX: residual paths between layers' LoRA parameters."""

from typing import Any

from flax import nnx
from jaxtyping import Array

from oplora_jax.adapters.reslora import add_increments, add_inputs, check, merge_block
from oplora_jax.matrix import LowRank
from oplora_jax.nnx.layers import Dense, promoted


class BlockShortcutLinear(Dense, nnx.Linear):
    """`LoRALinear` whose inputs go through the increments of layers before it too.

    y = x (kernel + sum_i s_i a_i b_i) + bias, over the previous layers' increments and its own, `block_lora`.
    Their exact gradient, which adds up over layers, is dense.

    Args:
      in_features, out_features, rank, alpha, rngs, **options: as for `LoRALinear`.
      previous: a sequence of the layers whose increments it shares, each of shape (n, m): at layer l of a
        stack, with shortcuts over k layers, ``layers[max(0, l - k + 1) : l]``.

    Raises:
      ValueError: a rank that is not between 1 and min(n, m), or an increment of another shape.

    Example:
      >>> from flax import nnx
      >>> from oplora_jax.nnx import BlockShortcutLinear, LoRALinear, merge
      >>> rngs = nnx.Rngs(0)
      >>> first = LoRALinear(4, 4, rank=2, rngs=rngs)
      >>> second = BlockShortcutLinear(4, 4, rank=2, previous=[first], rngs=rngs)
      >>> model = nnx.Sequential(first, nnx.tanh, second)
      >>> len(nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))), type(merge(model).layers[2]).__name__
      (2, 'Linear')
    """

    lora_name = "block_lora"

    def __init__(self, in_features: int, out_features: int, rank: int, *, previous: Any, **options: Any):
        super().__init__(in_features, out_features, rank, **options)
        self.previous = nnx.List([getattr(layer, layer.lora_name) for layer in previous])
        check(self.kernel.shape, self._loras())

    def _loras(self) -> list[LowRank]:
        return [lora.get_value() for lora in [*self.previous, self.block_lora]]

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Array:
        y = super().__call__(inputs, *args, **kwargs)
        *previous, own = self._loras()
        return add_increments(y, promoted(self, inputs), [own, *previous], self.precision)

    def merged_kernel(self) -> Array:
        return merge_block(self.kernel[...], self._loras())


class InputShortcutLinear(Dense, nnx.Linear):
    """`LoRALinear` whose increment, `input_lora`, sees the previous layer's inputs too.

    y = x kernel + s ((x + previous_x) a) b + bias, called as ``layer(x, previous_x)`` with two arrays
    (..., n) of one shape. No plain layer computes this: `merge` refuses it. The arguments are `LoRALinear`'s.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from oplora_jax.nnx import InputShortcutLinear, LoRALinear
      >>> rngs, x = nnx.Rngs(0), jnp.ones((5, 4))
      >>> first, second = LoRALinear(4, 4, rank=2, rngs=rngs), InputShortcutLinear(4, 3, rank=2, rngs=rngs)
      >>> second(nnx.tanh(first(x)), x).shape
      (5, 3)
    """

    lora_name = "input_lora"

    def __call__(self, inputs: Any, previous_inputs: Any, **kwargs: Any) -> Array:
        y = super().__call__(inputs, **kwargs)
        both = add_inputs(promoted(self, inputs), promoted(self, previous_inputs))
        return add_increments(y, both, [self.input_lora.get_value()], self.precision)
