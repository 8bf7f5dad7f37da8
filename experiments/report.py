"""Tables and figures of several runs, by pandas and seaborn."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd

from experiments import storage
from experiments.storage import Config
from experiments.training import optimizer_bytes

matplotlib.use("agg")
import matplotlib.pyplot as plt
import seaborn as sns
from matplotlib.colors import LogNorm

FLOOR, CEILING = 1e-3, 1e5  # of the axes: what is smaller or larger is drawn there
RUN = ["method", "learning_rate"]  # the columns that runs with several seeds have in common
# nan wherever one seed's is, which pandas's own would leave out.
PARTS = {"median": np.median, "min": np.min, "max": np.max}


def gather(configs: Sequence[Config]) -> pd.DataFrame:
    """The metrics of finished runs, one below the other, with what each is a run of and its settings."""
    tables = []
    for config in configs:
        run = {"method": str(config.method), "learning_rate": config.learning_rate, "seed": config.seed}
        run["lora_state_kib"], run["optimizer_state_kib"] = (
            z / 1024 for z in optimizer_bytes(config.task, config.method)
        )
        tables.append(storage.read_metrics(config.folder).assign(**config.method.settings, **run))
    return pd.concat(tables, ignore_index=True)


def final(runs: pd.DataFrame) -> pd.DataFrame:
    """The rows after the last epoch."""
    return runs[runs["epoch"] == runs["epoch"].max()]


def summary(runs: pd.DataFrame, metrics: Sequence[str]) -> pd.DataFrame:
    """One row for the runs that differ by the seed: median, least and largest, after the last epoch."""
    groups, ends = (z.groupby(RUN, sort=False) for z in (runs, final(runs)))
    columns = {f"{z}_{part}": _over_seeds(ends, z, part) for z in metrics for part in PARTS}
    columns["milliseconds_per_step"] = 1e3 * groups["seconds_per_step"].median()
    columns["peak_memory_mib"] = groups["peak_memory_mib"].max()
    columns |= {name: groups[name].first() for name in ("lora_state_kib", "optimizer_state_kib")}
    return pd.DataFrame(columns).reset_index()


def _over_seeds(groups, metric: str, part: str) -> pd.Series:
    return groups[metric].agg(lambda values: PARTS[part](values.to_numpy()))


def markdown(table: pd.DataFrame, metrics: Sequence[str]) -> str:
    """The summary as it is shown."""
    cells = {"method": table["method"], "learning rate": table["learning_rate"].map("{:g}".format)}
    for name in metrics:
        spread = zip(*(table[f"{name}_{part}"] for part in PARTS), strict=True)
        cells[name.replace("_", " ")] = [
            f"{median:.3g}" if low == high else f"{median:.3g} ({low:.3g}, {high:.3g})"
            for median, low, high in spread
        ]
    cells["ms per step"] = table["milliseconds_per_step"].map("{:.2f}".format)
    cells["peak memory, MiB"] = table["peak_memory_mib"].map("{:.3g}".format)
    cells["state of LoRA, KiB"] = table["lora_state_kib"].map("{:.1f}".format)
    columns = [[name, "---", *values] for name, values in cells.items()]
    widths = [max(map(len, column)) for column in columns]
    lines = (
        [cell.ljust(n) for cell, n in zip(row, widths, strict=True)] for row in zip(*columns, strict=True)
    )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def best(runs: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The runs at the learning rate with the best final median of each method; the smallest of several."""
    medians = _over_seeds(final(runs).groupby(RUN, sort=False), metric, "median")
    loss = (-medians if _is_score(metric) else medians).fillna(np.inf).reset_index()
    loss = loss.sort_values("learning_rate", kind="stable")
    chosen = loss.loc[loss.groupby("method", sort=False)[metric].idxmin(), RUN]
    return runs.merge(chosen)  # in the order of the runs


def draw_curves(runs: pd.DataFrame, metrics: Sequence[str], path: Path) -> None:
    """Draws metrics by epoch, each method at one learning rate."""
    _write(_lines(runs, "epoch", metrics), path)


def draw_sweep(runs: pd.DataFrame, metric: str, path: Path) -> None:
    """Draws the final metric against the learning rate."""
    grid = _lines(final(runs), "learning_rate", [metric])
    grid.set(xscale="log", xlabel="learning rate", title=f"{_quantity(metric)}, after the last epoch")
    _write(grid, path)


def _lines(runs: pd.DataFrame, x: str, metrics: Sequence[str]) -> sns.FacetGrid:
    """A panel for each metric, a line for each method's median in a band from least to largest.

    The axes are logarithmic: full training's negative excess losses have no place there, and are left out.
    """
    runs = runs[runs.groupby("method")[metrics[0]].transform("min").fillna(0) >= -1]
    panels = [runs[[x, "method"]].assign(panel=_quantity(z), value=_drawn(runs[z], z)) for z in metrics]
    data = pd.concat(panels, ignore_index=True)
    lost = data["value"].isna().groupby([data["panel"], data["method"], data[x]]).transform("any")
    grid = sns.relplot(
        data[~lost],
        x=x,
        y="value",
        col="panel",
        hue="method",
        style="method",
        kind="line",
        estimator="median",
        errorbar=("pi", 100),
        facet_kws={"sharey": False},
        height=4.5,
    )
    grid.set(yscale="log")
    for name, axis in grid.axes_dict.items():
        axis.set(title=name, ylabel="")
        axis.grid(alpha=0.3, which="both")
    return grid


def draw_heat_map(runs: pd.DataFrame, settings: Sequence[str], metric: str, path: Path) -> None:
    """Draws the final metric by two to four settings of a method: the last two are the axes of each panel."""
    *panels, y, x = settings
    values = _over_seeds(final(runs).groupby(list(settings)), metric, "median")
    values = _drawn(values, metric).rename("value").reset_index()
    norm = LogNorm(values["value"].min(), values["value"].max())

    def draw(data, **_):
        table = data.pivot(index=y, columns=x, values="value")
        sns.heatmap(table, norm=norm, cmap="viridis_r", annot=True, fmt=".3g", cbar=False)

    grid = sns.FacetGrid(values, margin_titles=True, **dict(zip(("col", "row"), panels, strict=False)))
    grid.map_dataframe(draw).figure.suptitle(f"{_quantity(metric)}, after the last epoch", y=1.02)
    _write(grid, path)


def _drawn(values: pd.Series, name: str) -> pd.Series:
    """What is drawn of a metric: of a score what it lacks to 1, and nothing beyond the axis."""
    return (1 - values if _is_score(name) else values).clip(FLOOR, CEILING)


def _quantity(name: str) -> str:
    """What an axis shows."""
    quantity = name.replace("_", " ")
    if _is_score(name):
        return f"{quantity.removesuffix(' accuracy')} error (1 - {name.split('_')[-1]})"
    return quantity


def _is_score(name: str) -> bool:
    """Whether a metric is best at 1: accuracies and correlations are, losses and perplexities are not."""
    return not name.endswith(("loss", "perplexity"))


def _write(grid: sns.FacetGrid, path: Path) -> None:
    """Writes a figure, so that it is either the old one or the new one, and closes it."""
    temporary = path.with_name(f".{path.name}")
    grid.savefig(temporary, dpi=130)
    temporary.replace(path)
    plt.close(grid.figure)
