"""Figures of how costs grow, with the exponents of the fitted power laws."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.ticker import NullLocator

from benchmarks.figures import MARKERS, label_ticks, plt, write_figure


class Line(NamedTuple):
    """One line of a panel. Lines of one color in all panels belong together."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    color: int
    dashed: bool = False


class Panel(NamedTuple):
    """One pair of logarithmic axes."""

    xlabel: str
    ylabel: str
    lines: list[Line]
    fitted: bool = True  # whether the legend has exponents


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """The p of the power law y = c x^p that fits best, by least squares of the logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def draw(panels: Sequence[Panel], columns: int, path: Path) -> None:
    """Draws panels, row by row."""
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(7.5 * columns, 4 * rows), squeeze=False, layout="constrained"
    )
    for axis, panel in zip(axes.flat, panels, strict=True):
        for line in panel.lines:
            label = line.label
            if panel.fitted and len(line.x) > 1:
                label += f": {exponent(line.x, line.y):.2f}"
            axis.plot(
                line.x,
                line.y,
                label=label,
                color=plt.get_cmap("tab10").colors[line.color % 10],
                marker=MARKERS[line.color % len(MARKERS)],
                markersize=5,
                linestyle="--" if line.dashed else "-",
                fillstyle="none" if line.dashed else "full",
            )
        axis.set(xscale="log", yscale="log", xlabel=panel.xlabel, ylabel=panel.ylabel)
        ticks = sorted({x for line in panel.lines for x in line.x})
        axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axis.xaxis.set_minor_locator(NullLocator())
        label_ticks(axis.yaxis)
        axis.grid(alpha=0.3, which="both")
        title = "exponents" if panel.fitted else None
        axis.legend(title=title, loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    write_figure(figure, path)
