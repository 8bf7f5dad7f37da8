"""LoRA by Qwix's provider: `LowRank` parameters and exact gradients in models of any modules."""

import inspect

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax import nnx, serialization
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from qwix._src.providers.ptq import WithAux
from qwix._src.utils import flax_util

import oplora_jax
from oplora_jax import LowRank, factor_gradients, is_low_rank, linen, to_dense
from oplora_jax.adapters.kernel_axes import add_increment
from oplora_jax.nnx import LoRALinear, value_and_grad
from oplora_jax.peft import load_adapter, save_adapter
from oplora_jax.qwix import LoraProvider
from tests.arrays import as_kernel, normal, normal_like

RANK, ALPHA = 2, 6
X = normal(9, 2, 3, 8, dtype=jnp.float32)
BASES = {
    "plain": {},
    "int8": {"weight_qtype": "int8"},
    "int4": {"weight_qtype": "int4", "tile_size": 4},
    "nf4": {"weight_qtype": "nf4", "tile_size": 4},
    "fp8": {"weight_qtype": "float8_e4m3fn"},
}


class Weight(nnx.Module):
    """A module with a raw parameter, as of Tunix's models."""

    def __init__(self, equation, *shape):
        self.equation, self.w = equation, nnx.Param(normal(len(shape), *shape))

    def __call__(self, x):
        return jnp.einsum(self.equation, x, self.w[...])


class Model(nnx.Module):
    """Queries (N, D, H), keys and values (2, D, N, H), outputs (N, H, D), dense layers, experts."""

    def __init__(self):
        rngs, dtype = nnx.Rngs(0), {"param_dtype": jnp.result_type(float)}
        self.query, self.keys = Weight("BTD,NDH->BTNH", 2, 8, 4), Weight("BSD,CDNH->CBSNH", 2, 8, 2, 4)
        self.out = Weight("BTNH,NHD->BTD", 2, 4, 8)
        self.experts = Weight("ebtd,edf->ebtf", 3, 8, 5)
        self.dense = nnx.Linear(8, 12, rngs=rngs, **dtype)
        self.general = nnx.LinearGeneral((3, 4), (2, 4), axis=(-2, -1), rngs=rngs, **dtype)

    def __call__(self, x):
        query, (keys, values) = self.query(x), self.keys(x)
        y = self.out(jnp.tanh(query * keys) + values)
        y = self.general(jnp.sin(self.dense(x + y)).reshape(*x.shape[:2], 3, 4)).reshape(y.shape)
        return self.experts(jnp.broadcast_to(y, (3, *y.shape)))


class LinenWeight(nn.Module):
    equation: str
    shape: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.normal(1.0, jnp.result_type(float))
        return jnp.einsum(self.equation, x, self.param("w", init, self.shape))


class FeedForward(nn.Module):
    """Two weights in one module, as in gemma; the first has its inputs last."""

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.normal(1.0, jnp.result_type(float))
        gate, up = jnp.einsum("...d,chd->c...h", x, self.param("gating_einsum", init, (2, 12, 8)))
        return jnp.dot(jnp.tanh(gate) * up, self.param("linear", init, (12, 8)))


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = LinenWeight("BTD,NDH->BTNH", (2, 8, 4), name="query")(x)
        y = nn.DenseGeneral(8, axis=(-2, -1), use_bias=False, name="out", param_dtype=y.dtype)(y)
        return FeedForward(name="mlp")(y)


def by_provider(base="plain", module_path=".*", disable_jit=False, **rule):
    rule = qwix.LoraRule(module_path=module_path, rank=RANK, alpha=ALPHA, **BASES[base], **rule)
    return LoraProvider([rule], disable_jit=disable_jit)


def weight_of(path):
    """The path of a LoRA parameter's weight: "query/lora/w" is that of "query/w"."""
    return "/".join(str(key.key) for key in path if getattr(key, "key", "lora") != "lora")


def take(params):
    """The LoRA parameters of a tree by their weights' paths, and a function that puts others there."""
    leaves, treedef = jax.tree.flatten_with_path(params, is_leaf=is_low_rank)
    lora = {weight_of(path): z for path, z in leaves if is_low_rank(z)}
    put = lambda new: treedef.unflatten([new[weight_of(path)] if is_low_rank(z) else z for path, z in leaves])
    return normal_like(7, lora, 0.5), put


