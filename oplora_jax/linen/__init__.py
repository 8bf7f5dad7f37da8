"""LoRA layers for Flax linen, and LoRA on the layers of an existing model."""

from oplora_jax import _flax as _flax
from oplora_jax.linen.layers import LoRAConv, LoRAConvTranspose, LoRADense, LoRADenseGeneral, LoRAEinsum
from oplora_jax.linen.loraize import loraize
from oplora_jax.linen.parameters import add_lora, merge
from oplora_jax.linen.reslora import BlockShortcutDense, InputShortcutDense, merge_shortcuts

__all__ = [
    "BlockShortcutDense",
    "InputShortcutDense",
    "LoRAConv",
    "LoRAConvTranspose",
    "LoRADense",
    "LoRADenseGeneral",
    "LoRAEinsum",
    "add_lora",
    "loraize",
    "merge",
    "merge_shortcuts",
]
