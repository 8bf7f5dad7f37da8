"""A run's folder: what is written there, atomically, and how it is read back.

config.json       what was run
metrics.csv       one row for each evaluation
checkpoint.msgpack  the training state after the last one, until the run is finished
parameters.msgpack  the final parameters that were trained; there when the run is finished
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
from experiments.text import Text

CHECKPOINT = "checkpoint.msgpack"
PARAMETERS = "parameters.msgpack"

Task = Linear | Mnist | Cifar100 | Text | Conditioned


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
        if task.get("data") != "folder":
            task.pop("data_dir", None)  # where a data set lies changes no number
        task = {k: v.name if isinstance(v, Path) else v for k, v in task.items()}
        fields = {"method": self.method, "learning_rate": self.learning_rate, "seed": self.seed}
        return json.dumps({"task": self.task.name, **fields, **task}, indent=2) + "\n"

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
    """The metrics of a run, one row for each evaluation."""
    with open(folder / "metrics.csv", newline="") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    return [{**row, "epoch": whole(row["epoch"])} for row in rows]


def whole(number: float) -> int | float:
    """The number, as an integer if it is one."""
    return int(number) if number.is_integer() else number


def save_checkpoint(folder: Path, evaluations: int, state: Any) -> None:
    """Keeps the training state after so many evaluations."""
    write(folder / CHECKPOINT, serialization.to_bytes({"evaluations": evaluations, "state": state}))


def load_checkpoint(folder: Path, like: Any) -> tuple[int, Any]:
    """(how many evaluations there were, the state after them); (0, like) where there is none."""
    path = folder / CHECKPOINT
    if not path.exists():
        return 0, like
    found = serialization.from_bytes({"evaluations": 0, "state": like}, path.read_bytes())
    return found["evaluations"], jax.tree.map(jax.numpy.asarray, found["state"])
