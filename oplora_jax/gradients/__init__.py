"""Gradients at LoRA parameters: captured exactly, projected, measured and clipped."""

from oplora_jax.gradients.clipping import clip_by_global_norm, global_norm
from oplora_jax.gradients.lora_dot import lora_dot
from oplora_jax.gradients.tangent import factor_gradients, full_gradient, tangent_gradient
from oplora_jax.gradients.value_and_grad import grad, value_and_grad

__all__ = [
    "clip_by_global_norm",
    "factor_gradients",
    "full_gradient",
    "global_norm",
    "grad",
    "lora_dot",
    "tangent_gradient",
    "value_and_grad",
]