def of_nnx(base, x, **rule):
    """(LoRA parameters by their weights' paths, the model as a function of them, its other parameters)."""
    model = qwix.apply_lora_to_model(Model(), by_provider(base, **rule), x, rngs=nnx.Rngs(1))
    graphdef, state, rest = nnx.split(model, nnx.LoRAParam, ...)
    lora, put = take(state)
    apply = lambda lora, x: nnx.merge(graphdef, put(lora), rest, copy=True)(x)
    modules = {"/".join(map(str, path)): module for path, module in nnx.iter_modules(model)}
    return lora, apply, {name: getattr(modules[name.split("/")[0]], name.split("/")[1]) for name in lora}


def of_linen(base, x, **rule):
    model = qwix.apply_lora_to_model(Linen(), by_provider(base, **rule))
    params = model.init(jax.random.key(0), x)["params"]
    lora, put = take(params)
    weights = {name: params[name.split("/")[0]][name.split("/")[1]] for name in lora}
    return lora, lambda lora, x: model.apply({"params": put(lora)}, x), weights


def plain_nnx(weights):
    """The plain model with other weights."""
    graphdef, state = nnx.split(Model())
    leaves, treedef = jax.tree.flatten_with_path(state)
    state = treedef.unflatten([weights.get(weight_of(path), z) for path, z in leaves])
    return lambda x: nnx.merge(graphdef, state)(x)


def plain_linen(weights):
    def at(path, z):
        return weights["/".join(key.key for key in path)]

    x = jax.ShapeDtypeStruct((1, 1, 8), jnp.result_type(float))
    params = jax.eval_shape(Linen().init, jax.random.key(0), x)["params"]
    return lambda x: Linen().apply({"params": jax.tree.map_with_path(at, params)}, x)


MODELS = {"nnx": (of_nnx, plain_nnx), "linen": (of_linen, plain_linen)}


def as_array(weight):
    weight = flax_util.unbox(weight)
    weight = weight.array if isinstance(weight, WithAux) else weight
    return qwix.dequantize(weight) if isinstance(weight, qwix.QArray) else weight


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", MODELS)
def test_gradients_of_the_whole_weights(kind, base, x64):
    """Those of the plain model with the weights merged, all axes in their places."""
    make, plain = MODELS[kind]
    x = normal(0, 2, 3, 8)
    lora, apply, weights = make(base, x)
    weights = {name: as_array(weight) for name, weight in weights.items()}
    assert len(lora) == (6 if kind == "nnx" else 4)
    loss = lambda y: jnp.sum(jnp.sin(y))
    merged = lambda weights: plain(oplora_jax.merge(weights, lora))
    value, expected = jax.value_and_grad(lambda weights: loss(merged(weights)(x)))(weights)
    # float64 through five layers; the scales of quantised weights are applied in float32.
    tolerance = {"rtol": 1e-10, "atol": 1e-10} if base == "plain" else {"rtol": 1e-6, "atol": 1e-6}
    for gradient in ("outer", "dense"):
        ours, gradients = oplora_jax.value_and_grad(lambda lora: loss(apply(lora, x)), gradient)(lora)
        np.testing.assert_allclose(ours, value, rtol=tolerance["rtol"])
        for name, g in gradients.items():
            found = as_kernel(g, lora[name].roles, expected[name].shape)
            np.testing.assert_allclose(found, expected[name], **tolerance, err_msg=name)


@pytest.mark.parametrize("settings", [{}, {"padding": "VALID", "strides": 2}, {"feature_group_count": 2}])
def test_a_convolution(settings, x64):
    conv = nnx.Conv(4, 6, (3,), param_dtype=float, rngs=nnx.Rngs(0), **settings)
    x = normal(0, 2, 7, 4)
    model = qwix.apply_lora_to_model(nnx.Sequential(conv), by_provider(), x, rngs=nnx.Rngs(1))
    nnx.update(model, normal_like(3, nnx.state(model, nnx.LoRAParam)))
    lora = model.layers[0].lora["kernel"].get_value()

    def plain(kernel):
        layer = nnx.clone(conv)
        layer.kernel.set_value(kernel)
        return jnp.sum(jnp.sin(layer(x)))

    value, expected = jax.value_and_grad(plain)(add_increment(conv.kernel[...], lora))
    found, gradients = value_and_grad(lambda model: jnp.sum(jnp.sin(model(x))))(model)
    np.testing.assert_allclose(found, value, rtol=1e-12)
    [gradient] = jax.tree.leaves(gradients)
    np.testing.assert_allclose(gradient.reshape(expected.shape), expected, rtol=1e-12, atol=1e-12)


