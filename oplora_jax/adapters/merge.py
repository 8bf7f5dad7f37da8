"""LoRA increments merged into the weights that a model knows."""

from typing import Any

import jax

from oplora_jax.adapters.kernel_axes import add_increment
from oplora_jax.adapters.paths import path_name
from oplora_jax.matrix import LowRank, check_factors


def merge(params: Any, lora: dict[str, LowRank]) -> Any:
    """The model's parameters with the LoRA increments added to their kernels.

    Inside a loss it is a use of the LoRA parameters that `value_and_grad` captures, as a dense gradient.

    Args:
      params: the tree that `init_lora` was given, or one with the same paths; the result is like it.
      lora: LoRA parameters by path, each a matrix of its kernel's axes as `init_lora` makes them.

    Raises:
      ValueError: a path that params lacks, or a kernel of another size, or of a type that would lose the
        increment, of integers or of float8.
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
