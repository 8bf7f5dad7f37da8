"""Equinox: modules with LowRank fields, filters of every style, and LoRA on existing models."""

import dataclasses
import io

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import oplora_jax
from oplora_jax import LowRank, init_lora, is_low_rank, lora_dot, merge, to_dense
from oplora_jax.equinox import value_and_grad
from tests.arrays import f64, normal

pytestmark = pytest.mark.usefixtures("quick_compilation")

X, Y = normal(0, 6, 4, dtype=jnp.float32), normal(1, 6, 3, dtype=jnp.float32)
# Sums of 6 products of numbers of size 1 in float32, through three layers at most.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


class LoRALinear(eqx.Module):
    """As in the documentation, but b is not zero, so that both factors have a gradient."""

    linear: eqx.nn.Linear
    lora: LowRank

    def __init__(self, linear, *, key):
        self.linear = linear
        [lora] = init_lora(key, {"kernel": linear.weight.T}, 2, "kernel", alpha=4).values()
        self.lora = lora.with_factors(lora.a, jax.random.normal(key, lora.b.shape, lora.dtype))

    def __call__(self, x, *, key=None):
        y = lora_dot(x, self.linear.weight.T, self.lora)
        return y if self.linear.bias is None else y + self.linear.bias


class Model(eqx.Module):
    layers: list
    steps: jax.Array
    activation: callable  # a leaf, and no array

    def __init__(self, *layers):
        self.layers, self.steps, self.activation = list(layers), jnp.arange(3), jnp.tanh

    def __call__(self, x):
        return self.layers[1](self.activation(self.layers[0](x)))


def with_lora(model, where):
    """The layers of a model that `where` picks, with LoRA."""
    keys = jax.random.split(jax.random.key(1), len(where(model)))
    layers = [LoRALinear(z, key=key) for z, key in zip(where(model), keys, strict=True)]
    return eqx.tree_at(where, model, layers)


PLAIN = Model(*(eqx.nn.Linear(n, m, key=jax.random.key(n)) for n, m in ((4, 5), (5, 3))))
MODEL = with_lora(PLAIN, lambda model: model.layers)


def loss_fn(model, x, y):
    return jnp.mean((jax.vmap(model)(x) - y) ** 2)


def lora_of(model):
    """What trains by default, as the optimizer wants it."""
    return eqx.filter(model, is_low_rank, is_leaf=is_low_rank)


def spec_of(model):
    """A filter spec of bools, one for each LoRA parameter."""
    return jax.tree.map(is_low_rank, model, is_leaf=is_low_rank)


def full_weight(layer):
    """(in, out), of a stack too."""
    return np.swapaxes(f64(layer.linear.weight), -1, -2) + f64(layer.lora.a) @ f64(layer.lora.b) * 2.0


def reference(weights, biases):
    """The loss, and the gradients of both layers' whole weights, (in, out), and of their biases."""
    (w1, w2), (b1, b2), x, y = weights, map(f64, biases), f64(X), f64(Y)
    h = np.tanh(x @ w1 + b1)
    difference = h @ w2 + b2 - y
    dy2 = 2 * difference / difference.size
    dy1 = dy2 @ w2.T * (1 - h**2)
    return np.mean(difference**2), (x.T @ dy1, h.T @ dy2), (dy1.sum(0), dy2.sum(0))


def expected_of(model):
    return reference(map(full_weight, model.layers), [layer.linear.bias for layer in model.layers])


def partitioned(spec, is_leaf=None, combine_leaf=None):
    """The gradient as users of `equinox.partition` take it."""

    def style(model):
        params, static = eqx.partition(model, spec, is_leaf=is_leaf)
        combined = lambda params: eqx.combine(params, static, is_leaf=combine_leaf)
        return oplora_jax.value_and_grad(lambda params: loss_fn(combined(params), X, Y))(params)

    return style


def filtered(loss_fn=loss_fn, around=lambda f: f, **settings):
    return lambda model: around(value_and_grad(loss_fn, **settings))(model, X, Y)


def vmapped_by_equinox(model, x, y):
    return jnp.mean((eqx.filter_vmap(lambda model, x: model(x), in_axes=(None, 0))(model, x) - y) ** 2)


