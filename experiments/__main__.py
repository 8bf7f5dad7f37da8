"""The command line: `python -m experiments run|compare TASK --method NAME`, `report FOLDER`, or `optimizers`.

TASK is linear, mnist, cifar100, text or lm. Behind --method NAME come the settings in which the
method is changed, arguments of its optimizer: --method oplora --num-iters 2 --momentum-rank 16, and its
--learning-rate. `compare` takes several names, --method svdlora lora_adamw, and values, --num-iters 1 2 8,
of which all combinations are trained, and --method again for others. experiments/presets.toml has the names;
all stands for every one. Parameters that are no LoRA train by one AdamW at the task's --others-rate.
"""

import dataclasses
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import tyro

from benchmarks import catalogue
from experiments import ExperimentError, hooks, methods, storage, usage
from experiments.cifar100 import Cifar100
from experiments.linear import Linear
from experiments.lm import Lm
from experiments.methods import Method
from experiments.mnist import Mnist
from experiments.storage import Config
from experiments.text import Text
from experiments.training import train

Task = Linear | Mnist | Cifar100 | Text | Lm
TASKS = {task.__name__.lower(): task for task in Task.__args__}
FACTORS = (0.1, 0.316, 1, 3.16, 10)  # of a method's own rate, in a sweep
EXTENSIONS = 2  # of a sweep whose best is at an end


@dataclasses.dataclass(frozen=True)
class Training:
    """What all that trains has in common."""

    task: Task
    output: Path = Path("outputs")
    """Folder for the runs' own folders, and for a comparison's table and figures."""
    tensorboard: bool = False
    """Write the metrics for TensorBoard too; it takes tensorboardX."""


@dataclasses.dataclass(frozen=True)
class Run(Training):
    """Train one method once. An interrupted run goes on where it was; a finished one is not run again."""

    seed: int = 0
    """Of the start and of the order of the examples."""


@dataclasses.dataclass(frozen=True)
class Compare(Training):
    """Train several methods, with several seeds and learning rates, and compare them.

    Each method is shown on the test data, at the learning rate that is its best on the validation data.
    Prints a table; writes summary.csv, curves.png, with several learning rates sweep.csv and sweep.png, and
    with several values of two settings or more of a method heat_map.png. Runs that are there already are not
    repeated.
    """

    learning_rates: tuple[float, ...] = ()
    """For every method without its own --learning-rate; the papers' if not given."""
    rate_factors: tuple[float, ...] = ()
    """Multiples of each method's own learning rate to take instead, as 0.3 1 3."""
    sweep: bool = False
    """First one seed at each learning rate, by default at five half a decade apart around each method's own,
    and at one further while the best is at an end, at most twice; then all seeds at the best."""
    seeds: tuple[int, ...] = ()
    """The papers' if not given: 0 to 4 for linear, 0 to 2 for the others."""


@dataclasses.dataclass(frozen=True)
class Report:
    """Tell of all runs in folders, also of other machines; each method at its best rate on validation data.

    Prints tables; writes overview.csv, and for each task TASK_sweep.png and TASK_curves.png.
    """

    folders: tyro.conf.Positional[tuple[Path, ...]] = (Path("outputs"),)
    """Of config.json and metrics.csv, in any depth: all else of a run's folder may be gone."""
    output: Path = Path("outputs/report")
    """Folder for the table and the figures."""


@dataclasses.dataclass(frozen=True)
class Optimizers:
    """Print the table of all optimizers: what each needs, keeps and costs."""

    into: Path | None = None
    """A Markdown file whose table of optimizers is to be replaced instead, as docs/optimizers.md."""


COMMANDS = {command.__name__.lower(): command for command in (Run, Compare, Report, Optimizers)}


