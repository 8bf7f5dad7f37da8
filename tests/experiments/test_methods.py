import jax
import jax.numpy as jnp
import optax
import pytest

from experiments import ExperimentError, methods
from oplora_jax import LowRank

NAMES = [name.replace("K", "2") for name in methods.METHODS]


@pytest.mark.parametrize("name", NAMES)
def test_every_method_takes_a_step(name):
    method = methods.find(name)
    optimizer = method.optimizer(methods.Settings(learning_rate=0.1, momentum=0.9, rank=2, seed=0))
    params = {"bias": jnp.ones(3)}
    gradients = {"bias": jnp.ones(3)}
    if method.gradient == "full":
        params["kernel"] = gradients["kernel"] = jnp.ones((4, 3))
    else:
        params["kernel"] = LowRank(jnp.ones((4, 2)), jnp.eye(2, 3))
        gradients["kernel"] = params["kernel"] if method.gradient == "factors" else jnp.ones((4, 3))
    updates, _ = jax.jit(optimizer.update)(gradients, optimizer.init(params), params)
    new = optax.apply_updates(params, updates)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(new))
    assert not jnp.allclose(new["bias"], params["bias"])


def test_numbers_in_a_name():
    settings = methods.Settings(learning_rate=0.1, momentum=0.9, rank=2, seed=0)
    state = (
        methods.find("oplora_1_momentum4x")
        .optimizer(settings)
        .init(LowRank(jnp.ones((9, 2)), jnp.ones((2, 9))))
    )
    assert state.lora.momentum.a.shape == (9, 8)


@pytest.mark.parametrize("name", ["oplora", "oplora_K", "oplora_", "svdlora_2", "", "oplora_1_2"])
def test_unknown_names(name):
    with pytest.raises(ExperimentError, match="there are full_sgd"):
        methods.find(name)


def test_protocol_rates():
    assert methods.protocol_rate("oplora_8", "mnist") == 0.02
    assert methods.protocol_rate("scaled_gd", "linear_full_batch") == 0.48
    with pytest.raises(ExperimentError, match="svdlora has no learning rate for chess"):
        methods.protocol_rate("svdlora", "chess")
