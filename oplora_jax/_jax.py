"""What is not public in JAX, imported here alone; `tests/test_jax_names.py` says what each name is for."""

# ruff: noqa: F401
from jax.core import AbstractValue, Tracer
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Primitive
from jax.extend.source_info_util import current_name_stack, user_context
from jax.interpreters.ad import primitive_jvps, primitive_transposes
from jax.interpreters.batching import primitive_batchers
from jax.interpreters.mlir import register_lowering
