"""A run's folder: what is written there, atomically, and how it is read back.

config.json  what was run
metrics.csv  one row for each evaluation
checkpoints  the training state, now and then, until the run is finished
parameters   the final parameters that were trained, by Orbax; there when the run is finished
"""

import dataclasses
import hashlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
import pandas as pd

from experiments.methods import Method
from experiments.task import Task


@dataclasses.dataclass(frozen=True)
class Config:
    """One run: everything its numbers depend on, and where they go."""

    task: Task
    method: Method
    learning_rate: float
    seed: int
    output: Path

    def to_json(self) -> str:
        """What the numbers depend on, and nothing else."""
        task = dataclasses.asdict(self.task)
        if task.get("data") != "folder":
            task.pop("data_dir", None)  # where a data set lies changes no number
        task = {k: v.name if isinstance(v, Path) else v for k, v in task.items()}
        fields = {
            "task": self.task.name,
            "method": self.method.preset,
            "settings": self.method.settings,
            "learning_rate": self.learning_rate,
            "seed": self.seed,
        }
        return json.dumps(fields | task, indent=2, default=str) + "\n"

    @property
    def folder(self) -> Path:
        """The run's folder. A digest of all settings ends its name, so no other run is taken for this one."""
        digest = hashlib.sha256(self.to_json().encode()).hexdigest()[:8]
        changes = [f"{name}={value}" for name, value in self.method.changes]
        name = "_".join([*changes, f"lr{self.learning_rate:g}", f"seed{self.seed}", digest])
        return self.output / self.task.name / self.method.preset / name

    @property
    def finished(self) -> bool:
        """Whether the run is complete on disk."""
        return (self.folder / "parameters").exists()


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
    write(path, pd.DataFrame(rows, dtype=object).to_csv(index=False).encode())


def read_metrics(folder: Path) -> pd.DataFrame:
    """The metrics of a run, one row for each evaluation, to the last digit."""
    return pd.read_csv(folder / "metrics.csv", dtype=str).astype(float)


class Metrics:
    """A hook of the training loop that writes metrics.csv.

    Args:
      folder: the run's.
      evaluations: how many of the rows that are there already count.
    """

    def __init__(self, folder: Path, evaluations: int):
        self._path = folder / "metrics.csv"
        self._rows = read_metrics(folder)[:evaluations].to_dict("records") if evaluations else []

    def __call__(self, step: int, steps: int, metrics: dict[str, float], state: Any) -> None:
        """Adds the metrics of an evaluation."""
        if metrics:
            self._rows.append(metrics)
            write_rows(self._path, self._rows)


class Checkpoints:
    """A hook of the training loop that keeps the state after an evaluation; to be closed.

    Args:
      folder: the run's.
      seconds: the least between two of them.
    """

    def __init__(self, folder: Path, seconds: float):
        self._folder, self._seconds, self._last = folder, seconds, time.monotonic()
        # One after the other, and not beside the training: the cores are few.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=1, enable_async_checkpointing=False, cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager((folder / "checkpoints").absolute(), options=options)

    def restore(self, state: Any) -> tuple[int, Any]:
        """(the steps that are done, the state after them); (0, the state) where there is none."""
        step = self._manager.latest_step()
        if step is None:
            return 0, state
        return step, self._manager.restore(step, args=ocp.args.StandardRestore(state))

    def __call__(self, step: int, steps: int, metrics: dict[str, float], state: Any) -> None:
        """Keeps the state, if it is time."""
        if metrics and step < steps and time.monotonic() - self._last >= self._seconds:
            self._manager.save(step, args=ocp.args.StandardSave(state))
            self._last = time.monotonic()

    def finish(self, parameters: Any) -> None:
        """Writes the final parameters, which ends the run, and removes the checkpoints."""
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save((self._folder / "parameters").absolute(), parameters)
        self.close()
        shutil.rmtree(self._folder / "checkpoints")

    def close(self) -> None:
        """Closes Orbax's manager."""
        self._manager.close()
