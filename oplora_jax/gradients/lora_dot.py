"""The one product through which layers apply their LoRA."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from oplora_jax.gradients.matmul_order import dot, multiply
from oplora_jax.marker import mark
from oplora_jax.matrix import LowRank, check_factors
from oplora_jax.sharding import entries, explicit_mesh, partition, shard_like, under_auto_sharding


def lora_dot(
    x: Float[Array, "*tokens n"],
    kernel: Float[Array, "*batch n m"],
    lora: LowRank,
    *,
    precision: Any = None,
    out_sharding: NamedSharding | PartitionSpec | None = None,
) -> Float[Array, "*tokens m"]:
    """The outputs x (W + s a b) of a dense layer with LoRA.

    Use it in the place of x @ kernel in a model of your own. `value_and_grad` takes the exact gradient of the
    whole weight here; `jax.grad` gives the gradients of the factors, as usual.

    Args:
      x: inputs, with any number of leading axes. They begin with the batch axes of the kernel, if it has any.
      kernel: the frozen weight W.
      lora: the increment s a b, of the kernel's shape. It is cast to the type of x @ kernel.
      precision: of all products, forward and backward, as for `jnp.dot`.
      out_sharding: of the result, as for `jnp.dot`. A mesh with explicit axes asks for it where x @ kernel
        contracts an axis that is sharded in both. The factors may be sharded in any way.

    Returns:
      x (W + s a b), in the promoted type of x and the kernel, sharded as x @ kernel.

    Raises:
      ValueError: shapes that do not fit.

    It multiplies in the order of the fewest operations: with more than n m / (n + m) tokens (under `jax.vmap`
    those of one example) the increment is added to the weight first. In less than float32, and on a mesh with
    explicit axes, it never is.

    After [RunLoRA](https://arxiv.org/abs/2312.03415).

    Examples:
      >>> import jax.numpy as jnp
      >>> from oplora_jax import LowRank, lora_dot
      >>> lora = LowRank(jnp.ones((3, 1)), jnp.ones((1, 2)), scale=0.5)
      >>> lora_dot(jnp.ones((4, 3)), jnp.zeros((3, 2)), lora)[0].tolist()
      [1.5, 1.5]
    """
    x, kernel = fit(x, kernel, lora)
    # Merged in less than float32, the weights would round small increments away. On a mesh with explicit axes
    # the kernel's own product is the user's to shard.
    on_mesh = out_sharding is not None or explicit_mesh((x, kernel, lora)) is not None
    if jnp.finfo(x.dtype).bits >= 32 and not on_mesh:
        precision = _precision(precision)
        a, b = lora.a.astype(x.dtype), lora.b.astype(x.dtype)
        y = multiply(x, kernel, a, b, lora.scale, precision)
        return mark("dot", x, y, lora.a, lora.b, kernel, scale=lora.scale, precision=precision)
    y = dot(x, kernel, precision=precision, out_sharding=out_sharding)
    return y + shard_like(lora_increment(x, lora, precision=precision), y)


def lora_increment(
    x: Float[Array, "*tokens n"], lora: LowRank, *, precision: Any = None
) -> Float[Array, "*tokens m"]:
    """x times the increment alone, in the type of x: what `lora_dot` adds to the layer's own product."""
    precision = _precision(precision)
    product = lambda x, a, b: dot(dot(x, a, precision=precision) * lora.scale, b, precision=precision)
    a, b = lora.a.astype(x.dtype), lora.b.astype(x.dtype)
    y = under_auto_sharding(product, lambda: partition(*entries(x)[:-1], entries(b)[-1]), x, a, b)
    return mark("dot", x, y, lora.a, lora.b, scale=lora.scale, precision=precision)


def _precision(precision: Any) -> Any:
    """Read here: the backward pass is traced later, when the user's context may be over."""
    return jax.config.jax_default_matmul_precision if precision is None else precision


def fit(
    x: Float[Array, "*tokens n"], kernel: Float[Array, "*batch n m"], lora: LowRank
) -> tuple[Array, Array]:
    """x and the kernel in their common type; raises ValueError where they or `lora` do not fit together."""
    check_factors(lora, "lora")
    if jnp.shape(kernel) != lora.shape:
        raise ValueError(f"kernel has shape {jnp.shape(kernel)}, lora {lora.shape}; they must agree")
    batch = lora.shape[:-2]
    if jnp.ndim(x) < 1 + len(batch) or x.shape[-1] != lora.shape[-2] or x.shape[: len(batch)] != batch:
        expected = ", ".join([*map(str, batch), "...", str(lora.shape[-2])])
        raise ValueError(f"x has shape {jnp.shape(x)}; a kernel {lora.shape} takes ({expected})")
    dtype = jnp.result_type(x, kernel)
    return x.astype(dtype), kernel.astype(dtype)
