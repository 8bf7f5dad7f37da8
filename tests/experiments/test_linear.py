"""The linear task: its parts, and its curves against those recorded with the authors' code."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import linear
from experiments.linear import Linear
from experiments.methods import method
from experiments.storage import Config
from experiments.training import train
from oplora_jax import svd, to_dense

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "linear_curves.json").read_text())


@pytest.fixture(scope="module")
def excess(tmp_path_factory):
    """A function of a setting and a method: the excess loss after each epoch, the median over seeds."""
    output = tmp_path_factory.mktemp("linear")

    def curve(setting, of, seeds=(0,)):
        task = Linear(setting)
        runs = [train(Config(task, of, of.rate(task.protocol), seed, output)) for seed in seeds]
        return np.median([metrics["excess_loss"] for metrics in runs], axis=0)

    return curve


def test_excess_is_zero_at_the_best_approximation():
    task = Linear()
    test = task.load(seed=3)[1][""]
    best = svd([(1.0, jnp.asarray(test[0], jnp.float32))], rank=8)
    # Rounding of the factors is of second order at the optimum: 1e5 * (1e-7 * a few)^2.
    assert abs(task.evaluate({"weight": best}, None, test)["excess_loss"]) < 1e-6
    assert linear.best_error(np.diag([3.0, 2.0, 1.0]), 1) == 5.0


def test_start():
    task = Linear()
    lora, _ = task.init(seed=3, full=False)
    full, frozen = task.init(seed=3, full=True)
    np.testing.assert_array_equal(to_dense(lora["weight"]), full["weight"])
    assert not frozen["base"].any()
    a, b = lora["weight"].a, lora["weight"].b
    np.testing.assert_allclose(a.T @ a, b @ b.T, atol=1e-5)  # balanced, up to float32
    assert jnp.abs(full["weight"]).max() < 0.08  # the start's bound is 1 / sqrt(200) = 0.071
    assert not np.allclose(full["weight"], task.init(seed=4, full=True)[0]["weight"])


def test_weights_leave_examples_out():
    task = Linear()
    (x, y), _ = task.load(seed=0)
    trainable, frozen = task.init(seed=0, full=False)
    some = task.loss(trainable, frozen, (x[:5], y[:5]), jnp.ones(5))
    padded = task.loss(trainable, frozen, (x[:7], y[:7]), jnp.array([1.0] * 5 + [0.0] * 2))
    np.testing.assert_allclose(some, padded, rtol=1e-6)


# Other seeds than the golden ones. In the first epochs the task decides alone: within 1.2 in a trial. While
# the excess is large a seed is within 1.5. At the end one method's seeds are up to 10 apart, and the golden
# ones, whose losses are float32, stop above those here.
@pytest.mark.parametrize(
    ("case", "of"),
    [
        ("det/lora_sgd", method("lora_sgd")),
        ("det/lora_adamw", method("lora_adamw")),
        ("det/oplora_1", method("oplora")),
        ("det/oplora_2", method("oplora", num_iters=2)),
        ("det/oplora_8", method("oplora", num_iters=8)),
        ("sto/svdlora", method("svdlora")),
        ("sto/lora_sgd", method("lora_sgd")),
        ("sto/lora_adamw", method("lora_adamw")),
        ("sto/precond", method("scaled_gd")),
        ("sto/oplora_1", method("oplora")),
        ("sto/oplora_2", method("oplora", num_iters=2)),
        ("sto/oplora_8", method("oplora", num_iters=8)),
        ("sto/oplora_proj_1", method("oplora_projected")),
        ("sto/oplora_2_rm2", method("oplora", num_iters=2, momentum_rank=16)),
    ],
)
def test_curves_have_the_golden_size(excess, case, of):
    curve = excess("full_batch" if case.startswith("det") else "stochastic", of)
    epochs = np.array(GOLDEN[case]["epoch"])
    golden = np.array(GOLDEN[case]["median_excess_loss"])
    ratios = np.maximum(curve[epochs - 1], 0.1) / np.maximum(golden, 0.1)
    early, middle = ratios[epochs <= 2], ratios[golden > 200]
    assert np.all((early < 1.5) & (early > 1 / 1.5)), ratios
    assert np.all((middle < 3) & (middle > 1 / 3)), ratios
    assert np.all(ratios < 10), ratios


def test_full_batch_many_iterations_reach_the_optimum(excess):
    assert excess("full_batch", method("oplora", num_iters=8))[-1] < 1
    assert excess("full_batch", method("oplora", num_iters=32))[-1] < 0.01
    assert abs(excess("full_batch", method("svdlora"))[0]) < 0.01  # the learning rate is exact: one step


def test_full_batch_ranking(excess):
    final = lambda *name, **changes: excess("full_batch", method(*name, **changes))[-1]
    eight, two, one = (final("oplora", num_iters=k) for k in (8, 2, 1))
    assert eight < two < one < min(final("lora_sgd"), final("lora_adamw"))


@pytest.mark.parametrize("num_iters", [1, 2])
def test_stochastic_oplora_passes_the_baselines(excess, num_iters):
    seeds = (0, 1, 2)
    curve = excess("stochastic", method("oplora", num_iters=num_iters), seeds)
    for baseline in ("lora_sgd", "lora_adamw", "scaled_gd"):
        assert curve[49] < excess("stochastic", method(baseline), seeds)[49]
    assert curve[-1] < excess("stochastic", method("svdlora"), seeds)[-1]
