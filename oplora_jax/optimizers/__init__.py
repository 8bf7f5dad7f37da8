"""The optimizers, one file each. What is imported here is exported; `OPTIMIZERS` has the facts of each."""

from typing import TYPE_CHECKING

from oplora_jax.optimizers._facts import OPTIMIZERS
from oplora_jax.optimizers._lift import at_step as at_step
from oplora_jax.optimizers._lift import each as each
from oplora_jax.optimizers._lift import lora_optimizer as lora_optimizer
from oplora_jax.optimizers.altlora import altlora as altlora
from oplora_jax.optimizers.altlora import altlora_plus as altlora_plus
from oplora_jax.optimizers.lora_fa import lora_fa as lora_fa
from oplora_jax.optimizers.lora_plus import lora_plus as lora_plus
from oplora_jax.optimizers.lora_pre import lora_pre as lora_pre
from oplora_jax.optimizers.lora_pro import lora_pro as lora_pro
from oplora_jax.optimizers.lora_pro import lora_pro_sgd as lora_pro_sgd
from oplora_jax.optimizers.lora_rite import lora_rite as lora_rite
from oplora_jax.optimizers.mofasgd import mofasgd as mofasgd
from oplora_jax.optimizers.oplora import oplora as oplora
from oplora_jax.optimizers.reflora import reflora as reflora
from oplora_jax.optimizers.scaled import scaled_adamw as scaled_adamw
from oplora_jax.optimizers.scaled import scaled_gd as scaled_gd
from oplora_jax.optimizers.scaled_oplora import scaled_oplora as scaled_oplora
from oplora_jax.optimizers.set_to_zero import set_to_zero as set_to_zero
from oplora_jax.optimizers.svdlora import svdlora as svdlora

if not TYPE_CHECKING:  # type checkers take the names above, and would take no list but a literal one
    __all__ = [*OPTIMIZERS, "at_step", "each", "lora_optimizer", "set_to_zero"]
