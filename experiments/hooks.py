"""What shows a training while it runs: a bar, and TensorBoard."""

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from experiments import ExperimentError


def progress(runs: int) -> Callable[[str], Callable[..., None]]:
    """Makes a hook of each run's description: a bar with the last metrics; in a file a line now and then."""
    numbers, seconds = itertools.count(1), 0.1 if sys.stderr.isatty() else 5.0

    def begin(description: str) -> Callable[..., None]:
        title = f"{next(numbers)}/{runs} {description}"
        bar = tqdm(desc=title, mininterval=seconds, delay=seconds, leave=False, unit="step")

        def hook(step: int, steps: int, metrics: dict[str, Any], state: Any = None) -> None:
            bar.total = steps
            if metrics:
                bar.set_postfix_str(describe(metrics), refresh=False)
            bar.update(step - bar.n)
            if step == steps:
                bar.close()

        return hook

    return begin


def describe(metrics: dict[str, float]) -> str:
    """The metrics of an evaluation in one line."""
    shown = {k: v for k, v in metrics.items() if not k.endswith(("_per_step", "_mib", "_kib"))}
    return ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in shown.items())


def tensorboard(folder: Path) -> Callable[..., None]:
    """A hook that writes the metrics into a folder for TensorBoard."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ExperimentError(f"{error}: pip install 'tensorboardX>=2.6.2'") from error
    writer = SummaryWriter(str(folder))

    def hook(step: int, steps: int, metrics: dict[str, float], state: Any) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)
        if step == steps:
            writer.close()

    return hook
