"""`python -m benchmarks unrolled`: what it takes to compile a step of many layers that are written out."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from benchmarks import report
from benchmarks.blocks import Blocks
from benchmarks.steps import NAMES


@dataclasses.dataclass(frozen=True)
class Unrolled:
    """A training step of the blocks of a small transformer, seven layers of different shapes in each.

    112 LoRA parameters in 7 shapes if nothing is said: for the compile time and the program's size.
    """

    blocks: int = 16
    """How many."""
    width: int = 64
    """Of the residual stream."""
    tokens: int = 64
    """In the sequence."""
    rank: int = 8
    """Of the LoRA parameters."""
    methods: Annotated[tuple[str, ...], tyro.conf.arg(help=NAMES)] = (
        "oplora_1:outer",
        "oplora_2:outer",
        "scaled_oplora",
        "oplora_1:factors",
    )
    pairs: int = 0
    """Measured steps of each method, in turn with one of lora_adamw's; 0 for the counts alone."""
    output: Path = Path("outputs/benchmark")
    """Folder for unrolled.csv and unrolled.png."""

    def run(self, console: Console) -> None:
        """Measures, prints a table, and writes it and a figure."""
        task = Blocks(self.blocks, self.width, self.tokens, self.rank)
        report.compare(self, "unrolled", task, task.data(), console)
