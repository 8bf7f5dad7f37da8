"""`python -m benchmarks encoder`: a training step of the text task's pretrained encoder."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from rich.console import Console

from benchmarks import report
from benchmarks.steps import DEFAULT, NAMES, PLAIN
from experiments.models.checkpoints import bundled_folder
from experiments.text import Batch, Text

SENTENCES, LENGTH = 16, 32
TOKENS = 1000  # how many different ones are drawn; every vocabulary has more


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A training step of the text task's encoder, on 16 sentences of 32 tokens."""

    methods: Annotated[tuple[str, ...], tyro.conf.arg(help=NAMES)] = tuple(
        name for name in DEFAULT if name != PLAIN
    )
    pairs: int = 5
    """Measured steps of each method, in turn with one of lora_adamw's; 0 for the counts alone."""
    output: Path = Path("outputs/benchmark")
    """Folder for encoder.csv and encoder.png."""

    def run(self, console: Console) -> None:
        """Measures, prints a table, and writes it and a figure."""
        bundled_folder()  # the package is there, or it says so before anything is measured
        report.compare(self, "encoder", Text(), data(), console)


def data() -> tuple[Batch, Any, jax.Array]:
    """(a batch of random tokens and labels, the examples' weights, the key of the dropout)."""
    random = np.random.default_rng(0)
    shape = (SENTENCES, LENGTH)
    batch = Batch(
        random.integers(0, TOKENS, shape, np.int32),
        np.ones(shape, bool),
        np.zeros(shape, np.int32),
        random.integers(0, 2, SENTENCES, np.int32),
    )
    return batch, np.ones(SENTENCES, np.float32), jax.random.key(0, impl="rbg")
