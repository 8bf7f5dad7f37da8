"""A run is the same whether or not it was interrupted, and is run once."""

import dataclasses
import json
import math
import multiprocessing
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest

from experiments import ExperimentError, storage, training
from experiments.linear import Linear
from experiments.methods import method
from experiments.mnist import Mnist
from experiments.storage import Config
from experiments.training import batches, load_parameters, optimizer_bytes, train
from oplora_jax import LowRank

LINEAR = Linear(epochs=4)


class Interruption(Exception):
    pass


def interrupt_at(step):
    def hook(done, steps, metrics, state):
        if done == step:
            raise Interruption

    return hook


def assert_same(found, expected):
    """To the last bit, but for the times."""
    pd.testing.assert_frame_equal(*(z.drop(columns="seconds_per_step") for z in (found, expected)), rtol=0)


@pytest.mark.parametrize(
    ("task", "of", "step"),
    [
        (LINEAR, method("oplora"), 2),  # in the first epoch: nothing to resume from
        (LINEAR, method("oplora", num_iters=2, momentum_rank=16), 6),
        (LINEAR, method("oplora_projected"), 8),  # the last step of an epoch, before anything is written
        (LINEAR, method("scaled_adamw"), 14),
        (LINEAR, method("svdlora"), 9),
        (LINEAR, method("full_adamw"), 9),
        (LINEAR, method("scaled_oplora"), 9),
        (Mnist(epochs=2, batch_size=400), method("oplora"), 13),
    ],
)
def test_resumed_run_ends_with_the_same_numbers(tmp_path, task, of, step):
    whole = Config(task, of, 0.02, 0, tmp_path / "whole")
    config = dataclasses.replace(whole, output=tmp_path / "parts")
    expected = train(whole)
    with pytest.raises(Interruption):
        train(config, interrupt_at(step), checkpoint_seconds=0)
    assert not config.finished
    first = []
    assert_same(train(config, lambda done, *_: first.append(done), checkpoint_seconds=0), expected)
    epoch = math.ceil(len(task.load(0)[0][0]) / task.batch_size)
    assert first[0] == 1 + (step - 1) // epoch * epoch  # it goes on behind the last epoch that was kept
    for found, same in zip(*(jax.tree.leaves(load_parameters(z)) for z in (config, whole)), strict=True):
        np.testing.assert_array_equal(found, same)
    assert sorted(os.listdir(config.folder)) == ["config.json", "metrics.csv", "parameters"]


