"""Training NNX LoRA layers: `value_and_grad` for modules and `nnx.Optimizer`."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import oplora_jax
from oplora_jax import LowRank
from oplora_jax.nnx import LoRALinear, value_and_grad
from tests.arrays import normal_like
from tests.optimizers.cases import CASES, make

X = jnp.asarray(np.random.default_rng(0).standard_normal((8, 4)), jnp.float32)
Y = jnp.asarray(np.random.default_rng(1).standard_normal((8, 3)), jnp.float32)
FACTORS = nnx.DiffState(0, nnx.LoRAParam)


class Model(nnx.Module):
    def __init__(self, rngs):
        self.first = LoRALinear(4, 6, 2, alpha=4.0, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.second = LoRALinear(6, 3, 2, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.tanh(self.norm(self.first(x))))


def mean_squared_error(model, x, y):
    return jnp.mean((model(x) - y) ** 2)


@pytest.mark.parametrize("gradient", ["outer", "dense", "factors"])
def test_nnx_optimizer(gradient):
    """nnx.Optimizer trains the LoRA parameters alone; batch statistics move, base weights do not."""
    model = Model(nnx.Rngs(0))
    kernel, mean = model.first.kernel[...], model.norm.mean[...]
    optimizer = nnx.Optimizer(model, oplora_jax.oplora(0.3), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model, optimizer):
        wrt = nnx.DiffState(0, nnx.LoRAParam)
        grad_fn = (
            nnx.value_and_grad(mean_squared_error, argnums=wrt)
            if gradient == "factors"
            else value_and_grad(mean_squared_error, gradient)
        )
        loss, gradients = grad_fn(model, X, Y)
        optimizer.update(model, gradients)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(60)]
    assert losses[-1] < 0.6 * losses[0]
    chex.assert_trees_all_equal(model.first.kernel[...], kernel)
    assert (model.norm.mean[...] != mean).any()
    assert isinstance(model.first.lora.get_value(), LowRank)
    momentum = optax.tree.get(optimizer.opt_state, "momentum")
    assert momentum is not None


def test_nnx_gradients_by_other_variables_and_aux():
    model = Model(nnx.Rngs(0))
    loss_fn = lambda model, x: (jnp.sum(model(x) ** 2), "aux")
    expected = nnx.grad(lambda m, x: loss_fn(m, x)[0], argnums=nnx.DiffState(0, nnx.Param))(
        Model(nnx.Rngs(0)), X
    )
    (loss, aux), gradients = value_and_grad(loss_fn, has_aux=True, wrt=nnx.Param)(model, X)
    assert aux == "aux" and loss > 0
    # float32 through two layers and a batch norm
    chex.assert_trees_all_close(
        nnx.to_pure_dict(gradients)["first"]["kernel"],
        nnx.to_pure_dict(expected)["first"]["kernel"],
        rtol=1e-4,
        atol=1e-5,
    )


class Student(nnx.Module):
    """LoRA behind a dropout whose random streams are given at the call."""

    def __init__(self, rngs):
        self.layer, self.dropout = LoRALinear(4, 3, 2, alpha=4.0, rngs=rngs), nnx.Dropout(0.5)
        nnx.update(self.layer.lora, normal_like(2, self.layer.lora.get_value()))

    def __call__(self, x, rngs):
        return self.layer(self.dropout(x, rngs=rngs))


class Teacher(nnx.Module):
    """Batch statistics, a dropout with random streams of its own, and LoRA that is not to be trained."""

    def __init__(self, rngs):
        self.norm, self.dropout = nnx.BatchNorm(4, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
        self.layer = LoRALinear(4, 3, 2, rngs=rngs)

    def __call__(self, x):
        return self.layer(self.dropout(self.norm(x)))


def distillation(model, x, rngs, objects, teacher):
    y = model(x, rngs)
    objects["metrics"][0].update(values=y)
    objects["calls"][...] += 1
    return jnp.mean((y - jax.lax.stop_gradient(teacher(x))) ** 2)


def other_objects():
    calls = nnx.Variable(jnp.zeros((), jnp.int32))
    objects = {"metrics": [nnx.metrics.Average()], "calls": calls, "none": None}
    return nnx.Rngs(dropout=3), objects, Teacher(nnx.Rngs(4))


def state_of(objects):
    """All numbers, with the counts of the random streams, but without their keys, which stay."""
    return nnx.to_pure_dict(nnx.state(objects, nnx.Not(nnx.RngKey)))


@pytest.mark.parametrize("transform", [lambda f: f, nnx.jit])
def test_other_objects_among_the_arguments(transform):
    """As for nnx.value_and_grad: their state moves, and what two of them share is one."""

    def run(differentiate, steps=2):
        (rngs, objects, teacher), model = other_objects(), Student(nnx.Rngs(0))
        objects["streams"] = rngs
        step = transform(
            lambda model, rngs, objects, teacher: differentiate(model, X, rngs, objects, teacher=teacher)
        )
        values = [step(model, rngs, objects, teacher) for _ in range(steps)]
        moved = rngs, objects["metrics"], objects["calls"], teacher
        assert objects["streams"] is rngs and objects["calls"][...] == steps
        return model.layer.lora.get_value(), values, state_of(moved)

    lora, got, state = run(value_and_grad(distillation))
    _, expected, expected_state = run(nnx.value_and_grad(distillation, argnums=FACTORS))
    close = lambda got, expected: chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-6)  # float32
    close(state, expected_state)
    assert (got[0][0] != got[1][0]) and set(got[0][1]) == {"layer"}
    for (value, exact), (expected_value, factors) in zip(got, expected, strict=True):
        close(value, expected_value)
        exact, factors = (z["layer"]["lora"].get_value() for z in (exact, factors))
        close(oplora_jax.factor_gradients(lora, exact), factors)


@pytest.mark.parametrize("transform", [lambda f: f, nnx.jit])
def test_each_microbatch_updates_other_objects(transform):
    """Whole, as their arrays are no part of the batch; with the rows that it takes."""
    (rngs, objects, teacher), model = other_objects(), Student(nnx.Rngs(0))
    by_parts = value_and_grad(distillation, microbatches=2)
    step = transform(lambda m, x, rngs, objects, teacher: by_parts(m, x, rngs, objects, teacher=teacher))
    loss, gradients = step(model, X, rngs, objects, teacher)
    state = state_of((rngs, objects, teacher))
    rngs, objects, teacher = other_objects()
    parts = [value_and_grad(distillation)(model, X[i::2], rngs, objects, teacher=teacher) for i in range(2)]
    expected = state_of((rngs, objects, teacher))
    close = lambda got, expected: chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-6)  # float32
    close(state, expected)
    close(loss, (parts[0][0] + parts[1][0]) / 2)
    total, one, two = (
        oplora_jax.to_dense(z["layer"]["lora"].get_value()) for z in (gradients, parts[0][1], parts[1][1])
    )
    close(total, (one + two) / 2)
    assert objects["calls"][...] == 2


def test_variables_that_a_microbatch_makes():
    def loss_fn(model, x):
        model.outputs = nnx.Intermediate(model(x))
        return jnp.sum(model.outputs[...] ** 2)

    model = LoRALinear(4, 3, 2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="microbatches=2: the loss makes the variables outputs, which"):
        value_and_grad(loss_fn, microbatches=2)(model, X)
    value_and_grad(loss_fn)(model, X)
    assert model.outputs.shape == (8, 3)


def test_a_model_among_the_other_arguments():
    """The same object twice, and one that holds the model's layer, are differentiated through every use."""

    def loss_fn(model, x, also, head):
        return jnp.sum(jnp.sin(model(x)) * also(x) * head["layer"](x))

    def run(differentiate):
        model = LoRALinear(4, 3, 2, rngs=nnx.Rngs(0))
        nnx.update(model.lora, normal_like(2, model.lora.get_value()))
        gradient = differentiate(model)["lora"].get_value()
        return oplora_jax.factor_gradients(model.lora.get_value(), gradient)

    got = run(lambda m: value_and_grad(loss_fn)(m, X, m, nnx.Dict(layer=m))[1])
    expected = run(nnx.grad(lambda m: loss_fn(m, X, m, {"layer": m}), argnums=FACTORS))
    chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-5)  # float32, products of three