def one_of_an_ensemble(model, x, y):
    """The models of an ensemble are a batch axis of every parameter; here there is one."""
    arrays, rest = eqx.partition(model, eqx.is_array)
    models = eqx.combine(jax.tree.map(lambda z: z[None], arrays), rest)
    return jnp.sum(eqx.filter_vmap(loss_fn, in_axes=(eqx.if_array(0), None, None))(models, x, y))


BOTH_FACTORS = jax.tree.map(
    lambda node: jax.tree.map(lambda _: is_low_rank(node), node), MODEL, is_leaf=is_low_rank
)
NOTHING = jax.tree.map(lambda _: False, MODEL)
OF_FUNCTIONS = eqx.tree_at(lambda spec: spec.layers, NOTHING, [is_low_rank, eqx.is_inexact_array])
STYLES = {
    "partition": partitioned(spec_of(MODEL)),
    "partition, is_leaf": partitioned(spec_of(MODEL), is_low_rank, is_low_rank),
    "partition, is_leaf to combine alone": partitioned(spec_of(MODEL), None, is_low_rank),
    "partition by factors": partitioned(BOTH_FACTORS),
    "partition by a function": partitioned(is_low_rank, is_low_rank, is_low_rank),
    "partition by is_inexact_array": partitioned(eqx.is_inexact_array),
    "ours": filtered(),
    "ours, NumPy's batch": lambda model: value_and_grad(loss_fn)(model, np.asarray(X), np.asarray(Y)),
    "ours by a spec": filtered(filter_spec=spec_of(MODEL)),
    "ours by factors": filtered(filter_spec=BOTH_FACTORS),
    "ours by is_inexact_array": filtered(filter_spec=eqx.is_inexact_array),
    "ours by functions": filtered(filter_spec=OF_FUNCTIONS),
    "ours by either": filtered(filter_spec=lambda z: is_low_rank(z) or eqx.is_inexact_array(z)),
    "outer": filtered(gradient="outer"),
    "dense": filtered(gradient="dense"),
    "moments": filtered(gradient="dense", moments="diagonal"),
    "microbatches": filtered(microbatches=3),
    "filter_jit": filtered(around=eqx.filter_jit),
    "filter_jit of the loss": filtered(eqx.filter_jit(loss_fn)),
    "filter_checkpoint": filtered(eqx.filter_checkpoint(loss_fn)),
    "filter_vmap": filtered(vmapped_by_equinox),
    "filter_vmap of models": filtered(one_of_an_ensemble),
}


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES.keys())
def test_gradients_are_exact_in_every_style(style):
    loss, gradients = style(MODEL)
    expected, of_weights, _ = expected_of(MODEL)
    np.testing.assert_allclose(loss, expected, **CLOSE)
    for layer, of_weight in zip(gradients.layers, of_weights, strict=True):
        np.testing.assert_allclose(to_dense(layer.lora), of_weight, **CLOSE)
    assert gradients.activation is None and gradients.steps is None


def test_what_else_is_differentiated_by():
    _, gradients = value_and_grad(loss_fn, filter_spec=eqx.is_inexact_array)(MODEL, X, Y)
    _, of_weights, of_biases = expected_of(MODEL)
    for layer, of_weight, of_bias in zip(gradients.layers, of_weights, of_biases, strict=True):
        np.testing.assert_allclose(layer.linear.weight, of_weight.T, **CLOSE)
        np.testing.assert_allclose(layer.linear.bias, of_bias, **CLOSE)
    _, gradients = value_and_grad(loss_fn, filter_spec=OF_FUNCTIONS)(MODEL, X, Y)
    assert gradients.layers[0].linear.weight is None
    np.testing.assert_allclose(gradients.layers[1].linear.bias, of_biases[1], **CLOSE)


WITH_HEAD = eqx.tree_at(lambda spec: spec.layers[1].linear.bias, spec_of(MODEL), True)
TRAINED = {
    "lora": (is_low_rank, lora_of),
    "lora and a bias": (WITH_HEAD, lambda model: eqx.filter(model, WITH_HEAD)),
    "everything": (eqx.is_inexact_array, lambda model: eqx.filter(model, eqx.is_inexact_array)),
}


