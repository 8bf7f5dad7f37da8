"""LoRA increments merged into the weights that a model knows."""

from typing import Any

import jax

from oplora_jax.adapters.kernel_axes import add_increment
from oplora_jax.adapters.paths import path_name
from oplora_jax.matrix import LowRank, check_factors


def merge(params: Any, lora: dict[str, LowRank]) -> Any:
    """The model's parameters with the LoRA increments added to their kernels.

    For a finished model; and in a loss, for a model whose source you do not want to touch: `value_and_grad`
    takes exact gradients there too, as arrays.

    Args:
      params: the tree that `init_lora` was given, or one with the same paths.
      lora: LoRA parameters by path, as `init_lora` makes them.

    Returns:
      A tree like params, in its types.

    Raises:
      ValueError: a path that params lacks; a kernel of another size, or of integers or float8, which would
        lose the increment.

    Examples:
      >>> import jax.numpy as jnp
      >>> import oplora_jax
      >>> params = {"dense": {"kernel": jnp.ones((4, 6)), "bias": jnp.zeros(6)}}
      >>> lora = {"dense/kernel": oplora_jax.LowRank(jnp.ones((4, 1)), jnp.ones((1, 6)), scale=0.5)}
      >>> float(oplora_jax.merge(params, lora)["dense"]["kernel"][0, 0])
      1.5
    """
    missing = set(lora)

    def add(path: Any, kernel: Any) -> Any:
        name = path_name(path)
        if name not in lora:
            return kernel
        missing.discard(name)
        check_factors(lora[name], name)
        try:
            return add_increment(kernel, lora[name])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    merged = jax.tree.map_with_path(add, params)
    if missing:
        names = ", ".join(path_name(path) for path, _ in jax.tree.leaves_with_path(params))
        raise ValueError(f"{', '.join(sorted(missing))}: no such kernel; the paths are: {names}")
    return merged
