"""ResLoRA (https://arxiv.org/abs/2402.18039) for NNX: residual paths between layers' LoRA parameters."""

from typing import Any

from flax import nnx
from jaxtyping import Array

from oplora_jax.adapters.reslora import add_increments, add_inputs, check, merge_block
from oplora_jax.matrix import LowRank
from oplora_jax.nnx.layers import Dense, promoted


class BlockShortcutLinear(Dense, nnx.Linear):
    r"""`LoRALinear` whose inputs go through the LoRA increments of layers before it too, while it trains.

    Its own LoRA parameter is `block_lora`. The exact gradient of an increment adds up over the layers that
    use it: it is an array.

    Args:
      in_features: n.
      out_features: m.
      rank: r, from 1 to min(n, m).
      previous: a sequence of the layers whose increments it shares, each of shape (n, m): at layer l of a
        stack, with shortcuts over k layers, `layers[max(0, l - k + 1) : l]`.
      **options: `alpha`, `rngs` and Flax's, as for `LoRALinear`.

    Raises:
      ValueError: a rank that is not between 1 and min(n, m), or an increment of another shape.

    It computes $y = x\,(W + \sum_i s_i\,a_i b_i) + \text{bias}$, over the previous layers' increments and its
    own.

    From [ResLoRA](https://arxiv.org/abs/2402.18039).

    Examples:
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
    r"""`LoRALinear` whose LoRA increment sees the previous layer's inputs too, while it trains.

    It is called as `layer(x, previous_x)` with two arrays (..., n) of one shape. Its LoRA parameter is
    `input_lora`. No plain layer computes the same: `merge` refuses it. The arguments are those of
    `LoRALinear`.

    It computes $y = x W + s\,((x + x')\,a)\,b + \text{bias}$, where $x'$ are the previous layer's inputs.

    From [ResLoRA](https://arxiv.org/abs/2402.18039).

    Examples:
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
