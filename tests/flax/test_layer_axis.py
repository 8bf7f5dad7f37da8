"""Linen layers under `nn.scan` whose parameters are stacked along another axis than the first."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import oplora_jax
from oplora_jax.linen import LoRADense, add_lora, loraize, merge
from tests.arrays import normal, normal_like

TOKENS, SIZE, LAYERS, RANK = 5, 6, 3, 2


@pytest.fixture(autouse=True)
def _double(x64):
    """Two ways to compute the same are compared: in float64 only a wrong formula makes them differ."""


class Heads(nn.Module):
    """To several axes of outputs, and back."""

    @nn.compact
    def __call__(self, x):
        return nn.DenseGeneral(SIZE, axis=(-2, -1), name="out")(nn.DenseGeneral((2, 4), name="in")(x))


LAYER = {
    "Dense": lambda: nn.Dense(SIZE, name="d"),
    "DenseGeneral": lambda: Heads(name="d"),
    "Einsum": lambda: nn.Einsum((2, SIZE, 3), "tn,hnd->thd", use_bias=False, name="d"),
    "Conv": lambda: nn.Conv(SIZE, (3,), name="d"),
}


class Block(nn.Module):
    kind: str

    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(LAYER[self.kind]()(x).reshape(x.shape)), None


class Model(nn.Module):
    kind: str
    axis: int
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block) if self.remat else Block
        split = {"variable_axes": {"params": self.axis}, "split_rngs": {"params": True}, "length": LAYERS}
        return nn.scan(block, **split)(self.kind, name="blocks")(x, None)[0]


def setup(kind, axis, remat=False):
    x, plain = normal(0, TOKENS, SIZE), Model(kind, axis, remat)
    pretrained = jax.tree.map(jnp.float64, plain.init(jax.random.key(0), x)["params"])
    model = loraize(plain, rank=RANK, targets="d", alpha=3.0)
    params = add_lora(model, jax.random.key(1), pretrained, x)
    params = jax.tree.map(jnp.float64, params)
    return x, plain, pretrained, model, jax.tree.map(jnp.add, params, normal_like(2, params, 0.3))


def in_kernels(gradient, params):
    """Exact gradients of LoRA parameters, laid out as the kernels are: merged into zeros."""

    def layer(gradient, params):
        if "kernel" not in params:
            return {name: layer(gradient[name], params[name]) for name in params}
        exact = oplora_jax.to_dense(gradient["lora"])
        eye = jnp.broadcast_to(jnp.eye(exact.shape[-1]), (*exact.shape[:-2], *[exact.shape[-1]] * 2))
        lora = oplora_jax.LowRank(exact, eye, roles=params["lora"].roles)
        return {**gradient, "kernel": jnp.zeros_like(params["kernel"]), "lora": lora}

    return merge(layer(gradient, params))


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize(
    "kind, axis",
    [(kind, axis) for kind in LAYER for axis in (0, 1)] + [("Einsum", 2)],  # a bias has no third
)
def test_merged_and_exact_gradients(kind, axis, remat):
    """The merged model computes the same, and its kernels' gradients are those of the whole weights."""
    x, plain, pretrained, model, params = setup(kind, axis, remat)
    merged = merge(params)
    chex.assert_trees_all_equal_shapes(merged, pretrained)
    got, want = model.apply({"params": params}, x), plain.apply({"params": merged}, x)
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)  # float64
    loss = lambda model: lambda p: jnp.sum(jnp.sin(model.apply({"params": p}, x)))
    expected = jax.grad(loss(plain))(merged)
    for kind_of_gradient in ("dense", "auto"):
        gradient = oplora_jax.grad(loss(model), kind_of_gradient)(params)
        chex.assert_trees_all_close(in_kernels(gradient, params), expected, rtol=1e-10, atol=1e-10)  # float64


@pytest.mark.parametrize("name", ["oplora", "lora_rite", "mofasgd", "svdlora"])
def test_training(name):
    x, _, _, model, params = setup("Einsum", 1)
    tx = oplora_jax.svdlora(optax.sgd(0.02)) if name == "svdlora" else getattr(oplora_jax, name)(0.02)
    loss = lambda p: jnp.mean((model.apply({"params": p}, x) - 0.3) ** 2)
    step = jax.jit(lambda p, state: tx.update(oplora_jax.grad(loss)(p), state, p))
    state, before = tx.init(params), loss(params)
    for _ in range(5):
        updates, state = step(params, state)
        params = optax.apply_updates(params, updates)
    assert loss(params) < before


@pytest.mark.parametrize("axis", [0, 1])
def test_init_alone(axis):
    """Without pretrained parameters."""
    x, model = normal(0, TOKENS, SIZE), loraize(Model("Dense", axis), rank=RANK, targets="d")
    params = model.init(jax.random.key(0), x)["params"]
    assert params["blocks"]["d"]["lora"].shape == (*[1] * axis, LAYERS, SIZE, SIZE)
    loss = lambda p: jnp.sum(model.apply({"params": p}, x) ** 2)
    tx = oplora_jax.oplora(0.1)
    updates, _ = tx.update(oplora_jax.grad(loss)(params), tx.init(params), params)
    assert loss(optax.apply_updates(params, updates)) < loss(params)


def test_an_axis_counted_from_the_end_is_refused():
    """It is another one in the kernel and in the factors."""
    x, plain = normal(0, TOKENS, SIZE), Model("Einsum", -1)
    model = loraize(plain, rank=RANK, targets="d")
    params = add_lora(model, jax.random.key(1), plain.init(jax.random.key(0), x)["params"], x)
    with pytest.raises(ValueError, match=r"'blocks/d'.*LoRA parameter"):
        model.apply({"params": params}, x)


def test_layers_of_this_library():
    """That are in a block of the user's own: add_lora brings their parameters into order."""

    class Own(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.tanh(LoRADense(SIZE, rank=RANK, name="d")(x)), None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            split = {"variable_axes": {"params": 1}, "split_rngs": {"params": True}, "length": LAYERS}
            return nn.scan(Own, **split)(name="blocks")(x, None)[0]

    x, model = normal(0, TOKENS, SIZE), Stack()
    pretrained = merge(add_lora(model, jax.random.key(0), {}, x))
    params = add_lora(model, jax.random.key(1), pretrained, x)
    assert params["blocks"]["d"]["lora"].a.shape == (1, LAYERS, SIZE, RANK)
    gradient = oplora_jax.grad(lambda p: jnp.sum(model.apply({"params": p}, x)), "outer")(params)
    assert gradient["blocks"]["d"]["lora"].shape == (1, LAYERS, SIZE, SIZE)
    untouched = model.init(jax.random.key(0), x)["params"]
    with pytest.raises(ValueError, match=r"\['blocks'\]\['d'\]\['lora'\].*do not fit.*add_lora"):
        oplora_jax.oplora(0.1).init(untouched)
