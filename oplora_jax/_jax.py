"""What is not public in JAX, imported here alone; `tests/test_jax_names.py` says what each name is for."""

# ruff: noqa: F401
from jax.core import AbstractValue, Tracer
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Primitive
from jax.interpreters.ad import Zero, add_tangents, instantiate_zeros, primitive_jvps
from jax.interpreters.batching import primitive_batchers
from jax.interpreters.mlir import register_lowering
