"""`python -m benchmarks stack`: a training step of many layers of one size."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from benchmarks import report
from benchmarks.layers import Layers
from benchmarks.steps import DEFAULT, NAMES


@dataclasses.dataclass(frozen=True)
class Stack:
    """A training step of a stack of residual layers."""

    layers: int = 12
    """How many."""
    width: int = 768
    """Inputs and outputs of a layer."""
    tokens: int = 4096
    """In a batch."""
    rank: int = 8
    """Of the LoRA parameters."""
    scan: bool = False
    """Whether the layers run in a loop over stacked parameters."""
    checkpoint: bool = False
    """Whether a layer's activations are computed again in the backward pass."""
    methods: Annotated[tuple[str, ...], tyro.conf.arg(help=NAMES)] = DEFAULT
    pairs: int = 5
    """Measured steps of each method, in turn with one of lora_adamw's; 0 for the counts alone."""
    output: Path = Path("outputs/benchmark")
    """Folder for stack.csv and stack.png; stack_scan.csv with --scan, stack_checkpoint.csv, and so on."""

    def run(self, console: Console) -> None:
        """Measures, prints a table, and writes it and a figure."""
        task = Layers(self.layers, self.width, self.tokens, self.rank, self.scan, self.checkpoint)
        name = "stack" + "_scan" * self.scan + "_checkpoint" * self.checkpoint
        report.compare(self, name, task, task.data(), console)
