"""ResLoRA layers of both Flax libraries: against the plain functions, merged, and trained for a step."""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import oplora_jax
import oplora_jax.linen as ll
import oplora_jax.nnx as ln
from oplora_jax import LowRank, OuterProduct, to_dense
from oplora_jax.reslora import block_shortcut, input_shortcut

SIZE, DEPTH, SHORTCUTS = 5, 4, 3  # the last layer leaves out the first one's increment


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape) / 2


# Of NumPy: JAX makes them float64 where the test says so.
X, Y = normal(0, 7, SIZE), normal(1, 7, SIZE)


class Linen(nn.Module):
    """A stack, with the layers in setup."""

    lora: bool = True
    dtype: object = None

    def setup(self):
        layers = []
        for index in range(DEPTH):
            options = {"dtype": self.dtype, "param_dtype": float}
            if not self.lora:
                layer = nn.Dense(SIZE, **options)
            elif index == 0:
                layer = ll.LoRADense(SIZE, rank=2, alpha=3, **options)
            else:
                previous = layers[max(0, index - SHORTCUTS + 1) :]
                layer = ll.BlockShortcutDense(SIZE, rank=2, previous=previous, alpha=3, **options)
            layers.append(layer)
        self.layers = layers

    def __call__(self, x):
        for layer in self.layers:
            x = nn.tanh(layer(x))
        return x


class Nnx(nnx.Module):
    def __init__(self, rngs, dtype=None):
        options = {"alpha": 3, "dtype": dtype, "param_dtype": float, "rngs": rngs}
        layers = [ln.LoRALinear(SIZE, SIZE, 2, **options)]
        for index in range(1, DEPTH):
            previous = layers[max(0, index - SHORTCUTS + 1) :]
            layers.append(ln.BlockShortcutLinear(SIZE, SIZE, 2, previous=previous, **options))
        self.layers = nnx.List(layers)

    def __call__(self, x):
        for layer in self.layers:
            x = nnx.tanh(layer(x))
        return x


def randomized(tree):
    """A tree with no zeros, so that the right factors and the biases matter."""
    leaves, structure = jax.tree.flatten(tree)
    return structure.unflatten(
        [jnp.asarray(normal(2 + i, *leaf.shape), leaf.dtype) for i, leaf in enumerate(leaves)]
    )


def linen_model(**options):
    model = Linen(**options)
    return model, randomized(model.init(jax.random.key(0), X)["params"])


def nnx_model(**options):
    model = Nnx(nnx.Rngs(0), **options)
    for index, layer in enumerate(model.layers):
        params = types.SimpleNamespace(**linen_layer(linen_model(**options)[1], index))
        layer.kernel.set_value(params.kernel)
        layer.bias.set_value(params.bias)
        (layer.block_lora if index else layer.lora).set_value(params.lora)
    return model


def linen_layer(params, index):
    layer = params[f"layers_{index}"]
    return {
        "kernel": layer["kernel"],
        "bias": layer["bias"],
        "lora": layer.get("lora", layer.get("block_lora")),
    }


def by_functions(params, x):
    layers = [types.SimpleNamespace(**linen_layer(params, index)) for index in range(DEPTH)]
    x = jnp.asarray(x)
    for index, layer in enumerate(layers):
        loras = [z.lora for z in layers[max(0, index - SHORTCUTS + 1) : index + 1]]
        x = jnp.tanh(block_shortcut(x, layer.kernel, loras) + layer.bias[None])
    return x


def test_block_linen_like_the_functions_and_merged(x64):
    model, params = linen_model()
    y = model.apply({"params": params}, X)
    np.testing.assert_allclose(y, by_functions(params, X), rtol=0, atol=1e-13)  # float64
    shape = jax.ShapeDtypeStruct(X.shape, X.dtype)
    merged = ll.merge_shortcuts(model, params, shape)
    plain = Linen(lora=False)
    assert jax.tree.structure(merged) == jax.tree.structure(plain.init(jax.random.key(0), X)["params"])
    np.testing.assert_allclose(plain.apply({"params": merged}, X), y, rtol=0, atol=1e-13)
    np.testing.assert_array_equal(merged["layers_1"]["bias"], params["layers_1"]["bias"])
    with pytest.raises(
        ValueError, match=r"layers_1/block_lora: other layers' .* use oplora_jax.linen.merge_shortcuts"
    ):
        ll.merge(params)


