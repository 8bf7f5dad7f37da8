"""ResLoRA: residual paths between the LoRA parameters of consecutive layers, while they train.

From https://arxiv.org/abs/2402.18039.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from oplora_jax.adapters.kernel_axes import check_takes_increments
from oplora_jax.gradients.lora_dot import fit, lora_dot, lora_increment
from oplora_jax.gradients.matmul_order import dot
from oplora_jax.matrix import LowRank, check_factors, to_dense
from oplora_jax.sharding import shard_like

# The names of increments that are more than an addition to the kernel beside them, and why.
SHORTCUTS = {
    "block_lora": "other layers' increments belong to this kernel too; use oplora_jax.linen.merge_shortcuts",
    "input_lora": "an input shortcut has no merged form, as it sees the previous layer's inputs; keep it",
}


def block_shortcut(
    x: Float[Array, "*tokens n"], kernel: Float[Array, "*batch n m"], loras: Sequence[LowRank]
) -> Float[Array, "*tokens m"]:
    r"""The outputs of a layer whose inputs go through its own LoRA increment and those of layers before it.

    The exact gradient of an increment adds up over the layers that use it: it is an array.

    Args:
      x: the layer's inputs, as for `lora_dot`.
      kernel: the frozen weight W.
      loras: the increments, all of the kernel's shape: at layer l of a stack, with shortcuts over k layers,
        `loras[max(0, l - k + 1) : l + 1]`.

    Returns:
      The outputs, in the promoted type of x and the kernel.

    Raises:
      ValueError: no increments, or shapes that do not fit.

    It computes $y = x W + \sum_i s_i\,(x a_i)\,b_i$.

    From [ResLoRA](https://arxiv.org/abs/2402.18039).

    Examples:
      >>> import jax.numpy as jnp
      >>> from oplora_jax import LowRank
      >>> from oplora_jax.reslora import block_shortcut, merge_block
      >>> x, kernel, lora = jnp.ones((1, 3)), jnp.eye(3), LowRank(jnp.ones((3, 1)), jnp.ones((1, 3)))
      >>> block_shortcut(x, kernel, [lora, lora]).tolist(), (x @ merge_block(kernel, [lora, lora])).tolist()
      ([[7.0, 7.0, 7.0]], [[7.0, 7.0, 7.0]])
    """
    check(jnp.shape(kernel), loras)
    return add_increments(lora_dot(x, kernel, loras[-1]), x, loras[:-1])


def merge_block(kernel: Float[Array, "*batch n m"], loras: Sequence[LowRank]) -> Float[Array, "*batch n m"]:
    """The kernel of the plain layer that computes what `block_shortcut` does.

    Args:
      kernel: as for `block_shortcut`.
      loras: as for `block_shortcut`.

    Raises:
      ValueError: as for `block_shortcut`; a kernel of integers or float8.
    """
    check(jnp.shape(kernel), loras)
    check_takes_increments(kernel)
    return (kernel + sum(map(to_dense, loras))).astype(kernel.dtype)


def input_shortcut(
    x: Float[Array, "*tokens n"],
    previous_x: Float[Array, "*tokens n"],
    kernel: Float[Array, "*batch n m"],
    lora: LowRank,
) -> Float[Array, "*tokens m"]:
    r"""The outputs of a layer whose LoRA increment sees the previous layer's inputs too.

    No plain layer computes the same: it is not a function of x alone, and cannot be merged.

    Args:
      x: the layer's inputs.
      previous_x: the inputs of the layer before it, of the same shape.
      kernel: the frozen weight W.
      lora: the layer's increment.

    Returns:
      The outputs, in the promoted type of x and the kernel.

    Raises:
      ValueError: shapes that do not fit.

    It computes $y = x W + s\,((x + x')\,a)\,b$, where $x'$ are the previous layer's inputs.

    From [ResLoRA](https://arxiv.org/abs/2402.18039).

    Examples:
      >>> import jax.numpy as jnp
      >>> from oplora_jax import LowRank
      >>> from oplora_jax.reslora import input_shortcut
      >>> lora = LowRank(jnp.ones((3, 1)), jnp.ones((1, 2)))
      >>> input_shortcut(jnp.ones((1, 3)), jnp.ones((1, 3)), jnp.zeros((3, 2)), lora).tolist()
      [[6.0, 6.0]]
    """
    return add_increments(dot(*fit(x, kernel, lora)), add_inputs(x, previous_x), [lora])


def add_increments(y: Array, x: Array, loras: Sequence[LowRank], precision: Any = None) -> Array:
    """y and x times each of the increments, in the type of y and with its sharding."""
    x = x.astype(y.dtype)
    return sum((shard_like(lora_increment(x, lora, precision=precision), y) for lora in loras), y)


def add_inputs(x: Array, previous_x: Array) -> Array:
    """x + x', what the increment of an input shortcut sees; raises ValueError where their shapes differ."""
    if jnp.shape(x) != jnp.shape(previous_x):
        raise ValueError(f"x has shape {jnp.shape(x)}, previous_x {jnp.shape(previous_x)}; they must agree")
    return x + previous_x


def check(kernel: Sequence[int], loras: Sequence[LowRank]) -> None:
    """Raises ValueError unless there are increments and all have the kernel's shape."""
    if not loras:
        raise ValueError("loras is empty; expected the layer's own increment at least")
    for index, lora in enumerate(loras):
        check_factors(lora, f"loras[{index}]")
        if lora.shape != tuple(kernel):
            raise ValueError(f"loras[{index}] has shape {lora.shape}, the kernel {tuple(kernel)}")
