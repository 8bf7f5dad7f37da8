"""Figures: how they are written, and the ticks of logarithmic axes."""

from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator, NullLocator

MARKERS = "osD^vPX*<>pdh"


def label_ticks(axis) -> None:
    """Labels more than the powers of ten on a logarithmic `xaxis` or `yaxis` that has few of them."""
    low, high = sorted(axis.get_view_interval())
    if high < 2 * low:  # as good as linear
        axis.set_major_locator(MaxNLocator(4))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter("{x:g}")
    elif high < 100 * low:  # too few powers of ten to read it by
        axis.set_major_formatter("{x:g}")
        digits = "23456789" if high < 4 * low else "235"
        axis.set_minor_formatter(lambda y, _: f"{y:g}" if f"{y:e}"[0] in digits else "")


def write_figure(figure, path: Path) -> None:
    """Writes a figure, so that it is either the old one or the new one, and closes it."""
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=130)
    temporary.replace(path)
    plt.close(figure)