# Optax's own, around this library's too, and all of this library's.
OPTIMIZERS = {
    "adamw": lambda: optax.adamw(1e-2),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "lion": lambda: optax.lion(1e-2),
    "MultiSteps": lambda: optax.MultiSteps(oplora_jax.oplora(0.1), 2).gradient_transformation(),
    "apply_if_finite": lambda: optax.apply_if_finite(oplora_jax.oplora(0.1), 3),
    "ema": lambda: optax.chain(oplora_jax.oplora(0.1), optax.ema(0.9)),
    "schedule_free": lambda: optax.contrib.schedule_free(oplora_jax.oplora(0.1), 0.1),
    "inject_hyperparams": lambda: optax.inject_hyperparams(oplora_jax.oplora)(0.1),
    **{name: lambda name=name: make(name) for name in CASES},
}


class Bank(nnx.Module):
    """Two LoRA parameters in a dict, in one variable."""

    def __init__(self):
        kernels = {name: jnp.ones((4, 3)) / 4 for name in ("value", "query")}
        self.kernels = nnx.Param(kernels)
        self.lora = nnx.LoRAParam(oplora_jax.init_lora(jax.random.key(0), kernels, 2, "*", alpha=4))

    def __call__(self, x):
        kernels, lora = self.kernels.get_value(), self.lora.get_value()
        values = {name: oplora_jax.lora_dot(x, kernels[name], lora[name]) for name in lora}
        return values["value"] * nnx.tanh(values["query"])


