import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import oplora_jax
from experiments import ExperimentError, methods
from oplora_jax import LowRank, OuterProduct
from tests.arrays import normals

SETTINGS = methods.Settings(learning_rate=0.1, momentum=0.9, rank=2, loss_reduction="mean", seed=0)
NAMES = [name.replace("K", "2").replace("X", "0.5") for name in methods.METHODS]


@pytest.mark.parametrize("name", NAMES)
def test_every_method_takes_a_step(name):
    method = methods.find(name)
    optimizer = method.optimizer(SETTINGS)
    normal = normals(0)
    params = {"bias": jnp.ones(3)}
    gradients = {"bias": jnp.ones(3)}
    if method.gradient == "full":
        params["kernel"], gradients["kernel"] = normal(4, 3), normal(4, 3)
    else:
        params["kernel"] = LowRank(normal(4, 2), normal(2, 3))
        gradients["kernel"] = {
            "factors": LowRank(normal(4, 2), normal(2, 3)),
            "exact": normal(4, 3),
            "outer": OuterProduct(normal(5, 4), normal(5, 3)),
        }[method.gradient]
    updates, _ = jax.jit(optimizer.update)(gradients, optimizer.init(params), params)
    new = optax.apply_updates(params, updates)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(new))
    # Far above float32 rounding of entries near 1, and below every step.
    still = lambda leaf: np.abs(leaf).max() < 1e-5
    same = [jax.tree_util.keystr(path) for path, leaf in jax.tree.leaves_with_path(updates) if still(leaf)]
    assert same == (["['kernel'].a"] if name == "lora_fa" else [])


def test_numbers_in_a_name():
    optimizer = methods.find("oplora_1_momentum4x").optimizer(SETTINGS)
    state = optimizer.init(LowRank(jnp.ones((9, 2)), jnp.ones((2, 9))))
    assert state.lora.momentum.a.shape == (9, 8)


def test_variants_of_scaled_oplora(monkeypatch):
    monkeypatch.setattr(oplora_jax, "scaled_oplora", lambda rate, **options: {"rate": rate, **options})
    options = lambda name: methods.find(name).optimizer(SETTINGS._replace(loss_reduction="sum"))
    named = methods.scaled_oplora_name("dense", 2, 1e-6, 0.25)
    assert named == "scaled_oplora_2_dense_damping1e-06_power0.25"
    assert options(named) == {
        "rate": 0.1,
        "b1": 0.9,
        "b2": 0.99,
        "num_iters": 2,
        "regularization": 1e-2,
        "damping": 1e-6,
        "power": 0.25,
        "structure": "dense",
        "loss_reduction": "sum",
        "seed": 0,
    }
    usual = methods.scaled_oplora_name("diagonal", 1, 1e-5, 0.5)
    assert options(usual) == options("scaled_oplora_1")


@pytest.mark.parametrize(
    "name",
    [
        "oplora",
        "oplora_K",
        "oplora_",
        "svdlora_2",
        "",
        "oplora_1_2",
        "oplora_1.5",
        "scaled_oplora_1_damping-1_power1",
    ],
)
def test_unknown_names(name):
    with pytest.raises(ExperimentError, match="there are full_sgd"):
        methods.find(name)


def test_protocol_rates():
    assert methods.protocol_rate("oplora_8", "mnist") == 0.02
    assert methods.protocol_rate("scaled_gd", "linear_full_batch") == 0.48
    with pytest.raises(ExperimentError, match="svdlora has no learning rate for chess"):
        methods.protocol_rate("svdlora", "chess")


def test_all_methods():
    names = methods.expand(["oplora_8", "all", "svdlora"])
    assert names[0] == "oplora_8" and len(names) == len(set(names)) == 1 + len(methods.ALL)
    # Every optimizer is among them.
    assert {methods.find(name).of for name in methods.ALL} >= {
        method.of for method in methods.METHODS.values()
    }
