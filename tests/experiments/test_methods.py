"""Presets of methods, their settings, and what an optimizer is made of."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import ExperimentError, methods
from experiments.linear import Linear
from experiments.methods import method
from oplora_jax import LowRank, OuterProduct
from tests.arrays import normals

VARIANTS = [
    *map(method, methods.PRESETS),
    method("oplora", num_iters=2, momentum_rank=4),
    method("oplora", num_iters=0),
    method("scaled_oplora", structure="dense", power=1.0),
    method("lora_pre", eps=0.1),
]


@pytest.mark.parametrize("setting", ["full_batch", "stochastic"])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_method_takes_a_step(variant, setting):
    optimizer = variant.optimizer(Linear(setting), 0.1, seed=0)
    normal = normals(0)
    params = {"bias": jnp.ones(3)}
    gradients = {"bias": jnp.ones(3)}
    if variant.gradient == "full":
        params["kernel"], gradients["kernel"] = normal(4, 3), normal(4, 3)
    else:
        params["kernel"] = LowRank(normal(4, 2), normal(2, 3))
        gradients["kernel"] = {
            "factors": LowRank(normal(4, 2), normal(2, 3)),
            "exact": normal(4, 3),
            "outer": OuterProduct(normal(5, 4), normal(5, 3)),
        }[variant.gradient]
    updates, _ = jax.jit(optimizer.update)(gradients, optimizer.init(params), params)
    new = optax.apply_updates(params, updates)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(new))
    # Far above float32 rounding of entries near 1, and below every step.
    still = lambda leaf: np.abs(leaf).max() < 1e-5
    same = [jax.tree_util.keystr(path) for path, leaf in jax.tree.leaves_with_path(updates) if still(leaf)]
    assert same == (["['kernel'].a"] if variant.preset == "lora_fa" else [])


def test_settings_reach_the_optimizer():
    optimizer = method("oplora", momentum_rank=8).optimizer(Linear(), 0.1, seed=0)
    state = optimizer.init(LowRank(jnp.ones((9, 2)), jnp.ones((2, 9))))
    assert state.lora.momentum.a.shape == (9, 8)


@pytest.mark.parametrize(("setting", "momentum"), [("full_batch", 0.0), ("stochastic", 0.75)])
def test_presets_of_psi_lora(monkeypatch, setting, momentum):
    factory = lambda learning_rate, *, b1=0.9, damping=0.0, power=0.0, seed=0, **others: (
        learning_rate, b1, damping, power, seed, others)  # fmt: skip
    monkeypatch.setitem(methods._FACTORIES, "scaled_oplora", factory)
    made = method("psi_lora", damping=1e-6, structure="dense").optimizer(Linear(setting), 0.1, seed=5)
    *numbers, others = made
    assert numbers == [0.1, momentum, 1e-6, 0.5, 5]
    expected = {"b2": 0.99, "regularization": 1e-2, "structure": "dense", "loss_reduction": "sum"}
    assert expected.items() <= others.items()


@pytest.mark.parametrize("name", ["full_sgd", "svdlora", "lora_sgd", "scaled_gd"])
def test_no_momentum_keeps_no_state(name):
    kernel = jnp.ones((9, 7)) if name == "full_sgd" else LowRank(jnp.ones((9, 2)), jnp.ones((2, 7)))
    size = lambda setting: sum(
        leaf.size for leaf in jax.tree.leaves(method(name).optimizer(Linear(setting), 0.1, 0).init(kernel))
    )
    assert size("full_batch") < 9 < size("stochastic")  # counters at most


def test_what_is_unchanged_is_one_method():
    """However it is called; so that no run is repeated under another name."""
    assert method("oplora", num_iters=1, regularization=1e-3) == method("oplora")
    assert str(method("oplora", num_iters=2, momentum_rank=16)) == "oplora(num_iters=2, momentum_rank=16)"
    assert method("oplora", num_iters=2, momentum_rank=16) == method("oplora", momentum_rank=16, num_iters=2)
    assert method("oplora", momentum=0.75) != method("oplora")  # which takes that of the task
    assert method("oplora_projected").settings["momentum_kind"] == "projected"
    assert hash(method("oplora", num_iters=2)) == hash(method("oplora", num_iters=2))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2", 2), ("1e-3", 1e-3), ("0.5", 0.5), ("-1", -1), ("none", None), ("True", True), ("false", False),
        ("dense", "dense"), ("inf", float("inf")),
    ],
)  # fmt: skip
def test_values(text, value):
    assert methods.parse(text) == value and type(methods.parse(text)) is type(value)


@pytest.mark.parametrize("name", ["adam", "oplora_1", "oplora_", "", "optax.sgd"])
def test_unknown_names(name):
    with pytest.raises(ExperimentError, match=f"no method '{name}'; there are full_sgd, .*, oplora,"):
        method(name)


def test_unknown_settings(unchecked):
    with pytest.raises(ExperimentError, match="svdlora has no setting 'num_iters'; it has momentum"):
        method("svdlora", num_iters=2)
    with pytest.raises(ExperimentError, match=r"scaled_oplora\(structure=sparse\): .*structure is"):
        method("scaled_oplora", structure="sparse").optimizer(Linear(), 0.1, 0)


def test_rates():
    assert method("oplora", num_iters=8).rate("mnist") == 0.02
    assert method("scaled_gd").rate("linear_full_batch") == 0.48
    with pytest.raises(ExperimentError, match="svdlora has no learning rate for chess; name one"):
        method("svdlora").rate("chess")


def test_presets_are_complete():
    """Every optimizer is among them, and what is written of one is known."""
    assert {method(name).of for name in methods.PRESETS} == set(methods.OPTIMIZERS)
    protocols = {"linear_full_batch", "linear_stochastic", "mnist", "cifar100", "text", "glue", "lm"}
    assert all(preset.get("learning_rate", {}).keys() <= protocols for preset in methods.PRESETS.values())
