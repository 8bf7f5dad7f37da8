"""Tests of oplora_jax."""
