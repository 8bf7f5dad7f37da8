"""LoRA parameters on a model's kernels: made, merged, restarted, paired, exchanged with other libraries."""

from oplora_jax.adapters.init import init_lora
from oplora_jax.adapters.merge import merge
from oplora_jax.adapters.pairs import from_low_rank, pair_factors, to_low_rank
from oplora_jax.adapters.restart import merge_and_restart, merge_and_restart_layers

__all__ = [
    "from_low_rank",
    "init_lora",
    "merge",
    "merge_and_restart",
    "merge_and_restart_layers",
    "pair_factors",
    "to_low_rank",
]
