"""A run's folder: what is written there, atomically, and how it is read back.

config.json       what was run
metrics.csv       one row for each finished epoch
checkpoint.msgpack  the training state after the last one, until the run is finished
parameters.msgpack  the final parameters; there when the run is finished
"""

import csv
import dataclasses
import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any

import jax
from flax import serialization

from experiments.cifar100 import Cifar100
from experiments.conditioned import Conditioned
from experiments.linear import Linear
from experiments.mnist import Mnist

CHECKPOINT = "checkpoint.msgpack"
PARAMETERS = "parameters.msgpack"

Task = Linear | Mnist | Cifar100 | Conditioned


@dataclasses.dataclass(frozen=True)
class Config:
    """One run: everything its numbers depend on, and where they go."""

    task: Task
    method: str
    learning_rate: float
    seed: int
    output: Path

    def to_json(self) -> str:
        """What the numbers depend on, and nothing else."""
        task = dataclasses.asdict(self.task)
        if task.get("data") != "folder":  # a data set's images are the same wherever they lie
            task.pop("data_dir", None)
        fields = {"method": self.method, "learning_rate": self.learning_rate, "seed": self.seed}
        return json.dumps({"task": self.task.name, **fields, **task}, indent=2, default=str) + "\n"

    @property
    def folder(self) -> Path:
        """The run's folder. A digest of all settings ends its name, so no other run is taken for this one."""
        digest = hashlib.sha256(self.to_json().encode()).hexdigest()[:8]
        name = f"lr{self.learning_rate:g}_seed{self.seed}_{digest}"
        return self.output / self.task.name / self.method / name

    @property
    def finished(self) -> bool:
        """Whether the run is complete on disk."""
        return (self.folder / PARAMETERS).exists()


def write(path: Path, content: bytes) -> None:
    """Writes a file so that it is either the old one or the new one, whatever interrupts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes a table with a header line."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write(path, text.getvalue().encode())


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The metrics of a run's finished epochs, one row each."""
    with open(folder / "metrics.csv", newline="") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    return [{**row, "epoch": int(row["epoch"])} for row in rows]


def save_checkpoint(folder: Path, epoch: int, state: Any) -> None:
    """Keeps the training state after an epoch."""
    write(folder / CHECKPOINT, serialization.to_bytes({"epoch": epoch, "state": state}))


def load_checkpoint(folder: Path, like: Any) -> tuple[int, Any]:
    """(the last finished epoch, the state after it); (0, like) where there is none."""
    path = folder / CHECKPOINT
    if not path.exists():
        return 0, like
    found = serialization.from_bytes({"epoch": 0, "state": like}, path.read_bytes())
    return found["epoch"], jax.tree.map(jax.numpy.asarray, found["state"])
