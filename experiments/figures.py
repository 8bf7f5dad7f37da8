"""Figures of runs: curves, sweeps of the learning rate and heat maps, to be read at the width of a page.

A panel has at most six lines: where there are more methods, each has a panel of its own, with the others in
grey. No failing run sets a scale: what lies beyond an axis is drawn at its edge, as a triangle.
"""

import math
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd

matplotlib.use("agg")
import matplotlib.pyplot as plt
import seaborn as sns
from matplotlib.colors import LogNorm
from matplotlib.ticker import MaxNLocator

from benchmarks.figures import label_ticks, write_figure

# Okabe and Ito's colours, which the colour-blind tell apart; as many as there are lines in a panel.
LINES = dict(zip("osDPXp", ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"], strict=True))
GREY = {"color": "0.8", "linewidth": 0.8, "zorder": 1}
WIDTH = 9.0  # inches: 9 points are 12 pixels where a page shows 900
HEIGHTS = (3.8, 3.0, 2.6, 1.7)  # of a panel, by how many are side by side
STYLE = {"font.size": 9, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False}
FLOOR = 1e-3  # of the axes
NOTES = {"^": "▲: above the axis, or diverged", "v": "▼: below the axis"}


def draw_curves(runs: pd.DataFrame, metrics: Sequence[str], path: Path) -> None:
    """Draws metrics by epoch or step, a panel for each; the first alone where panels are of something else.

    Args:
      runs: as `report.gather` gives them, at one learning rate for each method.
      metrics: their names.
      path: of the figure.
    """
    x = "step" if "step" in runs else "epoch"
    if runs["setting"].nunique() > 1 or runs["method"].nunique() > len(LINES):
        points, quantity = _points(runs, runs["setting"], x, metrics[0]), _quantity(metrics[0])
    else:
        points = pd.concat([_points(runs, _quantity(metric), x, metric) for metric in metrics])
        quantity = ""
    write_figure(_draw(points, x, quantity), path)


def draw_sweep(runs: pd.DataFrame, metric: str, path: Path) -> None:
    """Draws a metric against the learning rate, a panel for each setting of the task.

    Args:
      runs: the last row of each run.
      metric: its name.
      path: of the figure.
    """
    points = _points(runs, runs["setting"], "learning_rate", metric)
    write_figure(_draw(points, "learning_rate", _quantity(metric)), path)


def _points(runs: pd.DataFrame, panel: pd.Series | str, x: str, metric: str) -> pd.DataFrame:
    """What is drawn: median, least and largest over the seeds, which are infinite where one failed."""
    runs = runs.assign(panel=panel)
    keys = [runs[z] for z in ("panel", "method", x)]
    values = _drawn(runs[metric], metric).fillna(np.inf).groupby(keys, sort=False)
    table = pd.DataFrame({"low": values.min(), "y": values.median(), "high": values.max()})
    table.loc[np.isinf(table["high"]), "y"] = np.inf
    return table.reset_index()


def _draw(points: pd.DataFrame, x: str, quantity: str) -> plt.Figure:
    """Panels, each with a line for each method.

    Args:
      points: of all panels.
      x: the column of the axis that all panels share.
      quantity: what the other axis shows, if all panels share it.
    """
    line, panel, sweep = "method", "panel", x == "learning_rate"
    if points["method"].nunique() > len(LINES):  # each has its panel, the best first; lines are what had one
        line, panel = panel, line
        points = points.iloc[np.argsort(points.groupby("method")["y"].transform("min"), kind="stable")]
    lines, panels = points[line].unique(), points[panel].unique()
    if len(lines) > len(LINES):
        raise ValueError(f"{len(panels)} panels of {len(lines)} lines; expected at most {len(LINES)} lines")
    columns = min(len(panels), 4 if panel == "method" else 3)
    rows = math.ceil(len(panels) / columns)
    size = WIDTH * (0.7 if columns == 1 else 1), 0.8 + HEIGHTS[columns - 1] * rows
    notes = {}
    with plt.rc_context(STYLE):
        options = {"sharex": True, "sharey": bool(quantity), "squeeze": False, "layout": "constrained"}
        figure, axes = plt.subplots(rows, columns, figsize=size, **options)
        for i, (axis, name) in enumerate(zip(axes.flat, panels, strict=False)):
            inside, others = points[points[panel] == name], points[points[panel] != name]
            low, top = _limits(points if quantity else inside, sweep)
            axis.set(yscale="log", ylim=(low, top))
            title = re.sub(r"\b\(", " (", name)  # where a line may end
            axis.set_title(textwrap.fill(title, 112 // columns, break_long_words=False))
            axis.grid(alpha=0.3)
            axis.tick_params(labelbottom=i + columns >= len(panels))
            if sweep:
                axis.set(xscale="log", xlim=_decades(points[x]))
            else:
                axis.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
            if len(lines) == 1:
                for _, other in others.sort_values(x).groupby(panel):
                    axis.plot(other[x], other["y"].clip(low, top), **GREY)
            for label, (marker, color) in zip(lines, LINES.items(), strict=False):
                if (of := inside[inside[line] == label].sort_values(x)).empty:
                    continue  # not every method in every setting
                notes |= _line(axis, of, x, sweep, marker=marker, color=color, label=label)
            label_ticks(axis.yaxis)
        for axis in axes.flat[len(panels) :]:
            axis.remove()
        if len(lines) > 1 or panel != "method":
            handles = {z.get_label(): z for axis in axes.flat for z in axis.get_legend_handles_labels()[0]}
            figure.legend(
                [handles[z] for z in lines], lines, loc="outside upper center", ncols=3, frameon=False
            )
        says = "; ".join(["large: the best"] * sweep + [*notes.values()])
        figure.supxlabel(x.replace("_", " ") + f" ({says})" * bool(says), size="medium")
        figure.supylabel(quantity, size="medium")
    return figure


def _line(axis, points: pd.DataFrame, x: str, sweep: bool, **style) -> dict[str, str]:
    """Draws one line in its band, in a sweep with its best point; the notes on what is beyond the axis."""
    limits = axis.get_ylim()
    xs, low, ys, high = points[[x, "low", "y", "high"]].to_numpy().T
    shown = np.arange(0, len(xs), max(1, len(xs) // 8))  # where markers are
    beyond = {"^": shown[ys[shown] > limits[1]], "v": shown[ys[shown] < limits[0]]}
    inside = np.setdiff1d(shown, [*beyond["^"], *beyond["v"]])
    axis.plot(xs, ys.clip(*limits), markevery=list(inside), markersize=4, **style)
    axis.fill_between(
        xs, low.clip(*limits), high.clip(*limits), color=style["color"], alpha=0.15, linewidth=0
    )
    for marker, places in beyond.items():
        for i in places:
            axis.plot(xs[i], ys[i].clip(*limits), marker, color=style["color"], clip_on=False, zorder=3)
    if sweep and (best := ys.argmin()) in inside:
        axis.plot(xs[best], ys[best], **style | {"label": None}, markersize=9, markeredgecolor="k", zorder=3)
    return {marker: NOTES[marker] for marker, places in beyond.items() if len(places)}


def _limits(points: pd.DataFrame, sweep: bool) -> tuple[float, float]:
    """Of a logarithmic axis: above the median lie at most three or four times as much as below it.

    Runs that fail are rarely the half; what is far above the median tells no more than that it failed.
    """
    points = points[points["y"].between(FLOOR, np.inf, inclusive="left")]
    if points.empty:
        return FLOOR, 1.0
    logs, low = np.log(points["y"]), np.log(max(points["low"].min(), FLOOR))
    middle = logs.median()
    low = max(low, 2 * logs.min() - middle)  # a lone good seed does not either
    top = logs[logs <= middle + (3 if sweep else 4) * max(middle - logs.min(), 0.02)].max()
    margin = 0.06 * max(top - low, 0.02)
    return float(np.exp(low - margin)), float(np.exp(top + margin))


def _decades(rates: pd.Series) -> tuple[float, float]:
    """Limits of an axis of learning rates, with two powers of ten at least."""
    low, high = np.log10(rates.min()) - 0.12, np.log10(rates.max()) + 0.12
    if np.floor(high) - np.ceil(low) < 1:
        low, high = min(low, np.floor(high)), max(high, np.floor(high) + 1)
    return 10**low, 10**high


def draw_heat_map(runs: pd.DataFrame, settings: Sequence[str], metric: str, path: Path) -> None:
    """Draws a metric by two to four settings of a method: the last two are the axes of each panel.

    Args:
      runs: the last row of each run, at one learning rate for each method.
      settings: their columns.
      metric: its name.
      path: of the figure.
    """
    *panels, y, x = settings
    values = _drawn(runs[metric], metric).clip(FLOOR).groupby([runs[z] for z in settings])
    values = values.agg(lambda z: np.median(z)).rename("value").reset_index()  # nan where one seed's is
    norm = LogNorm(values["value"].min(), values["value"].max())

    def draw(data, **_):
        table = data.pivot(index=y, columns=x, values="value")
        sns.heatmap(table, norm=norm, cmap="viridis_r", annot=True, fmt=".3g", cbar=False)

    grid = sns.FacetGrid(values, margin_titles=True, **dict(zip(("col", "row"), panels, strict=False)))
    grid.map_dataframe(draw).figure.suptitle(f"{_quantity(metric)}, after the last epoch", y=1.02)
    write_figure(grid.figure, path)


def _drawn(values: pd.Series, name: str) -> pd.Series:
    """What is drawn of a metric: of a score what it lacks to 1."""
    return 1 - values if is_score(name) else values


def _quantity(name: str) -> str:
    """What an axis shows."""
    quantity = name.replace("_", " ")
    if is_score(name):
        return f"{quantity.removesuffix(' accuracy')} error (1 - {name.split('_')[-1]})"
    return quantity


def is_score(name: str) -> bool:
    """Whether a metric is best at 1: accuracies and correlations are, losses and perplexities are not."""
    return not name.endswith(("loss", "perplexity"))