def one_layer():
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    oplora_jax.nnx.loraize(model, 2, "", alpha=4, rngs=nnx.Rngs(1))
    return model


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_those_of_the_plain_tree(name):
    """In one program for all steps; the optimizer's state keeps its structure."""
    exact = name in CASES and "factors" not in CASES[name].kinds
    model = Bank() if name in ("adamw", "MultiSteps", "oplora") else one_layer()
    tx, params = OPTIMIZERS[name](), model.lora.get_value()
    optimizer, state = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam), tx.init(params)
    structure, traces = jax.tree.structure(nnx.state(optimizer)), []

    @nnx.jit
    def step(model, optimizer, params, state):
        traces.append(name)
        factors = nnx.value_and_grad(mean_squared_error, argnums=FACTORS)
        differentiate = value_and_grad(mean_squared_error, "outer") if exact else factors
        gradients = differentiate(model, X, Y)[1]
        updates, state = tx.update(gradients["lora"].get_value(), state, params)
        optimizer.update(model, gradients)
        return optax.apply_updates(params, updates), state

    start = params
    for _ in range(4):
        params, state = step(model, optimizer, params, state)
    assert len(traces) == 1 and jax.tree.structure(nnx.state(optimizer)) == structure
    chex.assert_trees_all_equal_structs(model.lora.get_value(), params)
    # The same operations in one program, fused apart: float32, by solves.
    chex.assert_trees_all_close(model.lora.get_value(), params, rtol=1e-4, atol=1e-5)
    moved = jax.tree.map(lambda p, q: jnp.abs(p - q).max(), params, start)
    assert max(jax.tree.leaves(moved)) > 1e-3


@pytest.mark.parametrize("name", ["adamw", "MultiSteps", "oplora"])
@pytest.mark.parametrize("make_model", [one_layer, Bank])
def test_steps_in_loops(name, make_model):
    """`nnx.scan` and `nnx.fori_loop` carry the model and the optimizer."""

    def start():
        model = make_model()
        return model, nnx.Optimizer(model, OPTIMIZERS[name](), wrt=nnx.LoRAParam)

    def step(both, _=None):
        model, optimizer = both
        optimizer.update(model, nnx.grad(mean_squared_error, argnums=FACTORS)(model, X, Y))
        return both

    one_by_one, scanned, looped = start(), start(), start()
    jitted = nnx.jit(step)
    for _ in range(3):
        jitted(one_by_one)
    nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(scanned, jnp.arange(3))
    nnx.fori_loop(0, 3, lambda _, both: step(both), looped)
    for model, optimizer in (scanned, looped):
        expected = nnx.state(one_by_one[0]), nnx.state(one_by_one[1])
        # float32, compiled apart
        chex.assert_trees_all_close((nnx.state(model), nnx.state(optimizer)), expected, rtol=1e-4, atol=1e-5)


def test_keyword_arguments_of_any_name():
    model = Model(nnx.Rngs(0))
    scaled_loss = lambda model, x, y, state, params, rest: (
        state * params * rest * mean_squared_error(model, x, y)
    )
    loss, gradients = value_and_grad(scaled_loss, "dense")(model, X, Y, state=2.0, params=3.0, rest=5.0)
    expected_loss, expected = value_and_grad(mean_squared_error, "dense")(model, X, Y)
    chex.assert_trees_all_close(
        (loss, gradients), jax.tree.map(lambda z: 30 * z, (expected_loss, expected)), rtol=1e-5
    )
