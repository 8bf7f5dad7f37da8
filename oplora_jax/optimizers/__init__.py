"""The optimizers, one file each. `OPTIMIZERS` has the facts of each."""

from oplora_jax.optimizers._facts import OPTIMIZERS as OPTIMIZERS
from oplora_jax.optimizers._lift import at_step, each, lora_optimizer
from oplora_jax.optimizers.altlora import altlora, altlora_plus
from oplora_jax.optimizers.lora_fa import lora_fa
from oplora_jax.optimizers.lora_plus import lora_plus
from oplora_jax.optimizers.lora_pre import lora_pre
from oplora_jax.optimizers.lora_pro import lora_pro, lora_pro_sgd
from oplora_jax.optimizers.lora_rite import lora_rite
from oplora_jax.optimizers.mofasgd import mofasgd
from oplora_jax.optimizers.oplora import oplora
from oplora_jax.optimizers.reflora import reflora
from oplora_jax.optimizers.scaled import scaled_adamw, scaled_gd
from oplora_jax.optimizers.scaled_oplora import scaled_oplora
from oplora_jax.optimizers.set_to_zero import set_to_zero
from oplora_jax.optimizers.svdlora import svdlora

__all__ = [
    "altlora",
    "altlora_plus",
    "at_step",
    "each",
    "lora_fa",
    "lora_optimizer",
    "lora_plus",
    "lora_pre",
    "lora_pro",
    "lora_pro_sgd",
    "lora_rite",
    "mofasgd",
    "oplora",
    "reflora",
    "scaled_adamw",
    "scaled_gd",
    "scaled_oplora",
    "set_to_zero",
    "svdlora",
]
