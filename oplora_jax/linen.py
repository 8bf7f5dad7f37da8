"""LoRA layers for Flax linen."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax import serialization
from jaxtyping import Array, Float

from oplora_jax.gradients.lora import dense_with_lora, init_low_rank
from oplora_jax.matrix import LowRank


class LoRADense(nn.Module):
    """`flax.linen.Dense` with a LoRA increment: y = x (kernel + alpha / rank * a b) + bias.

    Its parameters are `kernel` (n, m), `bias` (m,) and `lora`, a `LowRank` of shape (n, m). Nothing is
    frozen here: which parameters train is the optimizer's business, see `optax.partition`.

    Attributes:
      features: m, the size of the output's last axis.
      rank: r, at most min(n, m).
      alpha: the scale is alpha / rank; 1 when alpha is None.
      use_bias: whether to add a bias.
      dtype: the type to compute in; that of the inputs and the kernel if None.
      param_dtype: the type of the parameters.
      kernel_init: initialiser of the kernel.
      bias_init: initialiser of the bias.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from oplora_jax.linen import LoRADense
      >>> layer = LoRADense(features=6, rank=2)
      >>> params = layer.init(jax.random.key(0), jnp.ones((1, 4)))["params"]
      >>> params["lora"].shape, params["lora"].a.shape
      ((4, 6), (4, 2))
    """

    features: int
    rank: int
    alpha: float | int | None = None
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Callable[..., Any] = nn.initializers.lecun_normal()
    bias_init: Callable[..., Any] = nn.initializers.zeros_init()

    @nn.compact
    def __call__(self, x: Float[Array, "*batch n"]) -> Float[Array, "*batch m"]:
        """The layer's outputs."""
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = self.param("bias", self.bias_init, shape[1:], self.param_dtype) if self.use_bias else None
        lora = self.param("lora", init_low_rank, shape, self.rank, self.alpha, self.param_dtype)
        return dense_with_lora(x, kernel, lora, bias, self.dtype)


# So that flax.serialization, and through it TrainState's checkpoints, know the node.
serialization.register_serialization_state(
    LowRank,
    lambda node: {"a": serialization.to_state_dict(node.a), "b": serialization.to_state_dict(node.b)},
    lambda node, state: LowRank(
        serialization.from_state_dict(node.a, state["a"], name="a"),
        serialization.from_state_dict(node.b, state["b"], name="b"),
        node.scale,
    ),
)
