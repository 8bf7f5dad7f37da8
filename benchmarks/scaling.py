"""`python -m benchmarks scaling`: how the cost of a training step grows with depth, width and tokens."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks import powers
from benchmarks.layers import Layers
from benchmarks.report import machine, write_settings
from benchmarks.steps import BASELINE, NAMES, Variant, expand, parse, prepare
from experiments import ExperimentError, storage
from experiments.hooks import progress

# (name of the column, title, unit)
QUANTITIES = (
    ("flops", "operations, 10^9", 1e9),
    ("bytes_accessed", "accessed, MiB", 2**20),
    ("temporary_bytes", "temporary memory, MiB", 2**20),
    ("compile_seconds", "compile time, seconds", 1.0),
)

VARIED = ("layers", "width", "tokens")


@dataclasses.dataclass(frozen=True)
class Scaling:
    """How a training step of the stack grows with layers, width and tokens.

    Each is varied alone, with the others at the least of theirs. Only what XLA counts, and compile times.
    """

    layers: tuple[int, ...] = (6, 12, 24, 48)
    """One after the other, and also in a loop over stacked parameters ("scanned")."""
    widths: tuple[int, ...] = (256, 512, 1024, 2048)
    """Inputs and outputs of a layer."""
    tokens: tuple[int, ...] = (512, 1024, 2048, 4096)
    """In a batch."""
    rank: int = 8
    """Of the LoRA parameters."""
    methods: Annotated[tuple[str, ...], tyro.conf.arg(help=NAMES)] = (
        BASELINE,
        "oplora_1:outer",
        "oplora_1:dense",
        "oplora_1:factors",
        "scaled_oplora",
    )
    output: Path = Path("outputs/benchmark")
    """Folder for scaling.csv, and scaling_layers.png, scaling_width.png and scaling_tokens.png."""

    def run(self, console: Console) -> None:
        """Counts, prints a table, and writes it and the figures."""
        steps = _steps(self)
        write_settings(self, "scaling")
        rows: list[dict[str, Any]] = []
        begin = progress(len(steps))
        for row in measure(steps, begin):
            rows.append(row)
            storage.write_rows(self.output / "scaling.csv", rows)
        console.print(table(rows))
        for varied in VARIED:
            draw(rows, varied, self.output / f"scaling_{varied}.png")
        figures = ", ".join(f"scaling_{varied}.png" for varied in VARIED)
        console.print(f"in {self.output}: scaling.csv, {figures} and scaling.json", soft_wrap=True)


class Step(NamedTuple):
    """A training step, and what is varied with it."""

    varied: str
    task: Layers
    variant: Variant


def _steps(command: Scaling) -> list[Step]:
    sizes = {
        name: sorted(set(values))
        for name, values in zip(VARIED, (command.layers, command.widths, command.tokens), strict=True)
    }
    names = expand(command.methods)
    if not names or not all(sizes.values()):
        raise ExperimentError("no methods, layers, widths or tokens; give at least one of each")
    least = {name: values[0] for name, values in sizes.items()}
    steps = []
    for varied, values in sizes.items():
        for scan in (False, True) if varied == "layers" else (False,):
            for value in values:
                task = Layers(**{**least, varied: value}, rank=command.rank, scan=scan)
                steps += [Step(varied, task, parse(name, task)) for name in names]
    return steps


def measure(steps: list[Step], begin: Callable[[str], Callable[[int, int, dict], None]]) -> Iterator[dict]:
    """One row for each step. What is the least of all sizes is in every sweep, and counted once."""
    known = {}
    for varied, task, variant in steps:
        kind = f"{task.layers} {'scanned' if task.scan else 'layers'}"
        notify = begin(f"{variant.name}, {kind}, width {task.width}, tokens {task.tokens}")
        notify(0, 1, {})
        if (task, variant) not in known:
            known[task, variant] = prepare(task, task.data(), variant).counts
        counts = known[task, variant]
        sizes = {name: getattr(task, name) for name in (*VARIED, "rank", "scan")}
        yield {"varied": varied, "method": variant.name, **sizes, **counts._asdict()}
        notify(1, 1, {})


def table(rows: list[dict[str, Any]]) -> Table:
    """All rows, for the screen."""
    shown = Table(title=f"a training step; {machine()}", title_justify="left", box=SIMPLE_HEAD)
    for name in ("method", *VARIED, "scanned", *(title for _, title, _ in QUANTITIES)):
        shown.add_column(name, justify="left" if name == "method" else "right")
    for row in rows:
        shown.add_row(
            row["method"],
            *(str(row[name]) for name in VARIED),
            "yes" if row["scan"] else "no",
            *(f"{row[name] / unit:.3g}" for name, _, unit in QUANTITIES),
        )
    return shown


def draw(rows: list[dict[str, Any]], varied: str, path: Path) -> None:
    """Draws each quantity against what is varied, one line for each method; dashed where it is scanned."""
    rows = [row for row in rows if row["varied"] == varied]
    names = list(dict.fromkeys(row["method"] for row in rows))
    panels = []
    for quantity, title, unit in QUANTITIES:
        lines = []
        for color, name in enumerate(names):
            for scan in (False, True):
                same = [row for row in rows if row["method"] == name and row["scan"] == scan]
                if same:
                    label = f"{name}, scanned" if scan else name
                    x, y = [row[varied] for row in same], [row[quantity] / unit for row in same]
                    lines.append(powers.Line(label, x, y, color, dashed=scan))
        panels.append(powers.Panel(varied, title, lines))
    powers.draw(panels, 2, path)
