"""Tables and figures of several runs."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from jaxtyping import Float
from rich.table import Table

from experiments import storage
from experiments.storage import Config
from experiments.training import optimizer_bytes

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.colors import LogNorm
from matplotlib.ticker import MaxNLocator

FLOOR, CEILING = 1e-3, 1e5  # of the axes: what is smaller or larger is drawn there
RELATIVE_RANGE = 1e-9, 10.0  # of those of a relative quantity: what diverged is drawn at its end
MARKERS = "osD^vPX*<>pdh"


class Group(NamedTuple):
    """The runs of one method at one learning rate, one for each seed."""

    method: str
    learning_rate: float
    metrics: dict[str, Float[np.ndarray, "seeds epochs"]]
    optimizer_bytes: int

    def final(self, metric: str) -> Float[np.ndarray, " seeds"]:
        """The metric after the last epoch."""
        return self.metrics[metric][:, -1]


def gather(configs: list[Config]) -> list[Group]:
    """Groups finished runs, in the order in which they come."""
    runs: dict[tuple[str, float], list[Config]] = {}
    for config in configs:
        runs.setdefault((config.method, config.learning_rate), []).append(config)
    groups = []
    for (method, rate), same in runs.items():
        tables = [storage.read_metrics(config.folder) for config in same]
        metrics = {name: np.array([[row[name] for row in rows] for rows in tables]) for name in tables[0][0]}
        groups.append(Group(method, rate, metrics, optimizer_bytes(same[0])))
    return groups


def summary(groups: list[Group], metrics: Sequence[str]) -> list[dict]:
    """One row for each group: median, least and largest over the seeds, after the last epoch."""
    rows = []
    for group in groups:
        row = {"method": group.method, "learning_rate": group.learning_rate}
        for name in metrics:
            values = group.final(name)
            row |= {f"{name}_{f.__name__}": float(f(values)) for f in (np.median, np.min, np.max)}
        row["milliseconds_per_step"] = 1e3 * float(np.median(group.metrics["seconds_per_step"]))
        row["peak_memory_mib"] = float(np.max(group.metrics["peak_memory_mib"]))
        row["optimizer_state_kib"] = group.optimizer_bytes / 1024
        rows.append(row)
    return rows


def table(rows: list[dict], metrics: Sequence[str], seeds: int) -> Table:
    """The summary as a table for the screen."""
    shown = Table(
        title=f"after the last epoch: median (least, largest) of {seeds} seed{'s' * (seeds > 1)}",
        title_justify="left",
    )
    shown.add_column("method", no_wrap=True)
    for name in ("learning rate", *metrics, "ms per step", "peak memory, MiB", "optimizer state, KiB"):
        shown.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        shown.add_row(
            row["method"],
            f"{row['learning_rate']:g}",
            *(_spread(row, name) for name in metrics),
            f"{row['milliseconds_per_step']:.2f}",
            f"{row['peak_memory_mib']:.3g}",
            f"{row['optimizer_state_kib']:.1f}",
        )
    return shown


def _spread(row: dict, name: str) -> str:
    median, least, largest = (row[f"{name}_{part}"] for part in ("median", "min", "max"))
    return f"{median:.3g}" if least == largest else f"{median:.3g} ({least:.3g}, {largest:.3g})"


def draw_curves(groups: list[Group], metrics: Sequence[str], path: Path) -> None:
    """Draws metrics by epoch: a line for the median, a band from least to largest.

    Of several learning rates of a method, the one with the best final median of the first is drawn.
    """
    chosen = best(groups, metrics[0])
    several = len(chosen) < len(groups)
    figure, axes = plt.subplots(
        1, len(metrics), figsize=(5 * len(metrics) + 2.5, 4.5), squeeze=False, layout="constrained"
    )
    for axis, name in zip(axes[0], metrics, strict=True):
        for i, group in enumerate(chosen):
            label = f"{group.method} (lr {group.learning_rate:g})" if several else group.method
            _draw(axis, i, label, group.metrics["epoch"][0], group.metrics[name], name)
        axis.set(xlabel="epoch", ylabel=_quantity(name))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    _save(figure, path)


def draw_sweep(groups: list[Group], metric: str, path: Path) -> None:
    """Draws the final metric against the learning rate, one line for each method."""
    figure, axis = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for i, method in enumerate(dict.fromkeys(group.method for group in groups)):
        same = sorted((g for g in groups if g.method == method), key=lambda g: g.learning_rate)
        finals = np.stack([g.final(metric) for g in same], axis=-1)
        _draw(axis, i, method, np.array([g.learning_rate for g in same]), finals, metric)
    axis.set(xlabel="learning rate", ylabel=f"{_quantity(metric)}, after the last epoch", xscale="log")
    _save(figure, path)


def _draw(
    axis, i: int, label: str, x: Float[np.ndarray, " N"], values: Float[np.ndarray, "seeds N"], name: str
) -> None:
    """Draws the i-th line and its band, on a logarithmic axis: of a score, what it lacks to 1.

    Full training's negative excess losses have no place on it, and are left out.
    """
    if np.nanmin(values, initial=0.0) < -1:
        return
    values = _shown(values, name)
    color = plt.get_cmap("tab10").colors[i % 10]
    axis.plot(
        x,
        np.median(values, axis=0),
        label=label,
        color=color,
        marker=MARKERS[i % len(MARKERS)],
        markersize=5,
        markevery=max(1, len(x) // 10),
        linewidth=1.5,
        linestyle=("-", "--", ":")[i // 10 % 3],
    )
    axis.fill_between(x, values.min(axis=0), values.max(axis=0), color=color, alpha=0.15, linewidth=0)
    axis.set_yscale("log")
    axis.grid(alpha=0.3, which="both")


def draw_ablation(groups: list[Group], variants: dict[str, tuple], metric: str, path: Path) -> None:
    """Draws a heat map of the final metric: a panel for each structure and K, damping by power.

    Args:
      groups: the runs. Of several learning rates of a variant the best is drawn.
      variants: (structure, K, damping, power) by method.
      metric: its name.
      path: the file.
    """
    values = {variants[g.method]: _shown(np.median(g.final(metric)), metric) for g in best(groups, metric)}
    structures, iterations, dampings, powers = (
        list(dict.fromkeys(setting)) for setting in zip(*values, strict=True)
    )
    finite = [value for value in values.values() if np.isfinite(value)] or [1.0]
    norm = LogNorm(min(finite), max(finite) if max(finite) > min(finite) else 2 * min(finite))
    rows, columns = len(structures), len(iterations)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(columns * (1 + len(powers)) + 1.5, rows * (1 + 0.6 * len(dampings))),
        squeeze=False,
        layout="constrained",
    )
    for axis, (structure, k) in zip(axes.flat, itertools.product(structures, iterations), strict=True):
        table = np.array([[values[structure, k, d, p] for p in powers] for d in dampings])
        image = axis.imshow(table, norm=norm, cmap="viridis_r", aspect="auto")
        axis.set_facecolor("lightgray")  # seen where the metric is not finite
        for (i, j), value in np.ndenumerate(table):
            dark = np.isfinite(value) and norm(value) > 0.5
            axis.text(
                j,
                i,
                f"{value:.0f}" if 1e3 <= value < 1e5 else f"{value:.3g}",
                ha="center",
                va="center",
                color="white" if dark else "black",
            )
        axis.set(title=f"{structure}, K = {k}", xlabel="power", ylabel="damping")
        axis.set_xticks(range(len(powers)), [f"{p:g}" for p in powers])
        axis.set_yticks(range(len(dampings)), [f"{d:g}" for d in dampings])
    bar = figure.colorbar(image, ax=axes, label=f"{_quantity(metric)}, after the last epoch")
    label_ticks(bar.ax.yaxis)
    write_figure(figure, path)


def _shown(values: Any, name: str) -> Any:
    """What is drawn of a metric: of a score what it lacks to 1, and nothing beyond the axis."""
    if name.startswith("relative"):
        return np.clip(values, *RELATIVE_RANGE)
    return np.clip(1 - values if _is_score(name) else values, FLOOR, CEILING)


def _quantity(name: str) -> str:
    """What an axis shows."""
    quantity = name.replace("_", " ")
    if _is_score(name):
        return f"{quantity.removesuffix(' accuracy')} error (1 - {name.split('_')[-1]})"
    return quantity


def _is_score(name: str) -> bool:
    """Whether a metric is best at 1: accuracies and correlations are, losses are not."""
    return not name.endswith("loss")


def best(groups: list[Group], metric: str) -> list[Group]:
    """The group with the best final median of each method."""
    sign = 1 if _is_score(metric) else -1
    chosen: dict[str, Group] = {}
    quality = lambda group: sign * np.nan_to_num(np.median(group.final(metric)), nan=-sign * np.inf)
    for group in groups:
        if group.method not in chosen or quality(group) > quality(chosen[group.method]):
            chosen[group.method] = group
    return list(chosen.values())


def _save(figure, path: Path) -> None:
    for axis in figure.axes:
        label_ticks(axis.yaxis)
    entries = len(figure.axes[-1].get_legend_handles_labels()[1])
    columns = 1 + (entries - 1) // 17  # that fit the height of a figure
    figure.axes[-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, ncols=columns)
    write_figure(figure, path)


def label_ticks(axis) -> None:
    """Labels more than the powers of ten on a logarithmic `xaxis` or `yaxis` that has few of them."""
    low, high = sorted(axis.get_view_interval())
    if high < 100 * low:  # too few powers of ten to read it by
        axis.set_major_formatter("{x:g}")
        digits = "123456789" if high < 2 * low else "23456789" if high < 4 * low else "235"
        axis.set_minor_formatter(lambda y, _: f"{y:g}" if f"{y:e}"[0] in digits else "")


def write_figure(figure, path: Path) -> None:
    """Writes a figure, so that it is either the old one or the new one, and closes it."""
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=130)
    temporary.replace(path)
    plt.close(figure)
