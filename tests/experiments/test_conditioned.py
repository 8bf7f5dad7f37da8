"""The ill-conditioned task: its parts, and what the metric is for."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.conditioned import Conditioned
from experiments.methods import method
from experiments.storage import Config
from experiments.training import train
from oplora_jax import svd


@pytest.mark.parametrize("rotated", [False, True])
def test_target(rotated):
    task = Conditioned(rotated)
    (x, y), (x_test, y_test) = task.load(seed=1)
    assert (len(x), len(x_test)) == (8192, 1024) and x.dtype == y.dtype == np.float32
    scales = np.linalg.svd(x_test, compute_uv=False) / np.sqrt(1024)
    # 1024 samples of 64 features: singular values are within 1 +- sqrt(64 / 1024) of their scales.
    np.testing.assert_allclose(scales, np.logspace(3, -3, 64), rtol=0.5)
    largest, least = x.std(axis=0).max(), x.std(axis=0).min()
    assert largest / least < 10 if rotated else largest / least > 1e5
    exact = np.linalg.lstsq(x_test, y_test)[0]
    assert np.linalg.matrix_rank(y_test, tol=1e-6 * np.linalg.norm(y_test)) == task.rank
    # float32 has 1e-7 of entries and features that cancel by a factor of up to 1e4 in the outputs.
    weight = svd([(1.0, jnp.asarray(exact, jnp.float32))], task.rank)
    assert task.evaluate({"weight": weight}, None, (x_test, y_test))["relative_test_loss"] < 1e-4


@pytest.mark.parametrize("full", [False, True])
def test_start_is_zero(full):
    task = Conditioned()
    trainable, frozen = task.init(seed=0, full=full)
    (x, y), test = task.load(seed=0)
    assert task.evaluate(trainable, frozen, test)["relative_test_loss"] == 1
    weights = jnp.array([1.0] * 5 + [0.0] * 2)
    loss = task.loss(trainable, frozen, (x[:7], y[:7]), weights)
    np.testing.assert_allclose(loss, np.mean(y[:5] ** 2), rtol=1e-6)


def test_scaled_oplora_learns_what_unscaled_methods_do_not(tmp_path):
    task = Conditioned(True, epochs=4)
    final = lambda of, rate: train(Config(task, of, rate, 0, tmp_path))["relative_test_loss"].iloc[-1]
    scaled = final(method("scaled_oplora", structure="dense"), 0.003)
    assert scaled < 0.9 * min(final(method("oplora"), 1e-6), final(method("scaled_gd"), 1e-5))
