"""What is seen of a run while it trains."""

import sys
from datetime import datetime, timedelta

import pytest
from tqdm import tqdm

from experiments import ExperimentError, hooks


def test_a_bar_with_the_last_metrics(monkeypatch, capsys):
    # Every step is shown, whatever the time.
    monkeypatch.setattr(hooks, "tqdm", lambda **options: tqdm(**options | {"mininterval": 0, "delay": 0}))
    begin = hooks.progress(2)
    for number in (1, 2):
        hook = begin("oplora lr 0.1")
        for step in range(1, 5):
            hook(step, 4, {"epoch": 0.5, "test_accuracy": 0.75, "seconds_per_step": 3.0} if step == 2 else {})
        *_, last = (line for line in capsys.readouterr().err.split("\r") if line.strip())
        assert last.startswith(f"{number}/2 oplora lr 0.1") and "4/4" in last
        assert last.rstrip().endswith("epoch 0.5, test accuracy 0.75]")


NOON = datetime(2030, 1, 1, 12)
SECOND = timedelta(seconds=1)


@pytest.mark.parametrize(
    ("minutes", "of_others", "after", "expected"),
    [
        (12, 0, 0, "about 12 min for this run, until 12:12"),
        (9, 60, 5, "about 9 min for this run, until 12:09; with the 5 after it about 1 h 9 min, until 13:09"),
        (1, 59, 30, "about 1 h for this run and the 30 after it, until 13:00"),
        (750, 0, 0, "about 12 h 30 min for this run, until Wed 00:30"),
    ],
)  # fmt: skip
def test_how_long(minutes, of_others, after, expected):
    assert hooks.how_long(60 * minutes * SECOND, 60 * of_others * SECOND, after, NOON) == expected


def said(capsys, runs, steps, seconds, started=0):
    """What equal runs say, by run and step; the first step of each and one more compile for a minute."""
    now = NOON
    begin = hooks.durations(runs, lambda: now)
    found = {}
    for number in range(runs):
        hook = begin("oplora")
        for step in range(started + 1, steps + 1):
            now += (60 if step - started in (1, 3) else seconds) * SECOND
            hook(step, steps, {}, None)
            if line := capsys.readouterr().err:
                found[number, step] = line
    return found


def test_a_long_run_says_so_once(capsys):
    """As soon as eight steps tell how long one takes: 71 more of 5 seconds, 155 seconds after noon."""
    expected = "oplora: about 6 min for this run, until 12:08\n"
    assert said(capsys, runs=1, steps=80, seconds=5) == {(0, 9): expected}


def test_steps_done_before_do_not_count(capsys):
    [line] = said(capsys, runs=1, steps=1000, seconds=5, started=920).values()
    assert line == "oplora: about 6 min for this run, until 12:08\n"


def test_each_long_run_says_what_is_left(capsys):
    first, second = said(capsys, runs=2, steps=80, seconds=5).values()
    # The second one: its first step, a minute, and 79 of 5 seconds.
    assert first.endswith("until 12:08; with the 1 after it about 14 min, until 12:16\n")
    assert "after" not in second and "about 6 min" in second


def test_many_short_runs_say_so_once(capsys):
    [(place, line)] = said(capsys, runs=10, steps=20, seconds=1).items()
    # 11 s, and 9 of 60 + 19 s.
    assert place == (0, 9) and "oplora: about 12 min for this run and the 9 after it, until 12:" in line


@pytest.mark.parametrize(
    ("runs", "steps", "seconds"), [(1, 180, 1), (2, 50, 1), (2, 1000, 0.05), (1, 3, 100)]
)
def test_short_ones_are_silent(runs, steps, seconds, capsys):
    assert said(capsys, runs, steps, seconds) == {}


def test_tensorboard_missing(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ExperimentError, match="pip install 'tensorboardX"):
        hooks.tensorboard(tmp_path)