class Choice(NamedTuple):
    """The methods behind one --method."""

    names: tuple[str, ...]
    settings: dict[str, list]  # the values of each
    learning_rates: tuple[float, ...]

    def methods(self) -> list[Method]:
        """Each name with each combination of values."""
        combinations = list(itertools.product(*self.settings.values()))
        return [
            methods.method(name, **dict(zip(self.settings, values, strict=True)))
            for name in self.names
            for values in combinations
        ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments:
        print(usage.overview(COMMANDS, TASKS))
        return 0
    try:
        command, choices = parse(arguments)
        {Run: run, Compare: compare, Report: tell, Optimizers: optimizers}[type(command)](command, choices)
    except (ExperimentError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def parse(arguments: Sequence[str]) -> tuple[Run | Compare | Report | Optimizers, list[Choice]]:
    """(the command, the methods that it names)."""
    rest, choices = split(arguments)
    usage.check(rest, [name for choice in choices for name in choice.names], COMMANDS, TASKS)
    command = tyro.cli(
        Run | Compare | Report | Optimizers,
        prog="python -m experiments",
        description=__doc__,
        args=rest,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes, tyro.conf.CascadeSubcommandArgs),
    )
    return command, choices


def split(arguments: Sequence[str]) -> tuple[list[str], list[Choice]]:
    """(what is not a method's, the methods): each --method takes the settings of its optimizer behind it."""
    options: list[list[str]] = [[]]
    for argument in arguments:
        if argument.startswith("--"):
            options.append(argument.split("=", 1))
        else:
            options[-1].append(argument)
    rest, choices = list(options[0]), []
    for option, *values in options[1:]:
        name = option[2:].replace("-", "_")
        if name in ("method", "methods"):
            names = [z for value in values for z in (methods.PRESETS if value == "all" else [value])]
            choices.append(Choice(tuple(dict.fromkeys(names)), {}, ()))
        elif name == "learning_rate":
            if not choices:
                raise ExperimentError("learning-rate stands before --method; expected behind it")
            choices[-1] = choices[-1]._replace(learning_rates=tuple(map(_number, values)))
        elif any(name in methods.method(z).settings for choice in choices[-1:] for z in choice.names):
            if not values:
                raise ExperimentError(f"{option[2:]} has no value")
            choices[-1].settings[name] = [methods.parse(value) for value in values]
        else:
            rest += [option, *values]
    return rest, choices


def _number(value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ExperimentError(f"learning-rate is {value!r}; expected a number") from None


def run(command: Run, choices: list[Choice]) -> None:
    """Trains one method."""
    configs = _configs(command, choices, (command.seed,))
    if len(configs) > 1:
        raise ExperimentError(f"{len(configs)} runs; run takes one, and compare several")
    [metrics] = _train(command, configs)
    print(f"{_title(configs[0])}: {hooks.describe(metrics.iloc[-1].to_dict())}\nin {configs[0].folder}")


def compare(command: Compare, choices: list[Choice]) -> None:
    """Trains several methods, prints a table and draws the curves."""
    task, output = command.task, command.output
    seeds = tuple(dict.fromkeys(command.seeds or task.seeds))
    configs = _configs(command, choices, seeds[:1] if command.sweep else seeds)
    _train(command, configs, (len(seeds) - 1) * len({z.method for z in configs}) if command.sweep else 0)
    from experiments import figures, report  # which takes seconds to load what draws

    def best() -> tuple[pd.DataFrame, dict[str, float]]:
        runs = report.best(report.gather(configs), task.selection)
        return runs, dict(zip(runs["method"], runs["learning_rate"], strict=True))

    for _ in range(EXTENSIONS if command.sweep else 0):
        further = _further(configs, best()[1])
        _train(command, further)
        configs += further
    chosen, rates = best()
    if command.sweep:
        of = dict.fromkeys(config.method for config in configs)
        final = [Config(task, method, rates[str(method)], seed, output) for method in of for seed in seeds]
        _train(command, final)
        chosen = report.gather(final)
    several = len({(config.method, config.learning_rate) for config in configs}) > len(rates)
    table = report.summary(chosen, task.metrics)
    by = f", at the rates with the best {task.selection.replace('_', ' ')}" if several else ""
    print(f"after the last epoch: median (least, largest) of {len(seeds)} seed{'s' * (len(seeds) > 1)}{by}\n")
    print(report.markdown(table, task.metrics))
    storage.write_rows(output / "summary.csv", table.to_dict("records"))
    curves = dict.fromkeys((task.selection, *(z for z in task.metrics if not z.startswith("test_"))))
    figures.draw_curves(chosen, list(curves), output / "curves.png")
    written = ["summary.csv", "curves.png"]
    if several:
        runs, metrics = report.gather(configs), dict.fromkeys((task.selection, *task.metrics))
        storage.write_rows(output / "sweep.csv", report.summary(runs, list(metrics)).to_dict("records"))
        figures.draw_sweep(report.final(runs), task.selection, output / "sweep.png")
        written += ["sweep.csv", "sweep.png"]
        for name in dict.fromkeys(str(config.method) for config in _further(configs, rates)):
            print(f"\n{name}: the best rate, {rates[name]:g}, is at an end of those tried")
    for choice in choices:
        varied = [name for name, values in choice.settings.items() if len(values) > 1]
        if len(choice.names) == 1 and 2 <= len(varied) <= 4:
            written.append("heat_map.png")
            of = chosen[chosen["method"].isin([str(method) for method in choice.methods()])]
            figures.draw_heat_map(report.final(of), varied, task.metrics[0], output / "heat_map.png")
    print(f"\nin {', '.join(str(output / name) for name in dict.fromkeys(written))}")


def tell(command: Report, choices: list[Choice]) -> None:
    """Prints tables of runs that are there, and draws them."""
    if choices:
        raise ExperimentError("report takes no --method: it tells of all runs that are in the folders")
    from experiments import report

    report.write(command.folders, command.output)


def optimizers(command: Optimizers, choices: list[Choice]) -> None:
    """Prints the table of all optimizers, in Markdown, or writes it into a file."""
    if command.into is None:
        print(catalogue.markdown())
    else:
        catalogue.write_into(command.into)
        print(f"in {command.into}")


def _configs(command: Training, choices: list[Choice], seeds: Sequence[int]) -> list[Config]:
    """The runs of a command: each method with its rates and each seed, none twice."""
    learning_rates, rate_factors, sweep = (
        getattr(command, name, ()) for name in ("learning_rates", "rate_factors", "sweep")
    )
    if rate_factors and (learning_rates or any(choice.learning_rates for choice in choices)):
        raise ExperimentError("both learning rates and rate-factors are given; give one")
    factors = rate_factors or (FACTORS if sweep else (1,))
    configs = {}
    for choice in choices:
        for method in choice.methods():
            rates = choice.learning_rates or learning_rates
            if not rates:
                own = method.rate(command.task.protocol)
                rates = [float(f"{own * factor:.3g}") for factor in factors]
            for rate, seed in itertools.product(rates, seeds):
                configs[Config(command.task, method, rate, seed, command.output)] = None
    if not configs:
        raise ExperimentError(f"no method is given; behind --method there may be {methods.NAMES}")
    return list(configs)


def _further(configs: list[Config], best: dict[str, float]) -> list[Config]:
    """One rate further for each method whose best one is at an end of its rates."""
    found = []
    for config in configs:
        rates = sorted({z.learning_rate for z in configs if z.method == config.method})
        ends = {rates[0]: rates[1], rates[-1]: rates[-2]} if len(rates) > 1 else {}
        if (rate := config.learning_rate) == best[str(config.method)] and rate in ends:
            found.append(dataclasses.replace(config, learning_rate=float(f"{rate**2 / ends[rate]:.3g}")))
    return found


def _train(command: Training, configs: list[Config], later: int = 0) -> list[pd.DataFrame]:
    """Trains what is not trained yet; so many runs are to follow."""
    runs = sum(not config.finished for config in configs)
    begin, foretell = hooks.progress(runs), hooks.durations(runs + later)
    tables = []
    for config in configs:
        watching = []
        if not config.finished:
            watching = [begin(_title(config)), foretell(_title(config))]
            if command.tensorboard:
                watching.append(hooks.tensorboard(config.folder / "tensorboard"))
        tables.append(train(config, *watching))
    return tables


def _title(config: Config) -> str:
    return f"{config.method} lr {config.learning_rate:g} seed {config.seed}"


if __name__ == "__main__":
    sys.exit(main())