def test_interruption_between_metrics_and_checkpoint(tmp_path, monkeypatch):
    whole = Config(LINEAR, method("oplora"), 0.1, 0, tmp_path / "whole")
    config = dataclasses.replace(whole, output=tmp_path / "parts")
    expected = train(whole)
    keep = storage.Checkpoints.__call__

    def fail_late(self, step, *arguments):
        if step == 12:
            raise Interruption
        keep(self, step, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(storage.Checkpoints, "__call__", fail_late)
        with pytest.raises(Interruption):
            train(config, checkpoint_seconds=0)
    assert len(storage.read_metrics(config.folder)) == 3  # the third epoch's row has no checkpoint
    assert_same(train(config), expected)


def test_checkpoints_are_seconds_apart(tmp_path):
    config = Config(LINEAR, method("oplora"), 0.1, 0, tmp_path)
    with pytest.raises(Interruption):
        train(config, interrupt_at(9), checkpoint_seconds=1e6)
    assert not os.listdir(config.folder / "checkpoints") and len(storage.read_metrics(config.folder)) == 2


def train_until_killed(config, seconds):
    """In a process of its own: dies by signal 9 so many seconds after the first step, if it is not done."""

    def hook(step, steps, metrics, state):
        if hook.first:
            hook.first = False
            signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            signal.setitimer(signal.ITIMER_REAL, seconds)

    hook.first = True
    train(config, hook, checkpoint_seconds=0)


def test_killed_ten_times(tmp_path):
    """At random moments: in steps, while the metrics are written, and while a checkpoint is."""
    config = Config(Linear(epochs=100), method("oplora"), 0.1, 0, tmp_path / "killed")
    processes = multiprocessing.get_context("forkserver")  # it has loaded everything, and starts fast
    processes.set_forkserver_preload(["experiments.training", __name__])
    for seconds in np.random.default_rng(0).uniform(0, 0.3, 10):
        process = processes.Process(target=train_until_killed, args=(config, seconds))
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL and not config.finished
    first = []
    found = train(config, lambda step, *_: first.append(step))
    assert first[0] > 1  # it was resumed, and not begun anew
    assert_same(found, train(dataclasses.replace(config, output=tmp_path)))


def test_finished_run_is_not_run_again(tmp_path, monkeypatch):
    config = Config(Linear(epochs=2), method("oplora"), 0.1, 0, tmp_path)
    rows = train(config)
    before = {path: path.stat().st_mtime_ns for path in config.folder.rglob("*")}
    monkeypatch.setattr(training, "_step", None)  # a step would fail
    assert train(config).equals(rows)
    assert {path: path.stat().st_mtime_ns for path in config.folder.rglob("*")} == before


def test_what_is_not_adapted_trains_alike(tmp_path):
    """By AdamW, whatever the method is; where nothing of the method's moves, to the last bit."""
    task = Mnist(epochs=1, batch_size=600, others_rate=3e-3)
    still = lambda name: train_to(Config(task, method(name), 1e-30, 0, tmp_path))
    expected = still("lora_sgd")["others"]
    for name in ("oplora", "scaled_oplora", "lora_adamw", "svdlora"):
        found = still(name)["others"]
        assert found.keys() == expected.keys()
        for path, leaf in found.items():
            # svdlora's decomposition, and Adam's first step, round LoRA's start
            np.testing.assert_allclose(leaf, expected[path], atol=1e-4 * np.abs(expected[path]).max())
    full = still("full_sgd")
    assert full["others"].keys() == expected.keys() and full["adapted"].keys() == {
        f"Dense_{i}/kernel" for i in range(3)
    }


def train_to(config):
    train(config)
    return load_parameters(config)[0]


def test_adamw_of_what_is_not_adapted_by_hand():
    """One step, and the size of both states: the method's is its own alone."""
    task = Mnist(others_rate=3e-3)
    trainable, frozen = task.init(0, full=False)
    data, _ = task.load(0)
    batch = task.take(data, np.arange(50))
    gradients = jax.grad(task.loss)(trainable, frozen, batch, np.ones(50, np.float32))
    tx = training.make_optimizer(task, method("lora_sgd"), 0.5, seed=0, steps=1)
    updates, _ = tx.update(gradients, tx.init(trainable), trainable)
    for path, g in gradients["others"].items():
        g = np.asarray(g, np.float64)
        np.testing.assert_allclose(updates["others"][path], -3e-3 * g / (np.abs(g) + 1e-8), rtol=1e-4)
    for path, g in gradients["adapted"].items():  # SGD's momentum, before there is any
        np.testing.assert_allclose(updates["adapted"][path].a, -0.5 * g.a, rtol=1e-6)
    of_lora, whole = optimizer_bytes(task, method("lora_sgd"))
    others = sum(leaf.size for leaf in trainable["others"].values())
    assert of_lora == 4 * sum(leaf.size for leaf in jax.tree.leaves(trainable["adapted"]))
    assert whole - of_lora - 2 * 4 * others in (0, 4, 8)  # counters


@dataclasses.dataclass(frozen=True)
class DecayingMnist(Mnist):
    decay = True
    max_norm = 1.0


def test_what_is_not_adapted_decays_and_is_clipped_by_itself():
    task = DecayingMnist(others_rate=0.5)
    tx = training.make_optimizer(task, method("full_sgd"), 1.0, seed=0, steps=4)
    params = {"adapted": {"w": jnp.zeros(2)}, "others": {"v": jnp.zeros(2)}}
    gradients = {"adapted": {"w": jnp.array([3.0, 4.0])}, "others": {"v": jnp.array([0.3, 0.4])}}
    state = tx.init(params)
    for step in range(4):
        updates, state = tx.update(gradients, state, params)
        # Along a gradient that stays Adam's steps are of the rate's length, up to its corrections in float32.
        np.testing.assert_allclose(updates["others"]["v"], 2 * [-0.5 * (1 - step / 4)], rtol=1e-4)
        if step == 0:  # SGD's, clipped
            np.testing.assert_allclose(updates["adapted"]["w"], [-0.6, -0.8], rtol=1e-6)
    moments = optax.tree.get(state, "mu")["others"]["v"]
    np.testing.assert_allclose(moments, np.array([0.3, 0.4]) * (1 - 0.9**4), rtol=1e-5)  # not clipped


def test_other_settings_are_another_run(tmp_path):
    config = Config(Linear(epochs=2), method("oplora"), 0.1, 0, tmp_path)
    others = [
        dataclasses.replace(config, task=Linear(epochs=3)),
        dataclasses.replace(config, task=Linear("full_batch", epochs=2)),
        dataclasses.replace(config, method=method("oplora", num_iters=2)),
        dataclasses.replace(config, method=method("oplora_projected")),
        dataclasses.replace(config, learning_rate=0.1 + 1e-9),
        dataclasses.replace(config, seed=1),
    ]
    assert len({c.folder for c in [config, *others]}) == 7
    train(config)
    assert not any(c.finished for c in others)
    # Where the data lie and where the results go change no number.
    same = Config(Mnist("tfds"), method("svdlora"), 0.1, 0, tmp_path)
    assert same.folder == dataclasses.replace(same, task=Mnist("tfds", data_dir=tmp_path)).folder


def test_files(tmp_path):
    config = Config(Linear(epochs=2), method("oplora", num_iters=2), 0.1, 5, tmp_path)
    rows = train(config)
    written = json.loads((config.folder / "config.json").read_text())
    settings = written.pop("settings")
    assert {"num_iters": 2, "momentum": "task.momentum", "regularization": 1e-3}.items() <= settings.items()
    assert written == {
        "task": "linear_stochastic",
        "method": "oplora",
        "learning_rate": 0.1,
        "seed": 5,
        "setting": "stochastic",
        "epochs": 2,
    }
    assert storage.read_metrics(config.folder).equals(rows)
    assert rows["epoch"].to_list() == [1, 2]
    trainable, frozen = load_parameters(config)
    assert isinstance(trainable["weight"], LowRank)
    found = config.task.evaluate(trainable, frozen, config.task.load(5)[1][""])
    assert found["excess_loss"] == rows["excess_loss"].iloc[-1]


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


@pytest.mark.parametrize("name", ["lora_sgd", "oplora", "scaled_oplora"])
def test_decay_clipping_and_evaluations_within_an_epoch(tmp_path, name):
    task = Decaying(epochs=2)
    whole = Config(task, method(name), 0.1, 0, tmp_path / "whole")
    config = dataclasses.replace(whole, output=tmp_path / "parts")
    expected = train(whole)
    assert expected["epoch"].to_list() == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2])
    assert (expected["peak_memory_mib"] > 0).all()
    with pytest.raises(Interruption):
        train(
            config, interrupt_at(6), checkpoint_seconds=0
        )  # of 8, between the fourth evaluation and the fifth
    assert_same(train(config), expected)