@pytest.mark.parametrize("spec, params_of", TRAINED.values(), ids=TRAINED.keys())
def test_training(spec, params_of):
    """What the filter leaves trains and nothing else, with buffers donated as without."""
    tx = oplora_jax.oplora(0.3)

    def step(model, state):
        loss, gradients = value_and_grad(loss_fn, filter_spec=spec)(model, X, Y)
        updates, state = tx.update(gradients, state, params_of(model))
        return eqx.apply_updates(model, updates), state, loss

    def run(step):
        model = jax.tree.map(lambda z: z.copy() if eqx.is_array(z) else z, MODEL)
        state, losses = tx.init(params_of(model)), []
        for _ in range(15):
            model, state, loss = step(model, state)
            losses.append(float(loss))
        return model, losses

    model, losses = run(eqx.filter_jit(step))
    assert losses[-1] < 0.7 * losses[0]
    assert model.activation is jnp.tanh
    arrays = lambda tree: dict(jax.tree.leaves_with_path(eqx.filter(tree, eqx.is_array)))
    before, after = arrays(MODEL), arrays(model)
    assert {path for path in before if (before[path] != after[path]).any()} == set(arrays(params_of(MODEL)))
    assert run(eqx.filter_jit(step, donate="all"))[1] == losses


def test_optax_freezes_too():
    """The other way: gradients by everything, and `optax.partition` with labels."""
    params = eqx.filter(MODEL, eqx.is_inexact_array)
    labels = jax.tree.map(lambda p: "lora" if is_low_rank(p) else "rest", params, is_leaf=is_low_rank)
    # A function, as Optax takes a tree of labels that is a module with __call__ for one.
    tx = optax.partition({"lora": oplora_jax.oplora(0.1), "rest": optax.set_to_zero()}, lambda _: labels)
    _, gradients = value_and_grad(loss_fn, filter_spec=eqx.is_inexact_array)(MODEL, X, Y)
    frozen, _ = tx.update(gradients, tx.init(params), params)
    tx = oplora_jax.oplora(0.1)
    _, gradients = value_and_grad(loss_fn)(MODEL, X, Y)
    alone, _ = tx.update(gradients, tx.init(lora_of(MODEL)), lora_of(MODEL))
    chex.assert_trees_all_close(lora_of(frozen), alone, **CLOSE)
    assert not any(np.any(layer.linear.weight) for layer in frozen.layers)


def test_layers_under_a_scan():
    """Stacked as Equinox does it: made by `equinox.filter_vmap`, and a scan over the arrays."""
    make = lambda key: LoRALinear(eqx.nn.Linear(4, 4, key=key), key=key)
    stack = eqx.filter_vmap(make)(jax.random.split(jax.random.key(2), 3))

    def scanned_loss(stack, x):
        arrays, rest = eqx.partition(stack, eqx.is_array)
        body = lambda x, layer: (jnp.tanh(jax.vmap(eqx.combine(layer, rest))(x)), None)
        return jnp.sum(jax.lax.scan(body, x, arrays)[0] ** 2)

    loss, gradients = value_and_grad(scanned_loss)(stack, X)
    weights, xs = full_weight(stack), [f64(X)]
    for weight, bias in zip(weights, f64(stack.linear.bias), strict=True):
        xs.append(np.tanh(xs[-1] @ weight + bias))
    np.testing.assert_allclose(loss, np.sum(xs[-1] ** 2), **CLOSE)
    dy, found = 2 * xs[-1], to_dense(gradients.lora)
    for i in (2, 1, 0):
        dy = dy * (1 - xs[i + 1] ** 2)
        np.testing.assert_allclose(found[i], xs[i].T @ dy, rtol=1e-4, atol=1e-5)  # sums of up to 20
        dy = dy @ weights[i].T


def attention(key):
    model = eqx.nn.MultiheadAttention(2, 4, key=key)
    return model, lambda model: [model.query_proj, model.value_proj, model.output_proj]


def mlp(key, scan):
    model = eqx.nn.MLP(4, 4, 4, 3, activation=jnp.tanh, scan=scan, key=key)
    return model, lambda model: [model.layers[0], model.layers[-1]] + ([] if scan else [model.layers[1]])


def mlp_with_stack(key):
    """The middle layers of an MLP that scans are one Linear, whose arrays are stacked."""
    model, _ = mlp(key, scan=True)
    layer = eqx.filter_vmap(lambda linear, key: LoRALinear(linear, key=key))(
        model.layers[1], jax.random.split(key, 2)
    )
    return eqx.tree_at(lambda model: model.layers[1], model, layer), None


