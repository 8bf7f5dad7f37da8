"""LoRA layers and gradients for Flax NNX."""

from oplora_jax import _flax as _flax
from oplora_jax.nnx.gradients import value_and_grad
from oplora_jax.nnx.layers import LoRAConv, LoRAConvTranspose, LoRAEinsum, LoRALinear, LoRALinearGeneral
from oplora_jax.nnx.loraize import loraize, merge
from oplora_jax.nnx.reslora import BlockShortcutLinear, InputShortcutLinear

__all__ = [
    "BlockShortcutLinear",
    "InputShortcutLinear",
    "LoRAConv",
    "LoRAConvTranspose",
    "LoRAEinsum",
    "LoRALinear",
    "LoRALinearGeneral",
    "loraize",
    "merge",
    "value_and_grad",
]
