"""Flax models with LoRA on a mesh: the numbers of one device, and factors that lie beside the kernels."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import oplora_jax
from oplora_jax import LowRank, is_low_rank, to_dense
from oplora_jax import linen as lora_linen
from oplora_jax import nnx as lora_nnx
from tests.meshes import BOTH, LAYOUTS, assert_lie_alike, make_mesh, spec

TX = oplora_jax.oplora(0.2, momentum=None)
OPTIONS = {"use_bias": False}


class Heads(nnx.Module):
    """Heads and back. On explicit axes the second product must be told how its result is sharded."""

    def __init__(self, outputs, rngs):
        self.first = nnx.LinearGeneral(8, (4, 6), rngs=rngs)
        self.second = nnx.LinearGeneral((4, 6), 8, axis=(-2, -1), rngs=rngs)
        self.outputs = outputs

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)), out_sharding=self.outputs)


class Sharded(nnx.Module):
    """Kernels spread over the devices that have the data, by rows and by columns; every product is told."""

    def __init__(self, outputs, rngs):
        self.first = nnx.Linear(8, 8, rngs=rngs, **OPTIONS)
        self.second = nnx.Einsum("btd,dh->bth", (8, 8), (8,), rngs=rngs)
        self.outputs = outputs

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x, self.outputs)), out_sharding=self.outputs)


class Experts(nnx.Module):
    """Four experts on as many devices; an einsum whose kernel has its axes in another order."""

    def __init__(self, outputs, rngs):
        self.first = nnx.Einsum("ted,hed->eth", (6, 4, 8), rngs=rngs)

    def __call__(self, x):
        return self.first(x)


class Convolutions(nnx.Module):
    """Convolutions of a batch that is spread out."""

    def __init__(self, outputs, rngs):
        self.first = nnx.Conv(8, 4, (3,), rngs=rngs)
        self.outputs = outputs

    def __call__(self, x):
        return self.first(x, self.outputs)


class LinenDense(nn.Module):
    """Rows, then columns: linen cannot say how a product over an axis sharded in both is sharded."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(8, name="second")(jnp.tanh(nn.Dense(16, name="first")(x)))


# The model, the roles of its kernels' axes, how they are sharded, what is captured, and on which meshes.
CASES = {
    "heads": (Heads, ("ioo", "iio"), (P(None, "model"), P("model")), "outer", ["explicit", "auto"]),
    "sharded": (Sharded, ("io", "io"), (P("data"), P(None, "data")), "dense", ["explicit"]),
    "experts": (Experts, ("obi",), (P(None, "model"),), "outer", ["explicit"]),
    "convolution": (Convolutions, ("iio",), (P(None, None, "model"),), "dense", ["explicit"]),
    "linen": (LinenDense, ("io", "io"), (P("model"), P(None, "model")), "dense", ["explicit", "auto"]),
}


def factors(kernel_spec, roles):
    """How the factors of a kernel are to be sharded."""
    entries = (*kernel_spec, *[None] * (len(roles) - len(kernel_spec)))
    of = lambda role: [entry for entry, r in zip(entries, roles, strict=True) if r == role]
    some = lambda role: next((entry for entry in of(role) if entry is not None), None)
    return P(*of("b"), some("i"), None), P(*of("b"), None, some("o"))


def build(name, put):
    """(loss, lora, rest, x) of a model, loraized once its kernels are where `put` puts them."""
    model_class, _, specs, *_ = CASES[name]
    specs = dict(zip(("first", "second"), specs, strict=False))
    x = put(np.random.default_rng(0).standard_normal((4, 4, 8)).astype(np.float32), P("data"))
    if issubclass(model_class, nn.Module):
        params = model_class().init(jax.random.key(0), np.ones((1, 8), np.float32))["params"]
        for layer, kernel_spec in specs.items():
            params[layer] = {
                "kernel": put(params[layer]["kernel"], kernel_spec),
                "bias": put(params[layer]["bias"], P()),
            }
        model = lora_linen.loraize(model_class(), 2, "*", alpha=4)
        params = lora_linen.add_lora(model, jax.random.key(1), params, x)
        lora = {layer: params[layer].pop("lora") for layer in specs}
        join = lambda lora, rest: {layer: {**rest[layer], "lora": lora[layer]} for layer in specs}
        apply = lambda lora, rest, x: model.apply({"params": join(lora, rest)}, x)
        rest = params
    else:
        model = model_class(put(None, P("data")), nnx.Rngs(0))
        for layer in specs:
            for kind, variable in vars(getattr(model, layer)).items():
                if isinstance(variable, nnx.Param):
                    variable.set_value(put(variable.get_value(), specs[layer] if kind == "kernel" else P()))
        lora_nnx.loraize(model, 2, "*", alpha=4, rngs=nnx.Rngs(1))
        graphdef, lora, rest = nnx.split(model, nnx.LoRAParam, ...)
        apply = lambda lora, rest, x: nnx.merge(graphdef, lora, rest)(x)
    loss = lambda lora, rest, x: jnp.mean(jnp.sin(apply(lora, rest, x)) ** 2)
    return loss, at_work(lora), rest, x


