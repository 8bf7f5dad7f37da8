"""What is seen of a run while it trains."""

import sys

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


def test_tensorboard_missing(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ExperimentError, match="pip install 'tensorboardX"):
        hooks.tensorboard(tmp_path)
