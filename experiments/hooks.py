"""What shows a training while it runs: bars in a terminal, a line now and then in a file, TensorBoard."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from experiments import ExperimentError

SECONDS = 5.0  # between two lines in a file


@contextmanager
def progress(console: Console, runs: int) -> Iterator[Callable[[str], Callable[..., None]]]:
    """Shows the progress of several runs.

    Yields:
      A function to call with each run's description; it gives a hook of the training loop.
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

        def begin(description: str) -> Callable[..., None]:
            nonlocal started
            started += 1
            number, note = started, ""
            current = bars.add_task(description, total=None, completed=0, note="", visible=False)

            def hook(step: int, steps: int, metrics: dict[str, Any], state: Any = None) -> None:
                nonlocal last_line, note
                note = describe(metrics) or note
                bars.update(current, completed=step, total=steps, note=note, visible=step < steps)
                bars.update(overall, completed=number - 1 + step / steps)
                if not console.is_terminal and time.monotonic() - last_line >= SECONDS:
                    console.print(
                        f"run {number}/{runs} {description}: step {step}/{steps} {note}", soft_wrap=True
                    )
                    last_line = time.monotonic()

            return hook

        yield begin


def describe(metrics: dict[str, Any]) -> str:
    """The metrics of an evaluation in one line."""
    shown = {k: v for k, v in metrics.items() if k not in ("seconds_per_step", "peak_memory_mib")}
    return ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in shown.items())


def tensorboard(folder: Path) -> Callable[..., None]:
    """A hook that writes the metrics into a folder for TensorBoard.

    Raises:
      ExperimentError: tensorboardX is not installed.
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ExperimentError(f"{error}: pip install 'tensorboardX>=2.6.2'") from error
    writer = SummaryWriter(str(folder))

    def hook(step: int, steps: int, metrics: dict[str, Any], state: Any) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)
        if step == steps:
            writer.close()

    return hook