def test_block_nnx_like_the_functions_and_merged(x64):
    model = nnx_model()
    y = model(X)
    np.testing.assert_allclose(y, by_functions(linen_model()[1], X), rtol=0, atol=1e-13)  # float64
    plain = ln.merge(model)
    assert [type(layer) for layer in plain.layers] == [nnx.Linear] * DEPTH
    assert not hasattr(plain.layers[1], "previous") and not jax.tree.leaves(nnx.state(plain, nnx.LoRAParam))
    np.testing.assert_allclose(plain(X), y, rtol=0, atol=1e-13)
    np.testing.assert_array_equal(model(X), y)  # as it was
    assert len(nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))) == DEPTH  # shared, not copied


def loss_of(prediction):
    return jnp.mean((prediction - Y) ** 2)


def exact_gradients(params):
    """By autodiff of the increments as dense matrices."""

    def loss(increments):
        x = X
        for index in range(DEPTH):
            layer = linen_layer(params, index)
            weight = layer["kernel"] + sum(increments[max(0, index - SHORTCUTS + 1) : index + 1])
            x = jnp.tanh(x @ weight + layer["bias"][None])
        return loss_of(x)

    return jax.grad(loss)([to_dense(linen_layer(params, index)["lora"]) for index in range(DEPTH)])


def test_block_linen_trains(x64):
    model, params = linen_model()
    label = lambda p: "train" if oplora_jax.is_low_rank(p) else "frozen"
    labels = jax.tree.map(label, params, is_leaf=oplora_jax.is_low_rank)
    tx = optax.partition({"train": oplora_jax.oplora(0.05), "frozen": optax.set_to_zero()}, labels)
    loss_fn = lambda params: loss_of(model.apply({"params": params}, X))

    @jax.jit
    def step(params, state):
        loss, gradients = oplora_jax.value_and_grad(loss_fn)(params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), gradients, loss

    after, gradients, loss = step(params, tx.init(params))
    for index, expected in enumerate(exact_gradients(params)):
        actual = to_dense(linen_layer(gradients, index)["lora"])
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-13)  # float64
    assert loss_fn(after) < loss
    shape = jax.ShapeDtypeStruct(X.shape, X.dtype)
    merged = Linen(lora=False).apply({"params": ll.merge_shortcuts(model, after, shape)}, X)
    np.testing.assert_allclose(loss_of(merged), loss_fn(after), rtol=0, atol=1e-13)


def test_block_nnx_trains(x64):
    model = nnx_model()
    optimizer = nnx.Optimizer(model, oplora_jax.oplora(0.05), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model, optimizer):
        loss, gradients = ln.value_and_grad(lambda model: loss_of(model(X)))(model)
        optimizer.update(model, gradients)
        return loss, gradients

    loss, gradients = step(model, optimizer)
    for index, expected in enumerate(exact_gradients(linen_model()[1])):
        actual = to_dense(gradients["layers"][index]["block_lora" if index else "lora"].get_value())
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-13)  # float64
    assert loss_of(model(X)) < loss
    np.testing.assert_allclose(ln.merge(model)(X), model(X), rtol=0, atol=1e-13)


def test_types():
    x = jnp.asarray(X, jnp.float32)
    for y in (
        Linen(dtype=jnp.bfloat16).apply({"params": linen_model(dtype=jnp.bfloat16)[1]}, x),
        nnx_model(dtype=jnp.bfloat16)(x),
    ):
        assert y.dtype == jnp.bfloat16
        # bfloat16 has 8 bits; four layers whose sums are near 2
        np.testing.assert_allclose(y.astype(jnp.float32), by_functions(linen_model()[1], x), rtol=0, atol=0.1)


class InputsLinen(nn.Module):
    @nn.compact
    def __call__(self, x):
        z = nn.tanh(ll.LoRADense(SIZE, rank=2)(x))
        return ll.InputShortcutDense(3, rank=2, alpha=3)(z, x)


class InputsNnx(nnx.Module):
    def __init__(self, rngs):
        self.first = ln.LoRALinear(SIZE, SIZE, 2, rngs=rngs)
        self.second = ln.InputShortcutLinear(SIZE, 3, 2, alpha=3, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.tanh(self.first(x)), x)