def test_a_quantised_convolution():
    """Qwix's own, with the increment's beside it."""
    conv, x = nnx.Sequential(nnx.Conv(4, 6, (3,), rngs=nnx.Rngs(0))), normal(0, 2, 7, 4, dtype=jnp.float32)
    types = {"weight_qtype": "int8", "act_qtype": "int8"}
    quantised = qwix.quantize_model(conv, qwix.PtqProvider([qwix.QuantizationRule(**types)]), x)
    provider = LoraProvider(rank=RANK, alpha=ALPHA, **types)
    model = qwix.apply_lora_to_model(conv, provider, x, rngs=nnx.Rngs(1))
    nnx.update(model, normal_like(3, nnx.state(model, nnx.LoRAParam)))
    lora = model.layers[0].lora["kernel"].get_value()

    def loss(increment):
        axes = ("NHC", "HIO", "NHC")
        added = jax.lax.conv_general_dilated(x, increment, (1,), "SAME", dimension_numbers=axes)
        return jnp.sum(jnp.sin(quantised(x) + added))

    value, expected = jax.value_and_grad(loss)(to_dense(lora).reshape(3, 4, 6))
    found, gradients = value_and_grad(lambda model: jnp.sum(jnp.sin(model(x))))(model)
    np.testing.assert_allclose(found, value, rtol=1e-6)
    gradient = gradients["layers"][0]["lora"]["kernel"].get_value()
    np.testing.assert_allclose(gradient.reshape(3, 4, 6), expected, rtol=1e-5, atol=1e-5)  # float32


def test_adapters_of_peft(tmp_path):
    """Saved by the names of their weights, and put back with the roles of their axes."""
    model = qwix.apply_lora_to_model(Model(), by_provider(module_path="query|dense"), X, rngs=nnx.Rngs(1))
    nnx.update(model, normal_like(3, nnx.state(model, nnx.LoRAParam)))
    state, y = nnx.state(model, nnx.LoRAParam), model(X)
    names = {"query/w": "attention.query", "dense/kernel": "mlp.dense"}
    save_adapter(tmp_path, oplora_jax.to_low_rank(state), names=names)
    nnx.update(model, jax.tree.map(jnp.zeros_like, state))
    assert jnp.abs(model(X) - y).max() > 1e-2
    nnx.update(model, oplora_jax.from_low_rank(load_adapter(tmp_path, names=names), state))
    np.testing.assert_array_equal(model(X), y)
    save_adapter(tmp_path, state)  # by names of its own: the weights' modules
    assert set(load_adapter(tmp_path)) == {"query/kernel", "dense/kernel"}


