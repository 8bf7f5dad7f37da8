"""Training linen LoRA layers: gradients under transformations, TrainState, checkpoints."""

import os
import pathlib
import subprocess
import sys

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from flax.training.train_state import TrainState

import oplora_jax
from oplora_jax import OuterProduct, is_low_rank, to_dense
from oplora_jax.linen import LoRADense
from tests.arrays import normal, normal_like

X, Y = normal(0, 8, 4), normal(1, 8, 3)


class MLP(nn.Module):
    """Two LoRA layers."""

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(LoRADense(6, rank=2, alpha=4.0)(x))
        return LoRADense(3, rank=2, use_bias=False)(x)


class Deep(nn.Module):
    """A scan over rematerialised LoRA layers."""

    @nn.compact
    def __call__(self, x):
        class Block(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return nn.tanh(LoRADense(4, rank=2)(x)), None

        scanned = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return scanned()(x, None)[0]


def random_lora(params):
    """Factors that are all at work: b is zero at the start."""
    rng = np.random.default_rng(2)
    fill = lambda p: normal_like(rng, p) if is_low_rank(p) else p
    return jax.tree.map(fill, params, is_leaf=is_low_rank)


@pytest.mark.parametrize("kind", ["outer", "dense"])
def test_gradients_under_scan_and_remat(kind, x64):
    """float64: those of an unrolled model with merged weights."""
    x = jnp.asarray(X, jnp.float64)
    params = random_lora(Deep().init(jax.random.key(0), x)["params"])
    params = jax.tree.map(lambda z: z.astype(jnp.float64), params)
    loss = lambda p: jnp.sum(Deep().apply({"params": p}, x) ** 2)
    gradient = jax.jit(oplora_jax.grad(loss, kind))(params)
    [(path, lora)] = [z for z in jax.tree.leaves_with_path(params, is_leaf=is_low_rank) if is_low_rank(z[1])]
    [block] = [z for z in params.values()]
    block = block["LoRADense_0"]

    def unrolled(dense):
        h = x
        for i in range(3):
            h = jnp.tanh(h @ (block["kernel"][i] + dense[i]) + block["bias"][i][None])
        return jnp.sum(h**2)

    [got] = [
        g
        for p, g in jax.tree.leaves_with_path(gradient, is_leaf=lambda z: isinstance(z, OuterProduct))
        if p == path
    ]
    assert got.shape == (3, 4, 4)
    chex.assert_trees_all_close(to_dense(got), jax.grad(unrolled)(to_dense(lora)), rtol=1e-9, atol=1e-9)


def freeze_all_but_lora(tx, params):
    labels = jax.tree.map(lambda p: "lora" if is_low_rank(p) else "frozen", params, is_leaf=is_low_rank)
    return optax.partition({"lora": tx, "frozen": optax.set_to_zero()}, labels)


@pytest.mark.parametrize("gradient", ["outer", "dense", "factors"])
def test_train_state(gradient):
    """TrainState.apply_gradients with each kind of gradient; the base stays as it is."""
    params = MLP().init(jax.random.key(0), X)["params"]
    tx = freeze_all_but_lora(oplora_jax.oplora(0.3), params)
    state = TrainState.create(apply_fn=MLP().apply, params=params, tx=tx)

    @jax.jit
    def step(state):
        loss_fn = lambda p: jnp.mean((state.apply_fn({"params": p}, X) - Y) ** 2)
        grad_fn = (
            jax.value_and_grad(loss_fn)
            if gradient == "factors"
            else oplora_jax.value_and_grad(loss_fn, gradient)
        )
        loss, gradients = grad_fn(state.params)
        return state.apply_gradients(grads=gradients), loss

    losses = []
    for _ in range(60):
        state, loss = step(state)
        losses.append(float(loss))
    assert losses[-1] < 0.6 * losses[0]
    for name in params:
        chex.assert_trees_all_equal(state.params[name]["kernel"], params[name]["kernel"])
        assert (state.params[name]["lora"].b != 0).any()


def test_flax_serialization_keeps_a_train_state():
    params = random_lora(MLP().init(jax.random.key(0), X)["params"])
    tx = oplora_jax.oplora(0.1)
    state = TrainState.create(apply_fn=MLP().apply, params=params, tx=tx)
    other = TrainState.create(apply_fn=MLP().apply, params=jax.tree.map(jnp.zeros_like, params), tx=tx)
    restored = serialization.from_bytes(other, serialization.to_bytes(state))
    chex.assert_trees_all_equal(restored.params, state.params)
    chex.assert_trees_all_equal(restored.opt_state, state.opt_state)


def test_serialization_of_nodes_in_containers():
    """By to_state_dict and from_state_dict, bytes and msgpack; the scale and the roles are the target's."""
    lora = oplora_jax.LowRank(normal(0, 2, 4, 1), normal(1, 2, 1, 3), 2.0, "oi")
    tree = {"layer": {"lora": lora, "kernel": normal(2, 3, 4)}, "list": [lora], "masked": optax.MaskedNode()}
    target = jax.tree.map(jnp.zeros_like, tree)
    state = serialization.to_state_dict(tree)
    assert set(state["layer"]["lora"]) == set(state["list"]["0"]) == {"a", "b"}
    packed = serialization.msgpack_restore(serialization.msgpack_serialize(state))
    for restored in (
        serialization.from_state_dict(target, state),
        serialization.from_state_dict(target, packed),
        serialization.from_bytes(target, serialization.to_bytes(tree)),
    ):
        chex.assert_trees_all_equal(restored, tree)
    with pytest.raises(ValueError, match=r"layer/lora: the state of a LowRank has a; expected .* a and b"):
        serialization.from_state_dict({"layer": {"lora": lora}}, {"layer": {"lora": {"a": lora.a}}})


PROGRAMS = {
    "oplora_jax first": """
        import oplora_jax
        from flax import serialization
    """,
    "flax first": """
        from flax import serialization
        import oplora_jax
    """,
    "oplora_jax.nnx": """
        import oplora_jax.nnx
        from flax import serialization
    """,
}
ROUND_TRIP = """
import jax.numpy as jnp
lora = oplora_jax.LowRank(jnp.ones((3, 1)), jnp.ones((1, 2)))
state = serialization.to_bytes({"lora": lora})
restored = serialization.from_bytes({"lora": lora.with_factors(0 * lora.a, 0 * lora.b)}, state)
assert restored["lora"].b.all() and isinstance(restored["lora"], oplora_jax.LowRank)
"""
WITHOUT_FLAX = """
import sys
sys.modules["flax"] = None
import oplora_jax
assert not [name for name in sys.modules if name.startswith("flax.")]
try:
    import oplora_jax.linen
except ImportError as error:
    assert "flax" in str(error)
"""


@pytest.mark.parametrize("name", [*PROGRAMS, "without flax"])
def test_whichever_module_is_imported(name):
    program = "".join(line.strip() + "\n" for line in PROGRAMS.get(name, "").splitlines()) + ROUND_TRIP
    program = WITHOUT_FLAX if name == "without flax" else program
    root = pathlib.Path(oplora_jax.__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, env=environment)