def test_input_shortcut_linen():
    model = InputsLinen()
    params = randomized(model.init(jax.random.key(0), X)["params"])
    first, second = params["LoRADense_0"], params["InputShortcutDense_0"]
    z = jnp.tanh(oplora_jax.lora_dot(jnp.asarray(X), first["kernel"], first["lora"]) + first["bias"][None])
    expected = (
        input_shortcut(z, jnp.asarray(X), second["kernel"], second["input_lora"]) + second["bias"][None]
    )
    loss_fn = lambda params: jnp.sum(model.apply({"params": params}, X) ** 2)
    np.testing.assert_allclose(model.apply({"params": params}, X), expected, rtol=0, atol=1e-5)  # float32
    loss, gradients = oplora_jax.value_and_grad(loss_fn, "outer")(params)
    gradient = gradients["InputShortcutDense_0"]["input_lora"]
    assert isinstance(gradient, OuterProduct)
    np.testing.assert_allclose(gradient.x, z + X, rtol=0, atol=1e-5)
    updates = jax.tree.map(lambda g: -1e-3 * g, jax.grad(loss_fn)(params))
    assert loss_fn(optax.apply_updates(params, updates)) < loss
    for merge in (ll.merge, lambda params: ll.merge_shortcuts(model, params, X)):
        with pytest.raises(ValueError, match=r"InputShortcutDense_0/input_lora: .* has no merged form"):
            merge(params)


def test_input_shortcut_nnx():
    model = InputsNnx(nnx.Rngs(0))
    for variable in (model.first.lora, model.second.input_lora):
        variable.set_value(randomized(variable.get_value()))
    z = jnp.tanh(model.first(X))
    second = model.second
    expected = input_shortcut(z, jnp.asarray(X), second.kernel[...], second.input_lora.get_value())
    np.testing.assert_allclose(model(X), expected, rtol=0, atol=1e-5)  # float32
    loss_fn = lambda model: jnp.sum(model(X) ** 2)
    loss, gradients = ln.value_and_grad(loss_fn, "outer")(model)
    gradient = gradients["second"]["input_lora"].get_value()
    np.testing.assert_allclose(gradient.x, z + X, rtol=0, atol=1e-5)
    nnx.Optimizer(model, oplora_jax.oplora(1e-3), wrt=nnx.LoRAParam).update(model, gradients)
    assert loss_fn(model) < loss
    with pytest.raises(ValueError, match="'second': an input shortcut has no merged form"):
        ln.merge(model)


def test_add_lora_to_pretrained_parameters():
    plain, model = Linen(lora=False), Linen()
    pretrained = plain.init(jax.random.key(0), X)["params"]
    params = ll.add_lora(model, jax.random.key(1), pretrained, X)
    y = plain.apply({"params": pretrained}, X)
    np.testing.assert_array_equal(model.apply({"params": params}, X), y)  # the increments start at zero
    assert isinstance(params["layers_1"]["block_lora"], LowRank)


def test_bad_input(unchecked):
    wide = ll.LoRADense(6, rank=2)
    shapes = r"loras\[0\] has shape \(5, 6\), the kernel \(5, 5\)"

    class Wide(nn.Module):
        @nn.compact
        def __call__(self, x):
            first = ll.LoRADense(6, rank=2)
            first(x)
            return ll.BlockShortcutDense(SIZE, rank=2, previous=[first])(x)

    with pytest.raises(ValueError, match=shapes):
        Wide().init(jax.random.key(0), X)
    with pytest.raises(ValueError, match="has no LoRA parameter yet"):
        ll.BlockShortcutDense(SIZE, rank=2, previous=[wide]).init(jax.random.key(0), X)
    rngs = nnx.Rngs(0)
    with pytest.raises(ValueError, match=shapes):
        ln.BlockShortcutLinear(SIZE, SIZE, 2, previous=[ln.LoRALinear(SIZE, 6, 2, rngs=rngs)], rngs=rngs)
    layer = ln.InputShortcutLinear(SIZE, SIZE, 2, rngs=rngs)
    with pytest.raises(ValueError, match=r"x has shape \(7, 5\), previous_x \(3, 5\)"):
        layer(X, X[:3])
    with pytest.raises(ValueError, match=r"x has shape \(7, 5\), previous_x \(3, 5\)"):
        ll.InputShortcutDense(SIZE, rank=2).init(jax.random.key(0), X, X[:3])


def test_no_restart():
    """An increment with a shortcut is not its own kernel's alone, and neither library forgets that."""
    key = jax.random.key(0)
    linen_params = [model.init(key, X)["params"] for model in (Linen(), InputsLinen())]
    nnx_states = [nnx.state(model(nnx.Rngs(0))) for model in (Nnx, InputsNnx)]
    for params in (*linen_params, *nnx_states):
        with pytest.raises(ValueError, match=r"(block|input)_lora: expected the name 'lora'"):
            oplora_jax.merge_and_restart_layers(key, params)