def test_dropout(x64):
    """The increments see the inputs that Qwix's dropout leaves; exact gradients are those of this pass."""
    x = normal(0, 2, 3, 8)
    model = qwix.apply_lora_to_model(Model(), by_provider(dropout=0.5), x, rngs=nnx.Rngs(1, dropout=2))
    nnx.update(model, normal_like(3, nnx.state(model, nnx.LoRAParam)))
    seeded = lambda: model.set_attributes(qwix_rngs=nnx.Rngs(dropout=4))
    loss = lambda model: jnp.sum(jnp.sin(model(x)))
    seeded()
    value, exact = value_and_grad(loss, "dense")(model)
    seeded()
    expected, of_factors = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
    assert value == expected
    seeded()
    assert abs(loss(model) - value) < 1e-9 < 1e-3 < abs(loss(model) - value)  # the same mask, then another
    trees = (nnx.state(model, nnx.LoRAParam), exact, of_factors)
    flat = (dict(nnx.to_flat_state(tree)).values() for tree in trees)
    for variables in zip(*flat, strict=True):
        p, g, expected = (variable.get_value() for variable in variables)
        chex.assert_trees_all_close(factor_gradients(p, g), expected, rtol=1e-10, atol=1e-12)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(8, param_dtype=x.dtype, name="dense")(jnp.tanh(x)), None


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
def test_layers_of_a_scan(axis, remat, x64):
    """Stacked along the first axis, or along another one by way of `add_lora`."""
    layer = nn.remat(Layer) if remat else Layer

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            scan = nn.scan(layer, variable_axes={"params": axis}, split_rngs={"params": True}, length=3)
            return scan(name="layers")(x, None)[0]

    x = normal(0, 5, 8)
    plain = Stack()
    params = plain.init(jax.random.key(0), x)["params"]
    model = qwix.apply_lora_to_model(plain, by_provider(module_path=".*dense"))
    params = linen.add_lora(model, jax.random.key(1), params, x)
    lora, put = take(params)
    assert [p.shape for p in lora.values()] == [(3, 8, 8) if axis == 0 else (1, 3, 8, 8)]
    loss = lambda params: jnp.sum(jnp.sin(plain.apply({"params": params}, x)))
    value, gradients = oplora_jax.value_and_grad(
        lambda lora: jnp.sum(jnp.sin(model.apply({"params": put(lora)}, x)))
    )(lora)
    merged = linen.merge(put(lora))
    if axis == 1:  # what init makes is refused: along that axis the factors are no matrices
        plain_init = model.init(jax.random.key(0), x)["params"]
        for merge in (linen.merge, lambda tree: oplora_jax.merge(params, oplora_jax.to_low_rank(tree))):
            with pytest.raises(ValueError, match=r"do not fit; .*linen.add_lora makes them so"):
                merge(plain_init)
    expected, by_kernel = jax.value_and_grad(loss)(merged)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    [gradient] = map(to_dense, gradients.values())
    by_kernel = jnp.moveaxis(by_kernel["layers"]["dense"]["kernel"], axis, 0)
    np.testing.assert_allclose(gradient.reshape(by_kernel.shape), by_kernel, rtol=1e-10, atol=1e-12)


