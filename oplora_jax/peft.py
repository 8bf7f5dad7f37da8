"""Adapters of Hugging Face PEFT, read and written without PyTorch."""

from oplora_jax.adapters.peft import load_adapter, save_adapter

__all__ = ["load_adapter", "save_adapter"]
