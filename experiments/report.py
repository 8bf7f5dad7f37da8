"""Tables of runs, from their folders alone: where they ran does not matter."""

import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from experiments import ExperimentError, figures, methods, storage

RUN = ["setting", "method", "learning_rate"]  # the columns that runs with several seeds have in common
BASELINE = "lora_adamw"  # what states and times are compared with
# nan wherever one seed's is, which pandas's own would leave out.
PARTS = {"median": np.median, "min": np.min, "max": np.max}


def read(folders: Iterable[Path]) -> dict[str, pd.DataFrame]:
    """The metrics of all runs in folders, by task.

    Returns:
      Tables with a row for each evaluation: the method, its settings, learning_rate, seed and the metrics.
      setting names the fields of the task in which runs differ, as in "rank 8"; its values are in order.

    Raises:
      ExperimentError: there is no run, one is there twice, or is of a method that there is not any more.
    """
    found: dict[str, list] = {}
    places: dict[str, Path] = {}
    for file in dict.fromkeys(file for folder in folders for file in sorted(folder.rglob("config.json"))):
        config = json.loads(file.read_text())
        if not (file.parent / "metrics.csv").exists():
            continue  # it has only begun
        if (first := places.setdefault(json.dumps(config, sort_keys=True), file.parent)) != file.parent:
            raise ExperimentError(f"{file.parent} and {first} are the same run; expected each once")
        name, settings = config.pop("method"), config.pop("settings")
        try:
            known = methods.method(name).settings
            changes = {z: value for z, value in settings.items() if z not in known or known[z] != value}
            run = {"method": str(methods.method(name, **changes))}
        except ExperimentError as error:
            raise ExperimentError(f"{file}: {error}") from error
        run |= {z: config.pop(z) for z in ("learning_rate", "seed")}
        table = storage.read_metrics(file.parent).assign(**settings, **run)
        table["epochs"] = config.get("epochs", 1)
        if "steps" in config:
            table["step"] = table["epoch"] * config["steps"]
        found.setdefault(config.pop("task"), []).append((config, table))
    if not found:
        raise ExperimentError(f"no run in {', '.join(map(str, folders))}")
    return {task: _settings(*zip(*runs, strict=True)) for task, runs in found.items()}


def gather(configs: Iterable[storage.Config]) -> pd.DataFrame:
    """The metrics of runs of one task, as `read` gives them, in their order."""
    [runs] = read([config.folder for config in dict.fromkeys(configs)]).values()
    return runs