def test_casts_in_a_scan():
    """A bfloat16 layer, whose parameters are float32: the weight is cast inside the scan."""

    class Cast(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(8, dtype=jnp.bfloat16, name="dense")(x), None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            scan = nn.scan(Cast, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            return scan(name="layers")(x, None)[0]

    plain, x = Stack(), normal(0, 5, 8, dtype=jnp.bfloat16)
    params = plain.init(jax.random.key(0), x)["params"]
    model = qwix.apply_lora_to_model(plain, by_provider(module_path=".*dense"))
    with_lora = linen.add_lora(model, jax.random.key(1), params, x)
    y = model.apply({"params": with_lora}, x)
    np.testing.assert_array_equal(y, plain.apply({"params": params}, x))
    lora, put = take(with_lora)
    with_lora = put(normal_like(2, lora))
    y, expected = (
        net.apply({"params": weights}, x).astype(jnp.float32)
        for net, weights in ((model, with_lora), (plain, linen.merge(with_lora)))
    )
    # Three layers, whose weights and products have 8 bits.
    np.testing.assert_allclose(y, expected, atol=0.03 * jnp.abs(expected).max())


def test_pretrained_weights_of_a_quantised_model():
    model = qwix.apply_lora_to_model(nn.Dense(4), by_provider("int8", ".*"))
    x, given = normal(0, 6, 8, dtype=jnp.float32), {"kernel": jnp.ones((8, 4)), "bias": jnp.zeros(4)}
    with pytest.raises(ValueError, match=r"kernel: .*quantise this one too, by qwix.quantize_params"):
        linen.add_lora(model, jax.random.key(0), given, x)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    params = linen.add_lora(model, jax.random.key(0), qwix.quantize_params(given, shapes), x)
    # Qwix's scale of int8 is the largest number / 127.5, so that ones become 127 / 127.5.
    y = model.apply({"params": params}, x)
    np.testing.assert_allclose(y, x @ jnp.ones((8, 4)), rtol=4e-3, atol=1e-6)


def test_on_a_mesh():
    """Factors lie as the axes of their weights; quantised ones too."""
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    for base in ("plain", "int8"):
        model = Model()
        model.query.w.set_value(
            jax.device_put(model.query.w[...], NamedSharding(mesh, P("model", "data", None)))
        )
        model = qwix.apply_lora_to_model(model, by_provider(base, "query"), X, rngs=nnx.Rngs(1))
        lora = model.query.lora["w"].get_value()
        assert (lora.a.sharding.spec, lora.b.sharding.spec) == (P("data"), P(None, "model"))


class Odd(nnx.Module):
    """Uses its weight otherwise than as it is."""

    def __init__(self, use):
        self.use, self.w = use, nnx.Param(normal(0, 8, 8))

    def __call__(self, x):
        return self.use(x, self.w[...])


ODD = {
    "transposed": lambda x, w: jnp.dot(x, w.T),
    "scaled": lambda x, w: jnp.dot(x, 2 * w),
    "normalised": lambda x, w: jnp.dot(x, w / jnp.linalg.norm(w)),
}


@pytest.mark.parametrize("use", ODD.values(), ids=ODD)
def test_weights_that_are_not_the_parameter(use):
    match = "layers/0/w: .* is not the weight itself, .*Leave the module out of module_path"
    x = jnp.ones((2, 8))
    model = nnx.Sequential(Odd(use))
    with pytest.raises(ValueError, match=match):
        qwix.apply_lora_to_model(model, by_provider(), x, rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match=match):
        nnx.jit(lambda model: qwix.apply_lora_to_model(model, by_provider(), x, rngs=nnx.Rngs(1)))(model)


def test_refusals():
    def apply(module, *x, **rule):
        x = x or (jnp.ones((2, 8)),)
        return qwix.apply_lora_to_model(nnx.Sequential(module), by_provider(**rule), *x, rngs=nnx.Rngs(1))

    with pytest.raises(ValueError, match=r"layers/0/w: rank is 2; a kernel \(8, 1\) takes 1 to 1"):
        apply(Weight("td,df->tf", 8, 1))
    with pytest.raises(ValueError, match="layers/0: the einsum 'td,df->t' is no matrix product"):
        apply(Weight("td,df->t", 8, 3))
    two_ways = lambda x, w: jnp.einsum("td,df->tf", x, w) + jnp.einsum("td,fd->tf", x, w)
    with pytest.raises(ValueError, match=r"layers/0/lora/w: .*If the module multiplies .* in two ways"):
        apply(Odd(two_ways))
    with pytest.raises(ValueError, match="layers/0: this LoRALinear has LoRA already"):
        apply(LoRALinear(8, 3, rank=2, rngs=nnx.Rngs(0)))
    model = apply(Branch())
    with pytest.raises(ValueError, match="layers/0/second/w: the call that qwix"):
        model(jnp.ones((2, 8)), True)


class Branch(nnx.Module):
    def __init__(self):
        self.first, self.second = (Weight("td,df->tf", 8, 8) for _ in range(2))

    def __call__(self, x, second=False):
        return (self.second if second else self.first)(x)


def test_a_weight_that_is_none_takes_no_lora():
    """Of products of activations, and of weights outside of the rules."""

    class Attention(nnx.Module):
        def __init__(self):
            self.q, self.k = (Weight("td,df->tf", 8, 8) for _ in range(2))

        def __call__(self, x):
            return jnp.einsum("tf,sf->ts", self.q(x), self.k(x))

    model = qwix.apply_lora_to_model(Attention(), by_provider(module_path="q"), X[0], rngs=nnx.Rngs(1))
    assert [path for path, _ in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))] == [("q", "lora", "w")]


class Scores(nn.Module):
    """Multiplies with its inputs, which may be of its weight's shape."""

    @nn.compact
    def __call__(self, x):
        return jnp.einsum("td,ds->ts", x @ self.param("w", nn.initializers.normal(), (8, 8)), x)


def test_an_array_of_a_weights_shape():
    """Traced, as where it is seen: what is multiplied with is the weight, or it is refused."""
    x = normal(0, 8, 8, dtype=jnp.float32)
    model = qwix.apply_lora_to_model(Scores(), by_provider())
    params = {"w": x + 1, "lora": {"w": LowRank(x[:, :2], x[:2], 3.0)}}
    loss = lambda params, x: model.apply({"params": params}, x).sum()
    calls = {
        "plain": loss,
        "jit": jax.jit(loss),
        "jit closed over": lambda params, x: jax.jit(lambda x: loss(params, x))(x),
        "grad": jax.grad(loss, 1),
        "vmap": lambda params, x: jax.vmap(lambda x: loss(params, x))(x[None]),
        "jit of vmap": jax.jit(lambda params, x: jax.vmap(lambda x: loss(params, x))(x[None])),
        "checkpoint": jax.checkpoint(loss),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=r"w: .* is not the weight itself, .* another batch size"):
            call(params, x)
            pytest.fail(name)


