"""ResLoRA: residual paths between the LoRA parameters of consecutive layers, while they train."""

from oplora_jax.adapters.reslora import block_shortcut, input_shortcut, merge_block

__all__ = ["block_shortcut", "input_shortcut", "merge_block"]
