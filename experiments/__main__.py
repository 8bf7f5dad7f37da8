"""The command line: `python -m experiments run|compare linear|mnist`."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from experiments import ExperimentError, methods, report, storage
from experiments.linear import Linear
from experiments.mnist import Mnist
from experiments.progress import describe, progress
from experiments.storage import Config
from experiments.training import train

NAMES = ", ".join(methods.METHODS)


@dataclasses.dataclass(frozen=True)
class Run:
    """Train one method once. An interrupted run goes on where it was; a finished one is not run again."""

    task: Linear | Mnist
    method: Annotated[str, tyro.conf.arg(help=f"{NAMES}; K is a number.")]
    learning_rate: float | None = None
    """The papers' for the method and task if not given."""
    seed: int = 0
    """Of the start and of the order of the examples."""
    output: Path = Path("outputs")
    """Folder that the run's own folder is made in."""


@dataclasses.dataclass(frozen=True)
class Compare:
    """Train several methods, with several seeds and learning rates, and compare them.

    Prints a table, and writes it and figures of the curves. Runs that are there already are not repeated.
    """

    task: Linear | Mnist
    methods: tuple[str, ...]
    """Names as for `run`."""
    learning_rates: tuple[float, ...] = ()
    """For every method; the papers' for each if not given. Several make a figure over them."""
    seeds: tuple[int, ...] = ()
    """The papers' if not given: 0 to 4 for linear, 0 to 2 for mnist."""
    output: Path = Path("outputs")
    """Folder for the runs' folders, summary.csv, curves.png and sweep.png."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit status."""
    command = tyro.cli(
        Run | Compare,
        prog="python -m experiments",
        description=__doc__,
        args=arguments,
        config=(
            tyro.conf.OmitArgPrefixes,
            tyro.conf.OmitSubcommandPrefixes,
            tyro.conf.CascadeSubcommandArgs,
        ),
    )
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    try:
        (run if isinstance(command, Run) else compare)(command, console)
    except (ExperimentError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from the last finished epoch", file=sys.stderr)
        return 130
    return 0


def run(command: Run, console: Console) -> None:
    """Trains one method."""
    config = _config(command, command.method, command.learning_rate, command.seed)
    rows = _train([config], console)[0]
    console.print(f"{_title(config)}: {describe(rows[-1])}", soft_wrap=True)
    console.print(f"in {config.folder}", soft_wrap=True)


def compare(command: Compare, console: Console) -> None:
    """Trains several methods, prints a table and draws the curves."""
    task, output = command.task, command.output
    seeds = command.seeds or task.seeds
    configs = [
        _config(command, method, rate, seed)
        for method in dict.fromkeys(command.methods)
        for rate in dict.fromkeys(command.learning_rates or (None,))
        for seed in dict.fromkeys(seeds)
    ]
    if not configs:
        raise ExperimentError(f"no methods to compare; there are {NAMES} (K is a number)")
    _train(configs, console)
    groups = report.gather(configs)
    rows = report.summary(groups, task.metrics)
    console.print(report.table(rows, task.metrics, len(set(seeds))))
    written = [output / "summary.csv", output / "curves.png"]
    storage.write_rows(written[0], rows)
    report.draw_curves(groups, task.metrics, written[1])
    if len(groups) > len({group.method for group in groups}):
        written.append(output / "sweep.png")
        report.draw_sweep(groups, task.metrics[0], written[2])
    console.print(f"in {', '.join(map(str, written))}", soft_wrap=True)


def _config(command: Run | Compare, method: str, learning_rate: float | None, seed: int) -> Config:
    if learning_rate is None:
        learning_rate = methods.protocol_rate(method, command.task.protocol)
    methods.find(method)
    return Config(command.task, method, learning_rate, seed, command.output)


def _train(configs: list[Config], console: Console) -> list[list[dict]]:
    with progress(console, len(configs)) as begin:
        return [train(config, begin(_title(config))) for config in configs]


def _title(config: Config) -> str:
    return f"{config.method} lr {config.learning_rate:g} seed {config.seed}"


if __name__ == "__main__":
    sys.exit(main())