def test_decay_and_clipping_by_hand(tmp_path):
    """SGD without momentum: steps of length rate * (1 - t / T) * max_norm, where gradients are longer."""
    task = Decaying("full_batch", epochs=4)
    config = Config(task, method("full_sgd"), 0.1, 0, tmp_path)
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


def test_optimizer_state_size():
    def size(name, **changes):
        of_lora, whole = optimizer_bytes(Linear(), method(name, **changes))
        assert of_lora == whole  # nothing else trains
        return whole

    factors, dense, counters = 4 * 8 * 800, 4 * 200 * 600, 4 * np.arange(4)
    assert size("lora_sgd") == factors
    assert size("lora_adamw") - 2 * factors in counters
    assert size("oplora") - factors in counters
    assert size("oplora", momentum_rank=16) - 2 * factors in counters
    assert size("svdlora") - dense in counters


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": Linear(epochs=0)}, "epochs is 0"),
        ({"task": Mnist(batch_size=3001)}, "batch-size is 3001; expected 1 to 3000"),
        ({"task": Mnist(others_rate=0.0)}, "others-rate is 0.0; expected a positive number"),
        ({"task": Mnist(batch_size=0)}, "batch-size is 0"),
        ({"learning_rate": -0.1}, "learning-rate is -0.1"),
        ({"learning_rate": float("nan")}, "learning-rate is nan"),
        ({"seed": -1}, "seed is -1"),
        ({"method": method("oplora", momentum_rank=0)}, "oplora.momentum_rank=0.: .*momentum_rank"),
    ],
)
def test_bad_configurations(tmp_path, changes, message):
    config = dataclasses.replace(Config(Linear(), method("svdlora"), 0.1, 0, tmp_path), **changes)
    with pytest.raises(ExperimentError, match=message):
        train(config)
    assert not list(tmp_path.iterdir())


def test_learning_rates_share_a_compilation(tmp_path):
    task = Linear(epochs=1)
    train(Config(task, method("lora_sgd"), 0.001, 0, tmp_path))
    with jax.no_tracing():
        train(Config(task, method("lora_sgd"), 0.002, 0, tmp_path))
