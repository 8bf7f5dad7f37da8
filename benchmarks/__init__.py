"""What the library costs: counted operations and memory, and measured time.

Everything is next to LoRA with AdamW: `python -m benchmarks --help`.
"""
