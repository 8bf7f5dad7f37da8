"""Tables and figures of training steps next to that of the baseline."""

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.figures import label_ticks, plt, write_figure
from benchmarks.steps import BASELINE, Prepared, at_least, expand, measure, parse, prepare
from experiments import storage
from experiments.hooks import progress
from experiments.task import Task

# (title, name of the column, unit and its name)
_COLUMNS = (
    ("flops", "flops", 1e9, "G"),
    ("accessed", "bytes_accessed", 2**30, "GiB"),
    ("temporary", "temporary_bytes", 2**20, "MiB"),
    ("peak", "peak_bytes", 2**20, "MiB"),
    ("state", "optimizer_bytes", 2**20, "MiB"),
    ("instructions", "instructions", 1, ""),
    ("fusions", "fusions", 1, ""),
    ("compile", "compile_seconds", 1, "s"),
)
_PANELS = {
    "flops": "operations",
    "bytes_accessed": "bytes accessed",
    "temporary_bytes": "temporary memory",
    "instructions": "instructions",
    "time_ratio": "time",
}


def compare(command: Any, name: str, task: Task, data: Sequence[Any], console: Console) -> None:
    """Measures a command's methods on a task, prints the table, and writes it and the figure.

    Args:
      command: its settings, methods, pairs and output among them.
      name: of the files.
      task: as for `measure`.
      data: likewise.
      console: to print on.

    Raises:
      ExperimentError: settings that cannot be measured.
    """
    variants = [parse(z, task) for z in expand([BASELINE, *command.methods])]
    compare_variants(command, name, partial(prepare, task, data), variants, console)


def compare_variants(
    command: Any,
    name: str,
    prepare: Callable[[Any], Prepared],
    variants: Sequence[Any],
    console: Console,
) -> None:
    """The same for any steps, as `measure` takes them."""
    at_least(0, pairs=command.pairs)
    write_settings(command, name)
    rows: list[dict[str, Any]] = []
    begin = progress(len(variants))
    for row in measure(prepare, variants, command.pairs, begin):
        rows.append(row)
        storage.write_rows(command.output / f"{name}.csv", rows)  # what is measured stays
    console.print(table(rows))
    draw_ratios(rows, command.output / f"{name}.png")
    console.print(f"in {command.output / name}.csv, {name}.png and {name}.json", soft_wrap=True)


def write_settings(command: Any, name: str) -> None:
    """Writes what the numbers depend on."""
    settings = {"settings": dataclasses.asdict(command), "machine": machine()}
    storage.write(
        command.output / f"{name}.json", json.dumps(settings, default=str, indent=2).encode() + b"\n"
    )


def machine() -> str:
    """What measures."""
    device = jax.devices()[0]
    return f"jax {jax.__version__} on {device.device_kind}, {os.cpu_count()} cores"


def table(rows: list[dict[str, Any]]) -> Table:
    """The baseline's quantities, and the others' in their units, for the screen."""
    shown = Table(title=f"a training step; {machine()}", title_justify="left", box=SIMPLE_HEAD)
    shown.add_column("method", no_wrap=True)
    for title, *_ in _COLUMNS:
        shown.add_column(title, justify="right", no_wrap=True)
    shown.add_column("flops with decompositions", justify="right")
    timed = rows[0]["milliseconds"] is not None
    if timed:
        shown.add_column("time (least, largest)", justify="right", no_wrap=True)
        shown.add_column("time / bound", justify="right", no_wrap=True)
    for row in rows:
        cells = [f"{row[f'{name}_ratio']:.3f}" for _, name, *_ in _COLUMNS]
        if row is rows[0]:
            cells = [_quantity(row[name], unit, of) for _, name, unit, of in _COLUMNS]
        cells.append(f"{_operations(row) / _operations(rows[0]):.3f}")
        if timed:
            ratios = (row[f"time_ratio{part}"] for part in ("", "_least", "_largest"))
            cells.append("{:.2f} ({:.2f}, {:.2f})".format(*ratios))
            if row is rows[0]:
                cells[-1] = f"{row['milliseconds']:.3g} ms"
            cells.append(f"{row['time_ratio'] / row['bound_ratio']:.2f} ({row['bound_by']})")
        shown.add_row(row["method"], *cells)
    shown.caption = f"below the first row in units of {rows[0]['method']}'s"
    if timed:
        shown.caption += "; bound: the flops at the rate of a large product, or the bytes at that of a copy"
    return shown


def _quantity(value: float, unit: float, name: str) -> str:
    return f"{value / unit:.3g} {name}" if name else str(value)


def _operations(row: dict[str, Any]) -> float:
    return row["flops"] + row["decomposition_flops"]


def draw_ratios(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws what the methods cost in units of the baseline's cost, one panel a quantity.

    Operations are those XLA counts, and with decompositions hollow; of times median, least and largest, and
    what bounds them.
    """
    panels = [name for name in _PANELS if name != "time_ratio" or rows[0][name] is not None]
    figure, axes = plt.subplots(
        1,
        len(panels),
        figsize=(2 + 3 * len(panels), 1.2 + 0.24 * len(rows)),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    places = range(len(rows))
    for axis, name in zip(axes[0], panels, strict=True):
        if name == "time_ratio":
            ends = [(row["time_ratio_least"], row["time_ratio_largest"]) for row in rows]
            axis.hlines(places, *zip(*ends, strict=True), color="tab:blue")
            values = [row[name] for row in rows]
            axis.plot([row["bound_ratio"] for row in rows], places, "|", color="black")
        else:
            values = [row[f"{name}_ratio"] for row in rows]
        if name == "flops":
            whole = [_operations(row) / _operations(rows[0]) for row in rows]
            axis.plot(whole, places, "o", color="tab:blue", fillstyle="none")
        axis.plot(values, places, "o", color="tab:blue", markersize=4)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set(xscale="log", title=_PANELS[name])
        label_ticks(axis.xaxis)
        axis.grid(alpha=0.3, which="both")
    axes[0, 0].set_yticks(places, [row["method"] for row in rows])
    axes[0, 0].set_ylim(len(rows) - 0.5, -0.5)
    note = "hollow: with the decompositions, which XLA does not count"
    if rows[0]["time_ratio"] is not None:
        note += "; dashes: what bounds the time"
    figure.supxlabel(f"in units of {rows[0]['method']}'s; {note}", fontsize="medium")
    write_figure(figure, path)
