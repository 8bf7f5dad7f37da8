"""Progress on the screen: bars in a terminal, a line now and then in a file."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

SECONDS = 5.0  # between two lines in a file


@contextmanager
def progress(console: Console, runs: int) -> Iterator[Callable[[str], Callable[[int, int, dict], None]]]:
    """Shows the progress of several runs.

    Yields:
      A function to call with each run's description; it gives what that run's `train` notifies.
    """
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
    with bars:
        overall = bars.add_task("runs", total=runs, note="")
        started, last_line = 0, time.monotonic() - SECONDS

        def begin(description: str) -> Callable[[int, int, dict], None]:
            nonlocal started
            started += 1
            number = started
            current = bars.add_task(description, total=None, completed=0, note="", visible=False)

            def notify(step: int, steps: int, metrics: dict[str, Any]) -> None:
                nonlocal last_line
                note = describe(metrics)
                bars.update(current, completed=step, total=steps, note=note, visible=step < steps)
                bars.update(overall, completed=number - 1 + step / steps)
                if not console.is_terminal and time.monotonic() - last_line >= SECONDS:
                    console.print(
                        f"run {number}/{runs} {description}: step {step}/{steps} {note}", soft_wrap=True
                    )
                    last_line = time.monotonic()

            return notify

        yield begin


def describe(metrics: dict[str, Any]) -> str:
    """The metrics of an epoch in one line."""
    shown = {k: v for k, v in metrics.items() if k not in ("seconds_per_step", "peak_memory_mib")}
    return ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in shown.items())