NETWORKS = {
    "MultiheadAttention": attention,
    "MLP": lambda key: mlp(key, scan=False),
    "MLP, scan": lambda key: mlp(key, scan=True),
    "MLP, LoRA on the stack": mlp_with_stack,
}


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS.keys())
def test_networks_of_equinox(make, x64):
    """`equinox.tree_at` puts LoRA on them; the gradient is that of merged weights in the plain network."""
    network, where = make(jax.random.key(3))
    model = with_lora(network, where) if where else network
    is_layer = lambda z: isinstance(z, LoRALinear)
    layers_of = lambda model: [z for z in jax.tree.leaves(model, is_leaf=is_layer) if is_layer(z)]
    x = f64(normal(4, 3, 5, 4))

    def loss_fn(model, x):
        called = lambda x: (
            model(x, x, x) if isinstance(model, eqx.nn.MultiheadAttention) else jax.vmap(model)(x)
        )
        return jnp.sum(jax.vmap(called)(x) ** 2)

    def plain_loss(weights):
        linears = [
            eqx.tree_at(lambda z: z.weight, z.linear, jnp.swapaxes(w, -1, -2))
            for z, w in zip(layers_of(model), weights, strict=True)
        ]
        return loss_fn(eqx.tree_at(layers_of, model, linears), x)

    weights = [full_weight(layer) for layer in layers_of(model)]
    assert weights
    expected, of_weights = jax.value_and_grad(plain_loss)(weights)
    loss, gradients = value_and_grad(loss_fn)(model, x)
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    found = [to_dense(layer.lora) for layer in layers_of(gradients)]
    # float64 on both sides.
    chex.assert_trees_all_close(found, of_weights, rtol=1e-10, atol=1e-12)


def test_state_and_auxiliary_data(x64):
    """`equinox.nn.BatchNorm` keeps its averages in a State, which the loss returns beside its value."""

    class Normalised(eqx.Module):
        layer: LoRALinear
        norm: eqx.nn.BatchNorm

        def __call__(self, x, state):
            return self.norm(self.layer(x), state)

    linear = eqx.nn.Linear(4, 3, key=jax.random.key(0))
    make = lambda: Normalised(
        LoRALinear(linear, key=jax.random.key(1)), eqx.nn.BatchNorm(3, "batch", mode="batch")
    )
    model, state = eqx.nn.make_with_state(make)()

    def loss_fn(model, x, y, state):
        over_batch = {"axis_name": "batch", "in_axes": (0, None), "out_axes": (0, None)}
        y_hat, state = jax.vmap(model, **over_batch)(x, state)
        return jnp.mean((y_hat - y) ** 2), state

    @eqx.filter_jit
    def both(model, x, y, state):
        return value_and_grad(loss_fn, has_aux=True)(model, x, y, state=state)

    (loss, after), gradients = both(model, f64(X), f64(Y), state)
    plain = lambda weight: eqx.tree_at(
        lambda z: z.layer, model, eqx.tree_at(lambda z: z.weight, linear, weight.T)
    )
    of_weight = lambda weight: loss_fn(plain(weight), f64(X), f64(Y), state)
    (expected, expected_after), of_weight = jax.value_and_grad(of_weight, has_aux=True)(
        full_weight(model.layer)
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    np.testing.assert_allclose(to_dense(gradients.layer.lora), of_weight, rtol=1e-10, atol=1e-12)
    chex.assert_trees_all_close(*map(jax.tree.leaves, (after, expected_after)), rtol=1e-12)


def test_a_model_without_lora_layers():
    """`init_lora` beside a module and `merge` into it; the weights are (out, in)."""
    lora = init_lora(jax.random.key(0), PLAIN, rank=2, targets={"layers/*/weight": "oi"}, alpha=4)
    lora = {
        path: p.with_factors(p.a, 0.1 * normal(5, *p.b.shape, dtype=jnp.float32)) for path, p in lora.items()
    }
    assert {path: p.shape for path, p in lora.items()} == {
        "layers/0/weight": (4, 5),
        "layers/1/weight": (5, 3),
    }
    loss, gradients = oplora_jax.value_and_grad(lambda lora: loss_fn(merge(PLAIN, lora), X, Y))(lora)
    weights = [
        f64(z.weight).T + 2.0 * f64(p.a) @ f64(p.b) for z, p in zip(PLAIN.layers, lora.values(), strict=True)
    ]
    expected, of_weights, _ = reference(weights, [z.bias for z in PLAIN.layers])
    np.testing.assert_allclose(loss, expected, **CLOSE)
    for gradient, of_weight in zip(gradients.values(), of_weights, strict=True):
        np.testing.assert_allclose(to_dense(gradient), of_weight, **CLOSE)


def test_increments_of_lora_layers_merge():
    """(in, out) for a (out, in) weight, by its roles: the plain model then computes what the other does."""
    lora = {
        f"layers/{i}/weight": dataclasses.replace(layer.lora, roles="oi")
        for i, layer in enumerate(MODEL.layers)
    }
    loss, gradients = oplora_jax.value_and_grad(lambda lora: loss_fn(merge(PLAIN, lora), X, Y))(lora)
    expected, of_weights, _ = expected_of(MODEL)
    np.testing.assert_allclose(loss, expected, **CLOSE)
    for gradient, of_weight in zip(gradients.values(), of_weights, strict=True):
        np.testing.assert_allclose(to_dense(gradient), of_weight, **CLOSE)


def test_serialisation(tmp_path):
    """`equinox.tree_serialise_leaves` of the model and of the optimizer's state, after a step."""
    tx = oplora_jax.oplora(0.3)
    _, gradients = value_and_grad(loss_fn)(MODEL, X, Y)
    updates, state = tx.update(gradients, tx.init(lora_of(MODEL)), lora_of(MODEL))
    saved = eqx.apply_updates(MODEL, updates), state
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, saved)
    file.seek(0)
    restored = eqx.tree_deserialise_leaves(file, (MODEL, tx.init(lora_of(MODEL))))
    assert eqx.tree_equal(restored, saved)
    assert not eqx.tree_equal(restored[0], MODEL)


