"""What shows a training while it runs: a bar, how long it takes, and TensorBoard."""

import itertools
import statistics
import sys
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from tqdm import tqdm

from experiments import ExperimentError

LONG = timedelta(minutes=3)


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


def durations(
    runs: int, clock: Callable[[], datetime] = datetime.now
) -> Callable[[str], Callable[..., None]]:
    """Makes a hook of each run's description: a line about how long it takes, if it or all are long.

    Args:
      runs: how many runs there are.
      clock: tells the time.
    """
    numbers, said = itertools.count(1), False

    def begin(description: str) -> Callable[..., None]:
        after, times = runs - next(numbers), [clock()]
        done = False

        def hook(step: int, steps: int, metrics: dict[str, Any], state: Any = None) -> None:
            nonlocal done, said
            if done:
                return
            times.append(clock())
            # Enough steps that the median is none of the few that compile, and enough time to be measured.
            if len(times) < 10 or times[-1] - times[1] < timedelta(seconds=2):
                return
            done = True
            this, others = remaining(times, step, steps, after)
            if this > LONG or (this + others > LONG and not said):
                said = True
                tqdm.write(f"{description}: {how_long(this, others, after, times[-1])}", file=sys.stderr)

        return hook

    return begin


def remaining(times: list[datetime], step: int, steps: int, after: int) -> tuple[timedelta, timedelta]:
    """(what is left of a run, so many runs after it), by when it began and when each step ended."""
    start = times[1] - times[0]  # with the first step, which compiles
    each = timedelta(
        seconds=statistics.median(
            (after - before).total_seconds() for before, after in itertools.pairwise(times[1:])
        )
    )
    return each * (steps - step), (start + each * (steps - 1)) * after


def how_long(this: timedelta, others: timedelta, after: int, now: datetime) -> str:
    """How long a run takes that is long, and it and so many after it."""

    def about(time: timedelta) -> tuple[str, str]:
        hours, minutes = divmod(round(time.total_seconds() / 60), 60)
        words = " ".join([f"{hours} h"] * (hours > 0) + [f"{minutes} min"] * (minutes > 0))
        end = now + time
        return f"about {words}", f"until {end:%H:%M}" if end.date() == now.date() else f"until {end:%a %H:%M}"

    (words, until), (all_words, all_until) = about(this), about(this + others)
    if this <= LONG:
        return f"{all_words} for this run and the {after} after it, {all_until}"
    with_others = f"; with the {after} after it {all_words}, {all_until}" if after else ""
    return f"{words} for this run, {until}{with_others}"


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
