"""pair_factors on whole models: Qwix's, in linen and NNX, and those of flax.nnx.LoRALinear."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import qwix
from flax import nnx
from flax.training.train_state import TrainState

from oplora_jax import from_low_rank, oplora, pair_factors, to_dense, to_low_rank
from tests.arrays import normal, normal_like

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Qwix 0.1.8 asks Flax for names that Flax 0.12 has renamed.
quiet_qwix = pytest.mark.filterwarnings(r"ignore::DeprecationWarning:qwix\._src")

X, Y = normal(0, 4, 5, 8), normal(1, 4, 5, 3)
QWIX = {"rank": 2, "alpha": 6.0}  # a scale of 3


class Linen(nn.Module):
    """Attention whose kernels keep the axis of the heads, a convolution and a dense layer."""

    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8, name="attention")(x)
        x = nn.tanh(nn.Conv(8, (3,), name="conv")(x))
        return nn.Dense(3, name="head")(x)


def randomised(lora):
    """Factors that are all at work: b is zero at the start."""
    return normal_like(2, lora, 0.3)


@quiet_qwix
def test_qwix_linen():
    model = qwix.apply_lora_to_model(Linen(), qwix.LoraProvider(module_path=".*", **QWIX))
    params = jax.jit(model.init)(jax.random.key(0), X)["params"]
    lora = randomised(to_low_rank(params, scale=3.0))
    assert set(lora) == {
        *(f"attention/{layer}/kernel" for layer in ("query", "key", "value", "out")),
        "conv/kernel",
        "head/kernel",
    }
    # Qwix's forward pass is that of the model with s a b added to its kernels.
    base = jax.jit(Linen().init)(jax.random.key(0), X)["params"]
    merged = jax.tree.map_with_path(
        lambda path, kernel: (
            kernel + to_dense(lora[name]).reshape(kernel.shape)
            if (name := jax.tree_util.keystr(path, simple=True, separator="/")) in lora
            else kernel
        ),
        base,
    )
    y = jax.jit(model.apply)({"params": from_low_rank(lora, params, scale=3.0)}, X)
    expected = jax.jit(Linen().apply)({"params": merged}, X)
    chex.assert_trees_all_close(y, expected, rtol=1e-4, atol=1e-4)  # float32 through three layers

    labels = jax.tree.map_with_path(
        lambda path, _: "lora" if "_lora_" in jax.tree_util.keystr(path) else "frozen", params
    )
    tx = optax.partition(
        {"lora": pair_factors(oplora(0.1), scale=3.0), "frozen": optax.set_to_zero()}, labels
    )
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    @jax.jit
    def train(state):
        def step(state, _):
            loss_fn = lambda p: jnp.mean((state.apply_fn({"params": p}, X) - Y) ** 2)
            loss, gradients = jax.value_and_grad(loss_fn)(state.params)
            return state.apply_gradients(grads=gradients), loss

        return jax.lax.scan(step, state, length=30)

    state, losses = train(state)
    assert losses[-1] < 0.8 * losses[0]
    for (path, before), after in zip(
        jax.tree.leaves_with_path(params), jax.tree.leaves(state.params), strict=True
    ):
        assert np.any(before != after) == ("_lora_" in jax.tree_util.keystr(path))


class NNX(nnx.Module):
    """Attention, an einsum that keeps the axes of its heads, and one that contracts them."""

    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, 8, 8, decode=False, rngs=rngs)
        self.heads = nnx.Einsum("btd,ndh->btnh", (2, 8, 4), rngs=rngs)
        self.out = nnx.Einsum("btnh,nhd->btd", (2, 4, 3), rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.tanh(self.heads(x + self.attention(x))))


@quiet_qwix
def test_qwix_nnx():
    provider = qwix.LoraProvider(module_path=".*", **QWIX)
    model = qwix.apply_lora_to_model(NNX(nnx.Rngs(0)), provider, X[:1, :1], rngs=nnx.Rngs(1))
    state = nnx.state(model, nnx.LoRAParam)
    lora = randomised(to_low_rank(state, scale=3.0))
    shapes = {name: (p.a.shape, p.b.shape) for name, p in lora.items()}
    assert shapes["heads/kernel"] == ((8, 2), (2, 8)) and shapes["out/kernel"] == ((8, 2), (2, 3))
    assert state["heads"]["kernel_lora_b"].shape == (2, 2, 4)
    nnx.update(model, from_low_rank(lora, state, scale=3.0))
    merged = NNX(nnx.Rngs(0))
    for layer in ("query", "key", "value", "out"):
        kernel = getattr(merged.attention, layer).kernel
        kernel[...] += to_dense(lora[f"attention/{layer}/kernel"]).reshape(kernel.shape)
    # (d, n h) to the einsum's own order of axes, (n, d, h)
    merged.heads.kernel[...] += to_dense(lora["heads/kernel"]).reshape(8, 2, 4).transpose(1, 0, 2)
    merged.out.kernel[...] += to_dense(lora["out/kernel"]).reshape(2, 4, 3)
    forward = nnx.jit(lambda model: model(X))
    # float32 through three layers
    chex.assert_trees_all_close(forward(model), forward(merged), rtol=1e-4, atol=1e-4)

    nnx.update(model, state)
    check_nnx_training(model, pair_factors(oplora(0.1, momentum=0), scale=3.0), X)


class Layers(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.LoRALinear(8, 8, lora_rank=2, rngs=rngs) for _ in range(2)])
        self.head = nnx.LoRALinear(8, 3, lora_rank=2, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = nnx.tanh(layer(x))
        return self.head(x)


def test_flax_nnx_lora():
    model = Layers(nnx.Rngs(0))
    lora = to_low_rank(nnx.state(model, nnx.LoRAParam))
    assert set(lora) == {"layers/0/lora", "layers/1/lora", "head/lora"}
    # At init NNX shows variables, at update arrays; the dict is what another caller may pass.
    assert set(to_low_rank(nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam)))) == set(lora)
    check_nnx_training(model, pair_factors(oplora(0.3)), X)


def check_nnx_training(model, tx, x):
    """The loss falls, and nothing but LoRA parameters changes."""
    before = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model, optimizer):
        loss_fn = lambda model: jnp.mean((model(x) - Y) ** 2)
        loss, gradients = nnx.value_and_grad(loss_fn, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        optimizer.update(model, gradients)
        return loss

    losses = [step(model, optimizer) for _ in range(30)]
    assert losses[-1] < 0.8 * losses[0]
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    for (path, old), new in zip(jax.tree.leaves_with_path(before), jax.tree.leaves(after), strict=True):
        assert np.any(old != new) == ("lora" in jax.tree_util.keystr(path))
