"""LoRA optimizers that step like full fine-tuning, as Optax gradient transformations."""

import contextlib as _contextlib

from oplora_jax import optimizers
from oplora_jax.adapters import (
    from_low_rank,
    init_lora,
    merge,
    merge_and_restart,
    merge_and_restart_layers,
    pair_factors,
    to_low_rank,
)
from oplora_jax.gradients import (
    clip_by_global_norm,
    factor_gradients,
    full_gradient,
    global_norm,
    grad,
    lora_dot,
    tangent_gradient,
    value_and_grad,
)
from oplora_jax.lorsum import lorsum
from oplora_jax.matrix import DenseGradient, LowRank, OuterProduct, is_low_rank, to_dense
from oplora_jax.metrics import KroneckerMetric
from oplora_jax.norms import frobenius_norm, inner_product
from oplora_jax.optimizers import *  # noqa: F403
from oplora_jax.optimizers.in_backward import value_and_update
from oplora_jax.svd import svd

with _contextlib.suppress(ImportError):  # without Flax, or with one too old for oplora_jax.linen and nnx
    from oplora_jax import _flax as _flax

__version__ = "0.1.0"

__all__ = [
    "DenseGradient",
    "KroneckerMetric",
    "LowRank",
    "OuterProduct",
    "clip_by_global_norm",
    "factor_gradients",
    "frobenius_norm",
    "from_low_rank",
    "full_gradient",
    "global_norm",
    "grad",
    "init_lora",
    "inner_product",
    "is_low_rank",
    "lora_dot",
    "lorsum",
    "merge",
    "merge_and_restart",
    "merge_and_restart_layers",
    "pair_factors",
    "svd",
    "tangent_gradient",
    "to_dense",
    "to_low_rank",
    "value_and_grad",
    "value_and_update",
]
__all__ += optimizers.__all__
