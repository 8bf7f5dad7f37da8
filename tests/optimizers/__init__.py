"""Tests of oplora_jax.optimizers."""