ONE_FACTOR = eqx.tree_at(lambda spec: spec.layers[1].lora.b, BOTH_FACTORS, False)


def used_elsewhere(model, x, y):
    return loss_fn(model, x, y) + jnp.sum(model.layers[0].lora.a)


def derivative_of_its_own(model, x, y):
    """Nothing can be captured within a function that has a derivative of its own."""

    @eqx.filter_custom_vjp
    def call(layer, x):
        return layer(x)

    call.def_fwd(lambda perturbed, layer, x: (layer(x), None))
    call.def_bwd(
        lambda residuals, g, perturbed, layer, x: jax.tree.map(
            jnp.zeros_like, eqx.filter(layer, eqx.is_array)
        )
    )
    return jnp.sum(jax.vmap(lambda x: call(model.layers[0], x))(x))


WITH_FUNCTION = eqx.tree_at(lambda spec: spec.activation, spec_of(MODEL), True)
ERRORS = {
    "nothing": (filtered(filter_spec=False), "filter_spec leaves nothing of the model to differentiate by"),
    "no lora": (lambda _: filtered()(PLAIN), "expected LoRA parameters, LowRank nodes"),
    "no filter": (filtered(filter_spec="lora"), "must consist of booleans and callables only"),
    "one factor": (
        filtered(filter_spec=ONE_FACTOR),
        r"^\.layers\[1\]\.lora: filter_spec leaves one factor .* expected both, or none. oplora_jax.lora_fa",
    ),
    "a function": (
        filtered(filter_spec=WITH_FUNCTION),
        r"^\.activation: a PjitFunction among the parameters, .* Close the loss over it",
    ),
    "integers": (
        filtered(filter_spec=eqx.is_array),
        r"^\.steps: int32 numbers among the parameters, .* expected LoRA parameters and floating-point",
    ),
    "the whole model": (
        lambda model: oplora_jax.value_and_grad(loss_fn)(model, X, Y),
        r"^\.steps: .* oplora_jax\.equinox\.value_and_grad does that",
    ),
    "elsewhere": (filtered(used_elsewhere), r"^\.layers\[0\]\.lora: the loss depends on the factors"),
    "custom_vjp": (
        filtered(derivative_of_its_own),
        r"^\.layers\[0\]\.lora: .* functions with a derivative of their own",
    ),
    "kind": (lambda model: filtered(gradient="exact")(model), "gradient is 'exact'; expected 'auto'"),
    "batch": (filtered(microbatches=4), "does not divide .*argument 1: 6"),
}


@pytest.mark.parametrize("style, words", ERRORS.values(), ids=ERRORS.keys())
def test_errors(style, words, unchecked):
    with pytest.raises(ValueError, match=words):
        style(MODEL)
