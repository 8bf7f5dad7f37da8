"""A run is the same whether or not it was interrupted, and is run once."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from experiments import ExperimentError, storage, training
from experiments.linear import Linear
from experiments.mnist import Mnist
from experiments.storage import Config
from experiments.training import batches, load_parameters, optimizer_bytes, train
from oplora_jax import LowRank

LINEAR = Linear(epochs=4)


class Interruption(Exception):
    pass


def interrupt_at(step):
    def notify(done, steps, metrics):
        if done == step:
            raise Interruption

    return notify


def without_times(rows):
    return [{k: v for k, v in row.items() if k != "seconds_per_step"} for row in rows]


@pytest.mark.parametrize(
    ("task", "method", "step"),
    [
        (LINEAR, "oplora_1", 2),  # in the first epoch: nothing to resume from
        (LINEAR, "oplora_2_momentum2x", 6),
        (LINEAR, "oplora_projected", 8),  # between two epochs: the last step, before anything is written
        (LINEAR, "scaled_adamw", 14),
        (LINEAR, "svdlora", 9),
        (LINEAR, "full_adamw", 9),
        (LINEAR, "scaled_oplora_1", 9),
        (Mnist(epochs=2, batch_size=400), "oplora_1", 13),
    ],
)
def test_resumed_run_ends_with_the_same_numbers(tmp_path, task, method, step):
    whole = Config(task, method, 0.02, 0, tmp_path / "whole")
    config = dataclasses.replace(whole, output=tmp_path / "parts")
    expected = train(whole)
    with pytest.raises(Interruption):
        train(config, interrupt_at(step))
    assert not config.finished
    assert without_times(train(config)) == without_times(expected)
    assert (config.folder / storage.PARAMETERS).read_bytes() == (
        whole.folder / storage.PARAMETERS
    ).read_bytes()
    assert sorted(os.listdir(config.folder)) == ["config.json", "metrics.csv", "parameters.msgpack"]


def test_interruption_between_metrics_and_checkpoint(tmp_path, monkeypatch):
    whole = Config(LINEAR, "oplora_1", 0.1, 0, tmp_path / "whole")
    config = dataclasses.replace(whole, output=tmp_path / "parts")
    expected = train(whole)
    save = storage.save_checkpoint

    def fail_late(folder, epoch, state):
        if epoch == 3:
            raise Interruption
        save(folder, epoch, state)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "save_checkpoint", fail_late)
        with pytest.raises(Interruption):
            train(config)
    assert len(storage.read_metrics(config.folder)) == 3  # the third epoch's row has no checkpoint
    assert without_times(train(config)) == without_times(expected)


def test_killed_process_resumes(tmp_path):
    command = [
        sys.executable,
        "-m",
        "experiments",
        "run",
        "linear",
        "--method",
        "oplora_1",
        "--epochs",
        "100",
    ]
    configs = [
        Config(Linear(epochs=100), "oplora_1", 0.1, 0, tmp_path / name) for name in ("whole", "killed")
    ]
    start = lambda config: subprocess.Popen(
        [*command, "--output", str(config.output)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    whole, killed = map(start, configs)
    deadline = time.monotonic() + 60
    while not (configs[1].folder / storage.CHECKPOINT).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL and not configs[1].finished
    again = start(configs[1])
    for process in (whole, again):
        assert process.communicate(timeout=60) and process.returncode == 0
    expected, found = (without_times(storage.read_metrics(config.folder)) for config in configs)
    assert len(found) == 100 and found == expected


def test_finished_run_is_not_run_again(tmp_path, monkeypatch):
    config = Config(Linear(epochs=2), "oplora_1", 0.1, 0, tmp_path)
    rows = train(config)
    before = {path: path.stat().st_mtime_ns for path in config.folder.iterdir()}
    monkeypatch.setattr(training, "_step", None)  # a step would fail
    assert train(config) == rows
    assert {path: path.stat().st_mtime_ns for path in config.folder.iterdir()} == before


def test_other_settings_are_another_run(tmp_path):
    config = Config(Linear(epochs=2), "oplora_1", 0.1, 0, tmp_path)
    others = [
        dataclasses.replace(config, task=Linear(epochs=3)),
        dataclasses.replace(config, task=Linear("full_batch", epochs=2)),
        dataclasses.replace(config, method="oplora_2"),
        dataclasses.replace(config, method="scaled_oplora_1_damping1e-05_power0.5"),
        dataclasses.replace(config, learning_rate=0.1 + 1e-9),
        dataclasses.replace(config, seed=1),
    ]
    assert len({c.folder for c in [config, *others]}) == 7
    train(config)
    assert not any(c.finished for c in others)
    # Where the data lie and where the results go change no number.
    same = Config(Mnist("tfds"), "svdlora", 0.1, 0, tmp_path)
    assert same.folder == dataclasses.replace(same, task=Mnist("tfds", data_dir=tmp_path)).folder


def test_files(tmp_path):
    config = Config(Linear(epochs=2), "oplora_1", 0.1, 5, tmp_path)
    rows = train(config)
    assert json.loads((config.folder / "config.json").read_text()) == {
        "task": "linear_stochastic",
        "method": "oplora_1",
        "learning_rate": 0.1,
        "seed": 5,
        "setting": "stochastic",
        "epochs": 2,
    }
    assert storage.read_metrics(config.folder) == rows
    assert [row["epoch"] for row in rows] == [1, 2]
    trainable, frozen = load_parameters(config)
    assert isinstance(trainable["weight"], LowRank)
    found = config.task.evaluate(trainable, frozen, config.task.load(5)[1])
    assert found["excess_loss"] == rows[-1]["excess_loss"]


def test_write_keeps_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "file"
    storage.write(path, b"old")

    def fail(descriptor):
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="the disk is full"):
        storage.write(path, b"new")
    assert path.read_bytes() == b"old"


def test_batches_visit_every_example_once():
    epoch = list(batches(200, 64, seed=1, epoch=2))
    indices, weights = (np.concatenate(column) for column in zip(*epoch, strict=True))
    assert [len(i) for i, _ in epoch] == [64] * 4
    assert sorted(indices[weights == 1]) == list(range(200))
    assert max(np.bincount(indices)) == 2  # the fill is of different examples
    assert weights.sum() == 200
    again, other = (np.concatenate([i for i, _ in batches(200, 64, 1, e)]) for e in (2, 3))
    assert np.array_equal(indices, again) and not np.array_equal(indices, other)


def test_batches_of_similar_lengths():
    lengths = np.random.default_rng(0).integers(1, 100, 500)
    epoch = list(batches(500, 16, 1, 2, lengths))
    indices, weights = (np.concatenate(column) for column in zip(*epoch, strict=True))
    assert sorted(indices[weights == 1]) == list(range(500)) and weights.sum() == 500
    spread = lambda epoch: np.mean([np.ptp(lengths[i[w == 1]]) for i, w in epoch])
    assert spread(epoch) < 0.1 * spread(batches(500, 16, 1, 2))
    starts = [lengths[i].min() for i, _ in epoch]
    assert starts != sorted(starts)  # short and long batches in random order
    again, other = (np.concatenate([i for i, _ in batches(500, 16, 1, e, lengths)]) for e in (2, 3))
    assert np.array_equal(indices, again) and not np.array_equal(indices, other)


@dataclasses.dataclass(frozen=True)
class Decaying(Linear):
    evaluations = 3
    decay = True
    max_norm = 5.0


@pytest.mark.parametrize("method", ["lora_sgd", "oplora_1", "scaled_oplora_1"])
def test_decay_clipping_and_evaluations_within_an_epoch(tmp_path, method):
    task = Decaying(epochs=2)
    whole = Config(task, method, 0.1, 0, tmp_path / "whole")
    config = dataclasses.replace(whole, output=tmp_path / "parts")
    expected = train(whole)
    assert [row["epoch"] for row in expected] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2])
    assert all(row["peak_memory_mib"] > 0 for row in expected)
    with pytest.raises(Interruption):
        train(config, interrupt_at(6))  # of 8, between the fourth evaluation and the fifth
    assert without_times(train(config)) == without_times(expected)


def test_decay_and_clipping_by_hand(tmp_path):
    """SGD without momentum: steps of length rate * (1 - t / T) * max_norm, where gradients are longer."""
    task = Decaying("full_batch", epochs=4)
    config = Config(task, "full_sgd", 0.1, 0, tmp_path)
    _, target = task.load(0)[0]
    weight = np.asarray(task.init(0, full=True)[0]["weight"], np.float64)
    for step in range(4):
        gradient = 2 * (weight - np.asarray(target, np.float64))
        norm = np.linalg.norm(gradient)
        assert norm > 5
        weight = weight - 0.1 * (1 - step / 4) * 5 / norm * gradient
    train(config)
    # float32 through four steps
    np.testing.assert_allclose(load_parameters(config)[0]["weight"], weight, rtol=0, atol=1e-6)


def test_optimizer_state_size(tmp_path):
    size = lambda method: optimizer_bytes(Config(Linear(), method, 0.1, 0, tmp_path))
    factors, dense, counters = 4 * 8 * 800, 4 * 200 * 600, 4 * np.arange(4)
    assert size("lora_sgd") == factors
    assert size("lora_adamw") - 2 * factors in counters
    assert size("oplora_1") - factors in counters
    assert size("oplora_1_momentum2x") - 2 * factors in counters
    assert size("svdlora") - dense in counters


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": Linear(epochs=0)}, "epochs is 0"),
        ({"task": Mnist(batch_size=4001)}, "batch-size is 4001; expected 1 to 4000"),
        ({"task": Mnist(batch_size=0)}, "batch-size is 0"),
        ({"learning_rate": -0.1}, "learning-rate is -0.1"),
        ({"learning_rate": float("nan")}, "learning-rate is nan"),
        ({"seed": -1}, "seed is -1"),
        ({"method": "adam"}, "no method 'adam'"),
    ],
)
def test_bad_configurations(tmp_path, changes, message):
    config = dataclasses.replace(Config(Linear(), "svdlora", 0.1, 0, tmp_path), **changes)
    with pytest.raises(ExperimentError, match=message):
        train(config)
    assert not list(tmp_path.iterdir())


def test_learning_rates_share_a_compilation(tmp_path):
    task = Linear(epochs=1)
    train(Config(task, "lora_sgd", 0.001, 0, tmp_path))
    with jax.no_tracing():
        train(Config(task, "lora_sgd", 0.002, 0, tmp_path))