@pytest.mark.parametrize("count", [2, 3])
def test_weights_of_one_shape_that_are_cast(count):
    """Told apart by their values, where no trace does it."""

    class Chain(nnx.Module):
        def __init__(self):
            self.count = count
            for i in range(count):
                setattr(self, f"w{i}", nnx.Param(normal(i, 8, 8, dtype=jnp.float32)))

        def __call__(self, x):
            for i in range(self.count):
                x = jnp.einsum("td,df->tf", x, getattr(self, f"w{i}")[...].astype(jnp.bfloat16))
            return x

    x = X[0].astype(jnp.bfloat16)
    model = qwix.apply_lora_to_model(Chain(), by_provider(), x, rngs=nnx.Rngs(1))
    assert len(oplora_jax.to_low_rank(nnx.state(model, nnx.LoRAParam))) == count
    nnx.update(model, normal_like(3, nnx.state(model, nnx.LoRAParam)))
    np.testing.assert_array_equal(model(x), nnx.jit(lambda model: model(x))(model))
    equal = Chain()
    equal.w1.set_value(equal.w0[...])
    with pytest.raises(ValueError, match=r"the weights w0, w1 are equal, and cast: .*Put jax.jit"):
        qwix.apply_lora_to_model(equal, by_provider(), x, rngs=nnx.Rngs(1))


def test_weights_of_numpy():
    """As `flax.serialization.from_bytes` makes them."""
    model = qwix.apply_lora_to_model(Linen(), by_provider())
    params = model.init(jax.random.key(0), X)["params"]
    lora, put = take(params)
    state = serialization.to_bytes(put(lora))
    restored = serialization.from_bytes(params, state)
    assert isinstance(restored["query"]["w"], np.ndarray)
    values = []
    for place in (put, take(restored)[1]):
        loss = lambda lora, put=place: model.apply({"params": put(lora)}, X).sum()
        values.append((loss(lora), *oplora_jax.value_and_grad(loss)(lora)))
    chex.assert_trees_all_close(*values, rtol=1e-6)  # two programs


def test_a_second_provider():
    """LoRA that the first one made stays in use, as it is, or the model is refused."""

    def apply(model, **rules):
        rules = [qwix.LoraRule(module_path=path, rank=rank, alpha=4 * rank) for path, rank in rules.items()]
        return qwix.apply_lora_to_model(model, LoraProvider(rules), X, rngs=nnx.Rngs(1))

    model = apply(Model(), dense=2)
    with pytest.raises(
        ValueError, match="dense: this Linear has LoRA of an earlier provider, which the rules"
    ):
        apply(model, query=2)
    with pytest.raises(
        ValueError, match=r"dense/kernel: .* of rank 2 and scale 4.0 already; the rule says rank 3"
    ):
        apply(model, dense=3)
    model = apply(model, dense=2, query=3)
    assert set(oplora_jax.to_low_rank(nnx.state(model, nnx.LoRAParam))) == {"dense/kernel", "query/w"}