def at_work(lora):
    """Factors where they are, and b not zero."""

    def fill(param):
        b = np.random.default_rng(1).standard_normal(param.b.shape).astype(np.float32)
        return param.with_factors(param.a, jax.device_put(b, param.b.sharding))

    return jax.tree.map(fill, lora, is_leaf=is_low_rank)


def run(name, put):
    """Where the start lies and where a step leads, the numbers of it, and the gradients."""
    loss, lora, rest, x = build(name, put)

    def step(lora, state, rest, x):
        value, gradients = oplora_jax.value_and_grad(loss, CASES[name][3])(lora, rest, x)
        updates, state = TX.update(gradients, state, lora)
        return value, optax.apply_updates(lora, updates), gradients

    arguments = lora, TX.init(lora), rest, x
    # Not optimized: most of the time here is the compiler's.
    compiled = jax.jit(step).lower(*arguments).compile({"xla_backend_optimization_level": 0})
    value, after, gradients = compiled(*arguments)
    return lora, after, (value, nodes(after), nodes(gradients))


def nodes(tree):
    """The matrices of a tree on one device."""
    is_matrix = lambda z: isinstance(z, LowRank | oplora_jax.OuterProduct)
    form = lambda z: to_dense(jax.tree.map(lambda z: jnp.asarray(np.asarray(z)), z))
    return [np.asarray(form(z)) for z in jax.tree.leaves(tree, is_leaf=is_matrix)]


@functools.cache
def on_one_device(name):
    return run(name, lambda z, _: None if z is None else jnp.asarray(z))[-1]


@pytest.mark.parametrize(
    "name, axis_types", [(name, axes) for name, case in CASES.items() for axes in case[-1]]
)
def test_a_step_is_that_of_one_device(name, axis_types):
    mesh = make_mesh(LAYOUTS[BOTH], axis_types)

    def put(array, array_spec):
        if array is None:  # what a product is told
            return array_spec if axis_types == "explicit" else None
        return jax.device_put(array, NamedSharding(mesh, array_spec))

    with jax.set_mesh(mesh):
        before, after, got = run(name, put)
    # Sums over devices are in another order: float32 rounding, through a solve in the step.
    chex.assert_trees_all_close(got, on_one_device(name), rtol=1e-4, atol=1e-5)
    assert all(np.abs(gradient).max() > 1e-3 for gradient in got[-1])
    assert_lie_alike(after, before)
    for layer, roles, kernel_spec in zip(("first", "second"), *CASES[name][1:3], strict=False):
        param = before[layer] if name.startswith("linen") else before[layer]["lora"].get_value()
        assert (spec(param.a), spec(param.b)) == factors(kernel_spec, roles)


def test_new_layers_lie_beside_their_kernels():
    """A kernel that its initializer puts on the mesh, in both APIs."""
    with jax.set_mesh(make_mesh(LAYOUTS[BOTH], "explicit")):
        init = nnx.with_partitioning(nnx.initializers.normal(), ("data", "model"))
        layer = lora_nnx.LoRALinear(8, 8, 2, kernel_init=init, rngs=nnx.Rngs(0))
        assert spec(layer.kernel.get_value()) == P("data", "model")
        compiled = nnx.jit(lambda: lora_nnx.LoRALinear(8, 8, 2, kernel_init=init, rngs=nnx.Rngs(0)))()
        init = lambda *z: jax.sharding.reshard(nn.initializers.normal()(*z), P("data", "model"))
        init_fn = lora_linen.LoRADense(8, rank=2, kernel_init=init).init
        params = jax.jit(init_fn)(jax.random.key(0), jnp.ones((1, 8)))
        for lora in (layer.lora.get_value(), compiled.lora.get_value(), params["params"]["lora"]):
            assert (spec(lora.a), spec(lora.b)) == (P("data", None), P(None, "model"))
