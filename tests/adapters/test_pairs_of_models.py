"""pair_factors on whole models: Qwix's, in linen and NNX, and those of flax.nnx.LoRALinear."""

import dataclasses

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

from oplora_jax import from_low_rank, merge, oplora, pair_factors, to_dense, to_low_rank
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


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(8, name="dense")(nn.tanh(x)), None


class Scanned(nn.Module):
    """Three layers, stacked along an axis of their parameters."""

    axis: int

    @nn.compact
    def __call__(self, x):
        options = {"variable_axes": {"params": self.axis}, "split_rngs": {"params": True}, "length": 3}
        return nn.scan(Residual, **options)(name="layers")(x, None)[0]


@quiet_qwix
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_qwix_and_layers_stacked_along_an_axis(axis):
    model = qwix.apply_lora_to_model(Scanned(axis), qwix.LoraProvider(module_path=".*dense", **QWIX))
    params = jax.jit(model.init)(jax.random.key(0), X)["params"]
    if axis:
        with pytest.raises(ValueError, match=r"layers/dense/kernel_lora_a .* stack_axis="):
            to_low_rank(params, scale=3.0)
    layout = {"scale": 3.0, "stack_axis": axis}
    lora = randomised(to_low_rank(params, **layout))
    assert {name: p.shape for name, p in lora.items()} == {"layers/dense/kernel": (3, 8, 8)}
    dense = params["layers"]["dense"]
    kernel = dense["kernel"] + jnp.moveaxis(to_dense(lora["layers/dense/kernel"]), 0, axis)
    merged = {"layers": {"dense": {"kernel": kernel, "bias": dense["bias"]}}}
    y = jax.jit(model.apply)({"params": from_low_rank(lora, params, **layout)}, X)
    expected = jax.jit(Scanned(axis).apply)({"params": merged}, X)
    chex.assert_trees_all_close(y, expected, rtol=1e-4, atol=1e-4)  # float32 through three layers


# gemma's layers: the einsum, the kernel's shape, and the axes of both factors. Those of a are all that the
# inputs have too, also those that the outputs keep, those of b the others.
GEMMA = {
    "q_einsum": ("BTD,NDH->BTNH", (2, 6, 4), "Dr,rNH"),
    "kv_einsum": ("BSD,CKDH->CBSKH", (2, 3, 6, 4), "Dr,rCKH"),
    "qkv_einsum": ("BTD,SNDH->SBTNH", (3, 2, 6, 4), "Dr,rSNH"),
    "attn_vec_einsum": ("BTNH,NHD->BTD", (2, 4, 6), "NHr,rD"),
    "gating_einsum": ("...F,NHF->...NH", (2, 8, 6), "Fr,rNH"),
    "transposed_gating_einsum": ("...F,NFH->...NH", (2, 6, 8), "Fr,rNH"),
    "linear": ("...H,HF->...F", (8, 6), "Hr,rF"),
    "experts_gating": ("gecd,ekfd->kgecf", (4, 2, 5, 6), "edr,rkf"),
    "experts_linear": ("gecf,efd->gecd", (4, 5, 6), "efr,rd"),
}


class Factors(nn.Module):
    factors: str
    sizes: dict[str, int]

    @nn.compact
    def __call__(self, equation, x):
        axes = dict(zip("ab", self.factors.split(","), strict=True))
        make = lambda name: [self.sizes[c] for c in axes[name]]
        a, b = (self.param(name, nn.initializers.normal(1.0), make(name)) for name in "ab")
        inputs, outputs = equation.split(",")[0], equation.split("->")[1]
        return jnp.einsum(f"{inputs},{self.factors}->{outputs}", x, a, b)


class Gemma(nn.Module):
    """One of gemma's layers with LoRA, of rank 3."""

    layer: str

    @nn.compact
    def __call__(self, x):
        equation, shape, factors = GEMMA[self.layer]
        w = self.param("w", nn.initializers.normal(1.0), shape)
        sizes = dict(zip(equation.split(",")[1].split("->")[0], shape, strict=True)) | {"r": 3}
        return jnp.einsum(equation, x, w) + Factors(factors, sizes, name="lora")(equation, x)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("layer", GEMMA)
def test_gemma(layer):
    """The layer's outputs are those of its kernel with the pair's increment added."""
    equation, shape, _ = GEMMA[layer]
    kernel = equation.split(",")[1].split("->")[0]
    sizes = dict(zip(kernel, shape, strict=True))
    x = normal(0, *(sizes.get(c, 2) for c in equation.split(",")[0].replace("...", "BT")), dtype=jnp.float64)
    params = Gemma(layer).init(jax.random.key(0), x)["params"]
    [(name, param)] = to_low_rank({layer: params}).items()
    assert name == layer and param.scale == 1
    # Of the experts every one is a part of the inputs: b is the same for all.
    roles = "".join("i" if c in equation.split(",")[0] else "o" for c in kernel)
    merged = merge({"w": params["w"]}, {"w": dataclasses.replace(param, roles=roles)})["w"]
    # float64: sums of up to 20 products of three numbers of size 1
    chex.assert_trees_all_close(
        Gemma(layer).apply({"params": params}, x), jnp.einsum(equation, x, merged), rtol=1e-10, atol=1e-10
    )


def test_training_of_gemma():
    """Its tree as it is, with everything but the factors left alone."""
    model = Gemma("q_einsum")
    x, y = normal(0, 4, 5, 6), normal(1, 4, 5, 2, 4)
    params = {"layer_0": {"attn": {"q_einsum": model.init(jax.random.key(0), x)["params"]}}}
    tx = pair_factors(oplora(0.1, others=optax.set_to_zero()))
    loss_fn = lambda p: jnp.mean((model.apply({"params": p["layer_0"]["attn"]["q_einsum"]}, x) - y) ** 2)
    state, losses, before = tx.init(params), [], params
    assert set(optax.tree.get(state, "momentum")["paired"]) == {"layer_0/attn/q_einsum"}
    step = jax.jit(lambda p, s: (loss_fn(p), *tx.update(jax.grad(loss_fn)(p), s, p)))
    for _ in range(30):
        loss, updates, state = step(params, state)
        params = optax.apply_updates(params, updates)
        losses.append(loss)
    assert losses[-1] < 0.8 * losses[0]
    w = lambda p: p["layer_0"]["attn"]["q_einsum"]["w"]
    np.testing.assert_array_equal(w(params), w(before))


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