def test_modules_that_take_no_parameters():
    """Within JAX's own transformations, and layers with LoRA of their own."""

    class Mapped(nnx.Module):
        def __init__(self, vmap):
            self.vmap, self.dense = vmap, nnx.Linear(8, 4, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.vmap(self.dense, x)

    def apply(vmap):
        return qwix.apply_lora_to_model(Mapped(vmap), by_provider(), X, rngs=nnx.Rngs(1))

    with pytest.raises(ValueError, match=r"dense/kernel: .* Put Flax's in its place, such as nnx.vmap"):
        apply(lambda dense, x: jax.vmap(dense)(x))
    model = apply(lambda dense, x: nnx.vmap(lambda dense, x: dense(x), in_axes=(None, 0))(dense, x))
    assert model.dense.lora["kernel"].shape == (8, 4)

    class Own(nn.Module):
        @nn.compact
        def __call__(self, x):
            return linen.LoRADense(4, rank=2)(x)

    with pytest.raises(ValueError, match="LoRADense_0: this LoRADense has LoRA of its own; leave it out"):
        qwix.apply_lora_to_model(Own(), by_provider()).init(jax.random.key(0), X)


def test_implicit_einsums(x64):
    """Outputs that are not written are in the alphabet's order."""
    x = normal(0, 2, 3, 8)
    model = nnx.Sequential(Weight("...d,dba", 8, 2, 5))
    model = qwix.apply_lora_to_model(model, by_provider(), x, rngs=nnx.Rngs(1))
    nnx.update(model, normal_like(3, nnx.state(model, nnx.LoRAParam)))
    layer = model.layers[0]
    kernel = add_increment(layer.w[...], layer.lora["w"].get_value())
    np.testing.assert_allclose(model(x), np.einsum("...d,dba", x, kernel), rtol=1e-12)


def test_matmul(x64):
    """`@` is a compiled function of JAX, into which Qwix looks with `disable_jit`."""
    x = normal(0, 2, 8)
    model = nnx.Sequential(Odd(lambda x, w: x @ w))
    model = qwix.apply_lora_to_model(model, by_provider(disable_jit=True), x, rngs=nnx.Rngs(1))
    nnx.update(model, normal_like(3, nnx.state(model, nnx.LoRAParam)))
    layer = model.layers[0]
    kernel = layer.w[...] + to_dense(layer.lora["w"].get_value())
    np.testing.assert_allclose(model(x), x @ kernel, rtol=1e-12)
    _, gradients = nnx.jit(value_and_grad(lambda model: jnp.sum(jnp.sin(model(x)))))(model)
    gradient = gradients["layers"][0]["lora"]["w"].get_value()
    np.testing.assert_allclose(to_dense(gradient), x.T @ jnp.cos(x @ kernel), rtol=1e-10)


def test_training():
    """`nnx.Optimizer`, compiled; the loss falls by as much as with merged weights."""
    x, y = normal(0, 16, 3, 8, dtype=jnp.float32), normal(1, 3, 16, 3, 5, dtype=jnp.float32)
    model = qwix.apply_lora_to_model(Model(), by_provider("int8"), x, rngs=nnx.Rngs(1))
    optimizer = nnx.Optimizer(model, oplora_jax.oplora(0.05), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model, optimizer):
        loss, gradients = value_and_grad(lambda model: jnp.mean((model(x) - y) ** 2))(model)
        optimizer.update(model, gradients)
        return loss

    losses = [step(model, optimizer) for _ in range(20)]
    assert losses[-1] < 0.8 * losses[0]


def test_what_is_not_public_in_qwix():
    """Each name of Qwix's own that oplora_jax/qwix.py uses: what it needs of it."""
    assert list(inspect.signature(flax_util.find_param).parameters) == ["x", "ptq_array_type"]
    rule = inspect.signature(qwix.LoraProvider._get_current_rule_and_op_id).parameters
    assert list(rule) == ["self", "op_name", "only_rule", "repeated_call"]
    model = qwix.apply_lora_to_model(
        nnx.Sequential(Weight("btd,df->btf", 8, 8)), by_provider("int8"), X, rngs=nnx.Rngs(1)
    )
    assert isinstance(model.layers[0].w, WithAux) and isinstance(model.layers[0].w.array, qwix.QArray)
    assert model.layers[0].qwix_path == ("layers", 0) and model.layers[0].qwix_rngs is None
    for name in ("get_current_module", "get_current_module_path", "make_rng", "unbox"):
        assert callable(getattr(flax_util, name))


def test_linen_on_a_mesh():
    """`add_lora` lays the factors beside the axes of their weights."""
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    params = Linen().init(jax.random.key(0), X)["params"]
    place = lambda z, *spec: jax.device_put(z, NamedSharding(mesh, P(*spec)))
    params["query"]["w"] = place(params["query"]["w"], "model", "data", None)
    params["mlp"]["linear"] = place(params["mlp"]["linear"], "data", "model")
    model = qwix.apply_lora_to_model(Linen(), by_provider())
    params = linen.add_lora(model, jax.random.key(1), params, X)
    for lora, specs in (
        (params["query"]["lora"]["w"], (P("data"), P(None, "model"))),
        (params["mlp"]["lora"]["linear"], (P("data"), P(None, "model"))),
    ):
        assert (lora.a.sharding.spec, lora.b.sharding.spec) == specs
