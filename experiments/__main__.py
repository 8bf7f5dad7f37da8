"""The command line: `python -m experiments run|compare|ablate TASK`, or `optimizers`.

TASK is linear, mnist, cifar100, text or conditioned.
"""

import dataclasses
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from experiments import ExperimentError, catalogue, methods, report, storage
from experiments.progress import describe, progress
from experiments.storage import Config, Task
from experiments.training import train


@dataclasses.dataclass(frozen=True)
class Run:
    """Train one method once. An interrupted run goes on where it was; a finished one is not run again."""

    task: Task
    method: Annotated[str, tyro.conf.arg(help=methods.NAMES)]
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

    task: Task
    methods: tuple[str, ...]
    """Names as for `run`; `all` for every method, with the usual K."""
    learning_rates: tuple[float, ...] = ()
    """For every method; the papers' for each if not given. Several make a figure over them."""
    rate_factors: tuple[float, ...] = ()
    """Multiples of each method's own learning rate to take instead, as 0.3 1 3."""
    seeds: tuple[int, ...] = ()
    """The papers' if not given: 0 to 4 for linear, 0 to 2 for the others."""
    output: Path = Path("outputs")
    """Folder for the runs' folders, summary.csv, curves.png and sweep.png."""


@dataclasses.dataclass(frozen=True)
class Ablate:
    """Train scaled OPLoRA with every combination of settings, and draw a heat map.

    Prints a table, and writes it and the map. Runs that are there already are not repeated.
    """

    task: Task
    learning_rates: tuple[float, ...] = ()
    """For every combination, which is drawn at the best of them; the method's usual one if not given."""
    damping: tuple[float, ...] = (1e-6, 1e-3, 1e-1)
    """Added to the second moments."""
    power: tuple[float, ...] = (0.25, 0.5, 1.0)
    """Of the damped second moments."""
    structure: tuple[Literal["diagonal", "dense"], ...] = ("diagonal", "dense")
    """Of the second moments."""
    num_iters: tuple[int, ...] = (1, 2)
    """Alternating iterations, K."""
    seeds: tuple[int, ...] = (0,)
    """Of the start and of the order of the examples."""
    output: Path = Path("outputs")
    """Folder for the runs' folders, summary.csv and ablation.png."""


@dataclasses.dataclass(frozen=True)
class Optimizers:
    """Print the table of all optimizers: what each needs, keeps and costs."""

    into: Path | None = None
    """A Markdown file whose table of optimizers is to be replaced instead, as README.md."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit status."""
    command = tyro.cli(
        Run | Compare | Ablate | Optimizers,
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
        commands = {
            Run: run,
            Compare: compare,
            Ablate: ablate,
            Optimizers: optimizers,
        }
        commands[type(command)](command, console)
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
    groups = _groups(command, command.methods, console)
    written = [output / "summary.csv", output / "curves.png"]
    report.draw_curves(groups, task.metrics, written[1])
    if len(groups) > len({group.method for group in groups}):
        written.append(output / "sweep.png")
        report.draw_sweep(groups, task.metrics[0], written[2])
    console.print(f"in {', '.join(map(str, written))}", soft_wrap=True)


def ablate(command: Ablate, console: Console) -> None:
    """Trains the variants of scaled OPLoRA, prints a table and draws the heat map."""
    output = command.output
    settings = (command.structure, command.num_iters, command.damping, command.power)
    variants = {methods.scaled_oplora_name(*values): values for values in itertools.product(*settings)}
    groups = _groups(command, tuple(variants), console)
    report.draw_ablation(groups, variants, command.task.metrics[0], output / "ablation.png")
    console.print(f"in {output / 'summary.csv'}, {output / 'ablation.png'}", soft_wrap=True)


def optimizers(command: Optimizers, console: Console) -> None:
    """Prints the table of all optimizers, in Markdown, or writes it into a file."""
    if command.into is None:
        print(catalogue.markdown())  # no line is to be wrapped
    else:
        catalogue.write_into(command.into)
        console.print(f"in {command.into}", soft_wrap=True)


def _groups(command: Compare | Ablate, names: tuple[str, ...], console: Console) -> list[report.Group]:
    """Trains methods, prints the table and writes it."""
    metrics, seeds = command.task.metrics, command.seeds or command.task.seeds
    configs = [
        _config(command, method, rate, seed)
        for method in methods.expand(names)
        for rate in _rates(command, method)
        for seed in dict.fromkeys(seeds)
    ]
    if not configs:
        raise ExperimentError(f"no methods to compare; there are {methods.NAMES}")
    _train(configs, console)
    groups = report.gather(configs)
    rows = report.summary(groups, metrics)
    console.print(report.table(rows, metrics, len(set(seeds))))
    storage.write_rows(command.output / "summary.csv", rows)
    return groups


def _rates(command: Compare | Ablate, method: str) -> list[float | None]:
    """The learning rates to try, None for the method's own."""
    factors = getattr(command, "rate_factors", ())
    if not factors:
        return list(dict.fromkeys(command.learning_rates or (None,)))
    if command.learning_rates:
        raise ExperimentError("both learning-rates and rate-factors are given; give one")
    own = methods.protocol_rate(method, command.task.protocol)
    return [float(f"{own * factor:.3g}") for factor in dict.fromkeys(factors)]


def _config(command: Run | Compare | Ablate, method: str, learning_rate: float | None, seed: int) -> Config:
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