def _settings(tasks: Sequence[dict], tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    fields = pd.DataFrame(tasks, dtype=object)
    fields = fields.loc[:, fields.astype(str).nunique() > 1]
    names = [", ".join(f"{k.replace('_', ' ')} {v}" for k, v in row.items()) for _, row in fields.iterrows()]
    order = range(len(tasks))
    if len(fields.columns):
        order = fields.sort_values(list(fields), kind="stable", key=_sortable).index
    return pd.concat([tables[i].assign(setting=names[i]) for i in order], ignore_index=True)


def _sortable(values: pd.Series) -> pd.Series:
    numbers = pd.to_numeric(values, errors="coerce")
    return values.astype(str) if numbers.isna().any() else numbers


def complete(runs: pd.DataFrame) -> pd.Series:
    """Whether a row is of a run that is finished."""
    return _last(runs, [*RUN, "seed"]) == runs["epochs"]


def final(runs: pd.DataFrame) -> pd.DataFrame:
    """The rows after the last epoch of a setting."""
    return runs[runs["epoch"] == _last(runs, ["setting"])]


def _last(runs: pd.DataFrame, keys: list[str]) -> pd.Series:
    return runs.groupby(keys)["epoch"].transform("max")


def main_metric(runs: pd.DataFrame, data: str) -> str:
    """The first metric on "validation" or "test" data, of scores if there are; the loss that has no data."""
    names = [z for z in runs if z.startswith(f"{data}_")] or [z for z in runs if z.endswith("excess_loss")]
    return min(names, key=lambda name: not figures.is_score(name))


def best(runs: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The runs at each method's best learning rate in each setting, the smallest of several.

    The final median is taken over the seeds that all rates have, if there are some: more seeds at one rate
    neither help nor harm it.
    """
    ends = final(runs)
    rates = ends.groupby(RUN[:2])["learning_rate"].transform("nunique")
    common = ends.groupby([*RUN[:2], "seed"])["learning_rate"].transform("nunique") == rates
    some = common.groupby([ends[z] for z in RUN[:2]]).transform("any")
    medians = _over_seeds(ends[common | ~some].groupby(RUN, sort=False), metric, "median")
    loss = (-medians if figures.is_score(metric) else medians).fillna(np.inf).reset_index()
    loss = loss.sort_values("learning_rate", kind="stable")
    chosen = loss.loc[loss.groupby(RUN[:2], sort=False)[metric].idxmin(), RUN]
    return runs.merge(chosen)  # in the order of the runs


def summary(runs: pd.DataFrame, metrics: Sequence[str]) -> pd.DataFrame:
    """One row for the runs that differ by the seed: median, least and largest, after the last epoch."""
    groups, ends = (z.groupby(RUN, sort=False) for z in (runs, final(runs)))
    columns = {"seeds": ends.size()}
    columns |= {f"{z}_{part}": _over_seeds(ends, z, part) for z in metrics for part in PARTS}
    columns["milliseconds_per_step"] = 1e3 * groups["seconds_per_step"].median()
    columns["peak_memory_mib"] = groups["peak_memory_mib"].max()
    for state in ("lora_state_kib", "optimizer_state_kib"):
        columns[state] = groups[state].first()
    return pd.DataFrame(columns).reset_index()


def _over_seeds(groups, metric: str, part: str) -> pd.Series:
    return groups[metric].agg(lambda values: PARTS[part](values.to_numpy()))


def overview(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """A row for each method in each task, at the learning rate that is best on the validation data."""
    rows = []
    for task, runs in tables.items():
        metric = main_metric(runs, "test")
        of = summary(best(runs, main_metric(runs, "validation")), [metric])
        of = of.rename(columns={f"{metric}_{part}": part for part in PARTS})
        of.insert(0, "task", [", ".join(filter(None, (task, setting))) for setting in of.pop("setting")])
        of.insert(1, "metric", metric)
        of["rank"] = of.groupby("task")["median"].rank(
            ascending=not figures.is_score(metric), na_option="bottom"
        )
        rows.append(of.sort_values("rank", kind="stable"))
    return pd.concat(rows, ignore_index=True)


def markdown(table: pd.DataFrame, metrics: Sequence[str]) -> str:
    """A summary as it is shown."""
    return _markdown(_cells(table, {name: _spreads(table, f"{name}_") for name in metrics}))


def overview_markdown(table: pd.DataFrame) -> str:
    """The overview: tasks by methods, then each task.

    The method with the best mean rank comes first, the best of each task is in bold. State and time are in
    units of LoRA-AdamW's, from the least to the largest over the tasks.
    """
    table = table.assign(cell=_spreads(table, ""), method=table["method"].map("`{}`".format))
    order = table.groupby("method")["rank"].mean().sort_values(kind="stable").index
    cells, sections = {"method": list(order)}, []
    for (task, metric), rows in table.groupby(["task", "metric"], sort=False):
        title = f"{task}: {metric.replace('_', ' ')}"
        bold = rows["cell"].where(rows["rank"] > 1, "**" + rows["cell"] + "**")
        cells[title] = list(bold.set_axis(rows["method"]).reindex(order, fill_value=""))
        sections.append(f"{title}\n\n{_markdown(_cells(rows, {metric: bold}))}")
    baseline = table[table["method"] == f"`{BASELINE}`"].set_index("task")
    for name, column in (("state", "lora_state_kib"), ("time", "milliseconds_per_step")):
        ratios = (table[column] / table["task"].map(baseline[column])).groupby(table["method"])
        low, high = (z.reindex(order).map("{:.2g}".format) for z in (ratios.min(), ratios.max()))
        cells[f"{name} / {BASELINE}'s"] = np.where(low == high, low, low + " to " + high)
    return "\n\n".join([_markdown(cells), *sections])


def _cells(table: pd.DataFrame, metrics: dict[str, Sequence[str]]) -> dict[str, Sequence[str]]:
    return {
        "method": table["method"],
        "learning rate": table["learning_rate"].map("{:g}".format),
        "seeds": table["seeds"].map(str),
        **{name.replace("_", " "): cells for name, cells in metrics.items()},
        "ms per step": table["milliseconds_per_step"].map("{:.2f}".format),
        "peak memory, MiB": table["peak_memory_mib"].map("{:.3g}".format),
        "state of LoRA, KiB": table["lora_state_kib"].map("{:.1f}".format),
    }


def _spreads(table: pd.DataFrame, prefix: str) -> list[str]:
    """Median (least, largest) of a metric."""
    return [
        f"{median:.4g}" if low == high else f"{median:.4g} ({low:.4g}, {high:.4g})"
        for median, low, high in table[[f"{prefix}{part}" for part in PARTS]].to_numpy()
    ]


def _markdown(cells: dict[str, Sequence[str]]) -> str:
    columns = [[name, "---", *values] for name, values in cells.items()]
    widths = [max(map(len, column)) for column in columns]
    lines = (
        [cell.ljust(n) for cell, n in zip(row, widths, strict=True)] for row in zip(*columns, strict=True)
    )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(folders: Sequence[Path], output: Path) -> None:
    """Prints the overview of all runs in folders; writes it, and each task's sweep and best curves."""
    tables = read(folders)
    for task, runs in tables.items():
        whole = complete(runs)
        for run in runs.loc[~whole, [*RUN, "seed"]].drop_duplicates().to_dict("records"):
            print(f"left out, not finished: {task}, {run}", file=sys.stderr)
        tables[task] = runs[whole]
    tables = {task: runs for task, runs in tables.items() if len(runs)}
    if not tables:
        raise ExperimentError(f"no run is finished in {', '.join(map(str, folders))}")
    table = overview(tables)
    storage.write_rows(output / "overview.csv", table.to_dict("records"))
    print(f"after the last epoch: median (least, largest)\n\n{overview_markdown(table)}\n")
    for task, runs in tables.items():
        parts = {task: runs}
        if min(runs["method"].nunique(), runs["setting"].nunique()) > len(figures.LINES):
            parts = {f"{task}_{setting}": part for setting, part in runs.groupby("setting", sort=False)}
        selection = main_metric(runs, "validation")
        metrics = [selection, *(["train_loss"] if selection.startswith("validation_") else [])]
        for name, part in parts.items():
            name = re.sub(r"[^\w.]+", "_", name)
            figures.draw_sweep(final(part), selection, output / f"{name}_sweep.png")
            figures.draw_curves(best(part, selection), metrics, output / f"{name}_curves.png")
            print(f"in {output}: {name}_sweep.png, {name}_curves.png")
