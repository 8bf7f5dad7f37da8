"""Every layer, in both APIs: Flax's own with merged weights is the judge of values and gradients."""

import types
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import oplora_jax
from oplora_jax import LowRank, OuterProduct, linen, to_dense
from oplora_jax import nnx as lora_nnx
from tests.arrays import normal


class Case(NamedTuple):
    """One layer: the shape of its inputs, its arguments in both APIs, and its kernel as a matrix."""

    kind: str
    x: tuple[int, ...]
    linen: tuple[Any, ...]
    nnx: tuple[Any, ...]
    options: Any = types.MappingProxyType({})
    matrix: Any = lambda k: k.reshape(-1, k.shape[-1])
    nnx_options: Any = types.MappingProxyType({})
    linen_options: Any = types.MappingProxyType({})


MASK = (np.arange(3 * 4 * 6) % 3 > 0).reshape(3, 4, 6).astype(np.float32)

DENSE = {
    "dense": Case("Dense", (5, 3, 4), (6,), (4, 6)),
    "no bias": Case("Dense", (4,), (6,), (4, 6), {"use_bias": False}),
    "heads": Case("DenseGeneral", (5, 3, 4), ((2, 3),), (4, (2, 3)), matrix=lambda k: k.reshape(4, 6)),
    "several axes": Case(
        "DenseGeneral",
        (2, 5, 3),
        ((4, 2),),
        ((2, 3), (4, 2)),
        {"axis": (-1, 0)},
        lambda k: k.reshape(6, 8),
    ),
    "batch axes": Case(
        "DenseGeneral",
        (2, 5, 4),
        (3,),
        (4, 3),
        {},
        lambda k: k,
        {"batch_axis": {0: 2}},
        {"batch_dims": 0},
    ),
    "einsum": Case(
        "Einsum",
        (2, 5, 4),
        ((3, 4, 2), "btd,ndh->tbnh"),
        ("btd,ndh->tbnh", (3, 4, 2)),
        {},
        lambda k: k.transpose(1, 0, 2).reshape(4, 6),
        {"bias_shape": (3, 2)},
    ),
    "einsum over heads": Case(
        "Einsum",
        (2, 5, 3, 2),
        ((3, 2, 4), "...nh,nhd->...d"),
        ("...nh,nhd->...d", (3, 2, 4)),
        {},
        lambda k: k.reshape(6, 4),
        {"bias_shape": (4,)},
    ),
    "einsum of experts": Case(
        "Einsum",
        (5, 2, 4),
        ((4, 2, 3), "ted,deh->teh"),
        ("ted,deh->teh", (4, 2, 3)),
        {},
        lambda k: k.transpose(1, 0, 2),
        {"bias_shape": (2, 3)},
    ),
}

CONVOLUTIONS = {
    "strides": Case(
        "Conv", (2, 7, 6, 2), (4, (3, 2)), (2, 4, (3, 2)), {"strides": (2, 1), "padding": "VALID"}
    ),
    "groups": Case("Conv", (2, 6, 4), (6, 3), (4, 6, 3), {"feature_group_count": 2}),
    "circular": Case(
        "Conv", (2, 6, 4), (3, (3,)), (4, 3, (3,)), {"padding": "CIRCULAR", "kernel_dilation": 2}
    ),
    "causal": Case("Conv", (6, 4), (3, (3,)), (4, 3, (3,)), {"padding": "CAUSAL", "use_bias": False}),
    "mask": Case("Conv", (2, 6, 4), (6, (3,)), (4, 6, (3,)), {"mask": MASK, "padding": ((1, 2),)}),
    "transposed": Case(
        "ConvTranspose", (2, 4, 4, 3), (5, (2, 2)), (3, 5, (2, 2)), {"strides": (2, 2), "padding": "VALID"}
    ),
    "transposed kernel": Case(
        "ConvTranspose",
        (2, 4, 3),
        (5, (2,)),
        (3, 5, (2,)),
        {"transpose_kernel": True},
        lambda k: k.transpose(0, 2, 1).reshape(6, 5),
    ),
}
CASES = {**DENSE, **CONVOLUTIONS}
each = pytest.mark.parametrize("name", CASES)


def at_work(lora):
    """Factors that are all at work: b is zero at the start."""
    return lora.with_factors(normal(1, *lora.a.shape), normal(2, *lora.b.shape))


def summed(y):
    return jnp.sum(jnp.sin(y))


def kinds(name):
    return ("dense", "outer") if name in DENSE else ("dense",)


def check(name, lora, kernels, outputs, gradients, kernel_gradient):
    """The increment, the outputs and the captured gradients are those of merged weights; in float64."""
    matrix = CASES[name].matrix
    expected = lora.scale * np.asarray(lora.a) @ np.asarray(lora.b)
    close = lambda got, expected: np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-10)
    close(matrix(kernels[1]) - matrix(kernels[0]), expected)
    close(*outputs)
    for kind, gradient in zip(kinds(name), gradients, strict=True):
        assert isinstance(gradient, OuterProduct) == (kind == "outer")
        close(jax.jit(to_dense)(gradient), matrix(kernel_gradient))


@each
def test_linen(name, x64):
    case = CASES[name]
    options = {"param_dtype": jnp.float64, **case.options, **case.linen_options}
    layer = getattr(linen, f"LoRA{case.kind}")(*case.linen, **options, rank=2, alpha=3.0)
    plain = getattr(nn, case.kind)(*case.linen, **options)
    x = normal(0, *case.x)
    params = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
    params = {k: at_work(z) if k == "lora" else normal(3, *z.shape) for k, z in params.items()}

    @jax.jit
    def run(params):
        loss = lambda params: summed(layer.apply({"params": params}, x))
        plain_loss = lambda params: summed(plain.apply({"params": params}, x))
        merged = linen.merge(params)
        outputs = layer.apply({"params": params}, x), plain.apply({"params": merged}, x)
        gradients = [oplora_jax.grad(loss, kind)(params)["lora"] for kind in kinds(name)]
        return merged, outputs, gradients, jax.grad(plain_loss)(merged)

    merged, outputs, gradients, expected = run(params)
    assert set(merged) == set(params) - {"lora"}
    check(name, params["lora"], (params["kernel"], merged["kernel"]), outputs, gradients, expected["kernel"])


NNX_NAMES = {"Dense": "Linear", "DenseGeneral": "LinearGeneral"}


@each
def test_nnx(name, x64):
    case = CASES[name]
    options = {"param_dtype": jnp.float64, **case.options, **case.nnx_options}
    kind = NNX_NAMES.get(case.kind, case.kind)
    layer_class, plain_class = getattr(lora_nnx, f"LoRA{kind}"), getattr(nnx, kind)
    layer = nnx.eval_shape(lambda: layer_class(*case.nnx, 2, alpha=3.0, rngs=nnx.Rngs(0), **options))
    for name_, variable in vars(layer).items():
        if isinstance(variable, nnx.Variable):
            value = variable.get_value()
            variable.set_value(at_work(value) if name_ == "lora" else normal(3, *value.shape))
    if name == "mask":
        layer.mask = jnp.asarray(MASK)
    x = normal(0, *case.x)

    @nnx.jit
    def run(layer):
        loss = lambda layer: summed(layer(x))
        merged = lora_nnx.merge(layer)
        gradients = [
            lora_nnx.value_and_grad(loss, kind)(layer)[1]["lora"].get_value() for kind in kinds(name)
        ]
        return merged, (layer(x), merged(x)), gradients, nnx.grad(loss)(merged)["kernel"].get_value()

    merged, outputs, gradients, expected = run(layer)
    assert type(merged) is plain_class
    kernels = layer.kernel.get_value(), merged.kernel.get_value()
    check(name, layer.lora.get_value(), kernels, outputs, gradients, expected)


@pytest.mark.parametrize("name", ["heads", "strides"])
def test_layers_start_like_flax(name):
    """The same kernel and bias from the same key, and no increment yet."""
    case, x = CASES[name], normal(0, *CASES[name].x, dtype=jnp.float32)
    init = nn.initializers.normal()
    layer = getattr(linen, f"LoRA{case.kind}")(*case.linen, **case.options, bias_init=init, rank=2)
    plain = getattr(nn, case.kind)(*case.linen, **case.options, bias_init=init)
    params, expected = (z.init(jax.random.key(0), x)["params"] for z in (layer, plain))
    assert params["lora"].a.all() and not params["lora"].b.any()
    chex.assert_trees_all_equal({k: z for k, z in params.items() if k != "lora"}, expected)
    chex.assert_trees_all_equal(layer.apply({"params": params}, x), plain.apply({"params": expected}, x))
    kind = NNX_NAMES.get(case.kind, case.kind)
    layer = getattr(lora_nnx, f"LoRA{kind}")(*case.nnx, 2, rngs=nnx.Rngs(0), **case.options)
    chex.assert_trees_all_equal(layer(x), getattr(nnx, kind)(*case.nnx, rngs=nnx.Rngs(0), **case.options)(x))
    assert layer.lora.get_value().a.all()


@pytest.mark.parametrize(
    ("dtype", "param_dtype", "out"),
    [
        (None, jnp.float32, jnp.float32),
        (jnp.bfloat16, jnp.float32, jnp.bfloat16),
        (None, jnp.bfloat16, jnp.float32),
        (jnp.float32, jnp.bfloat16, jnp.float32),
    ],
)
@pytest.mark.parametrize("name", ["heads", "circular"])
def test_types(name, dtype, param_dtype, out):
    """Outputs have the type that Flax's have, LoRA parameters that of the kernel."""
    case = CASES[name]
    types = {"dtype": dtype, "param_dtype": param_dtype}
    layer = getattr(linen, f"LoRA{case.kind}")(*case.linen, **types, **case.options, rank=2)
    x = normal(0, *case.x, dtype=jnp.float32)
    params = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
    assert {params["lora"].a.dtype, params["lora"].b.dtype} == {jnp.dtype(param_dtype)}
    params = jax.tree.map(lambda z: normal(4, *z.shape, dtype=z.dtype), params)
    kind = NNX_NAMES.get(case.kind, case.kind)
    make = lambda: getattr(lora_nnx, f"LoRA{kind}")(*case.nnx, 2, rngs=nnx.Rngs(0), **types, **case.options)
    nnx_layer = nnx.eval_shape(make)
    for key, value in params.items():
        chex.assert_trees_all_equal_shapes_and_dtypes(getattr(nnx_layer, key).get_value(), value)
        getattr(nnx_layer, key).set_value(value)
    wide = lambda tree: jax.tree.map(lambda z: z.astype(jnp.float32), tree)
    plain = getattr(nn, case.kind)(*case.linen, **case.options)
    expected = jax.jit(lambda params: plain.apply({"params": linen.merge(wide(params))}, x))(params)
    # Sums of 4 to 12 products of normal numbers, each rounded to 8 bits in bfloat16.
    tolerance = 1e-5 if dtype is None and param_dtype == jnp.float32 else 0.1
    for y in jax.jit(lambda params: (layer.apply({"params": params}, x), nnx_layer(x)))(params):
        assert y.dtype == out
        chex.assert_trees_all_close(y.astype(jnp.float32), expected, rtol=tolerance, atol=tolerance)


def test_options_reach_the_base():
    """A dot_general of the user's sees the kernel alone; promote_dtype and precision are kept."""
    seen = []

    def dot_general(x, kernel, dimensions, precision=None, **kwargs):
        seen.append((kernel.shape, precision))
        return 3 * jax.lax.dot_general(x, kernel, dimensions, precision=precision)

    layer = lora_nnx.LoRALinear(
        4, 6, 2, dot_general=dot_general, precision="highest", use_bias=False, rngs=nnx.Rngs(0)
    )
    layer.lora.set_value(LowRank(jnp.ones((4, 2)), jnp.ones((2, 6)), 0.5))
    x = normal(0, 5, 4, dtype=jnp.float32)
    expected = 3 * x @ layer.kernel[...] + x @ jnp.ones((4, 6))
    chex.assert_trees_all_close(layer(x), expected, rtol=1e-5, atol=1e-5)  # float32, sums of 4
    assert seen == [((4, 6), "highest")]
    with pytest.raises(TypeError, match="stride"):
        lora_nnx.LoRALinear(4, 6, 2, stride=2, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("kind", ["outer", "dense"])
def test_precision_is_that_of_every_product(kind):
    """The layer's own and the increment's, forward and backward, and the captured gradient's."""
    x = jnp.ones((5, 4))
    layer = lora_nnx.LoRALinear(4, 6, 2, precision="highest", rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(layer)
    model = linen.loraize(nn.DenseGeneral((2, 3), precision="highest"), 2, "*")
    params = model.init(jax.random.key(0), x)["params"]
    apply = {
        "nnx": lambda params, x: nnx.merge(graphdef, params)(x),
        "linen": lambda params, x: model.apply({"params": params}, x),
        "lora_dot": lambda p, x: oplora_jax.lora_dot(x, jnp.ones((4, 6)), p, precision="highest"),
        # The layer says nothing: the context does, which is over when the products are traced.
        "context": jax.default_matmul_precision("highest")(
            lambda p, x: oplora_jax.lora_dot(x, jnp.ones((4, 6)), p)
        ),
    }
    lora = LowRank(jnp.ones((4, 2)), jnp.ones((2, 6)))
    trees = {"nnx": state, "linen": params, "lora_dot": lora, "context": lora}
    for name, tree in trees.items():
        loss = lambda tree, x, name=name: jnp.sum(jnp.sin(apply[name](tree, x)))
        step = lambda tree, x, loss=loss: (
            oplora_jax.value_and_grad(loss, kind)(tree, x),
            jax.grad(loss, argnums=(0, 1))(tree, x),
        )
        products = [line for line in jax.jit(step).lower(tree, x).as_text().splitlines() if "dot_gen" in line]
        # Forward x W, x a and its product with b, or merged weights; and backward.
        assert len(products) >= 6
        assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)


def test_factors_of_a_type_of_their_own():
    """Float32 over a bfloat16 model, whose outputs stay what they were."""
    x = jnp.ones((5, 4), jnp.bfloat16)
    model = linen.loraize(nn.Dense(6, param_dtype=jnp.bfloat16), 2, "*", dtype=jnp.float32)
    params = model.init(jax.random.key(0), x)["params"]
    layer = nnx.Linear(4, 6, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    lora_nnx.loraize(layer, 2, "*", dtype=jnp.float32, rngs=nnx.Rngs(0))
    for lora, kernel, y in [
        (params["lora"], params["kernel"], model.apply({"params": params}, x)),
        (layer.lora.get_value(), layer.kernel.get_value(), layer(x)),
    ]:
        assert (lora.a.dtype, lora.b.dtype) == (jnp.float32, jnp.float32)
        assert (kernel.dtype, y.dtype) == (jnp.bfloat16, jnp.bfloat16)


def test_sharding_metadata_is_kept():
    init = nnx.with_partitioning(nnx.initializers.normal(), ("embed", "mlp"), eager_sharding=False)
    layer = lora_nnx.LoRALinear(4, 6, 2, kernel_init=init, rngs=nnx.Rngs(0))
    assert lora_nnx.merge(layer).kernel.get_metadata() == layer.kernel.get_metadata()
    init = nn.with_partitioning(nn.initializers.normal(), ("embed", "mlp"))
    x = jnp.ones((1, 4))
    params = linen.LoRADense(6, rank=2, kernel_init=init).init(jax.random.key(0), x)["params"]
    merged = linen.merge(params)["kernel"]
    assert merged.names == params["kernel"].names and merged.value.shape == (4, 6)
    model = linen.loraize(nn.Dense(6, kernel_init=init), 2, "*")
    for pretrained in (
        {"kernel": merged, "bias": jnp.zeros(6)},
        {"kernel": merged.value, "bias": jnp.zeros(6)},
    ):
        params = linen.add_lora(model, jax.random.key(1), pretrained, x)
        assert type(params["kernel"]) is type(pretrained["kernel"])
        y = model.apply({"params": params}, x)
        chex.assert_trees_all_close(y, x @ merged.value, rtol=1e-5, atol=1e-6)  # float32


def test_ranks_and_einsums_that_do_not_fit():
    x = jnp.ones((2, 5, 4))
    with pytest.raises(ValueError, match=r"rank is 5.*\(4, 6\).*1 to 4"):
        jax.eval_shape(linen.LoRADense(6, rank=5).init, jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"rank is 4.*\(12, 3\).*1 to 3"):
        jax.eval_shape(linen.LoRAConv(3, (3,), rank=4).init, jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"rank is 0.*\(4, 6\)"):
        lora_nnx.LoRALinear(4, 6, 0, rngs=nnx.Rngs(0))
    for equation, shape in {"btd,td->btd": (5, 4), "btd,dhe->bth": (4, 2, 3), "bbd,dh->bdh": (4, 2)}.items():
        with pytest.raises(ValueError, match=f"einsum '{equation}'"):
            nnx.eval_shape(lambda e=equation, s=shape: lora_nnx.LoRAEinsum(e, s, 1, rngs=nnx.Rngs(0)))
    # The kernel's roles are swapped, and it is still (4, 4): merged weights would be other ones.
    layer = lora_nnx.LoRAEinsum("btd,dh->bth", (4, 4), 1, rngs=nnx.Rngs(0))
    swapped = nnx.Sequential(nnx.Einsum("btd,hd->bth", (4, 4), rngs=nnx.Rngs(0)))
    lora_nnx.loraize(swapped, 1, "layers/0", rngs=nnx.Rngs(1))
    for call in (
        lambda: layer(x, "btd,hd->bth"),
        lambda: nnx.jit(lambda layer: layer(x, einsum_str="btd,hd->bth"))(layer),
        lambda: swapped.layers[0](x, "btd,dh->bth"),
    ):
        with pytest.raises(
            ValueError, match=r"the einsum 'btd,\w\w->bth' takes the kernel's axes as .* has roles="
        ):
            call()
    assert layer(x, "btd,dh->tbh").shape == (5, 2, 4)  # the same matrix
    layer = lora_nnx.LoRAEinsum("btd,dh->bth", (4, 3), 1, rngs=nnx.Rngs(0))
    with pytest.raises(
        ValueError, match=r"'btd,hd->bth' takes the kernel \(4, 3\).*LoRA parameter is \(4, 3\)"
    ):
        layer(jnp.ones((2, 5, 3)), "btd,hd->bth")


def test_linen_einsum_given_at_the_call(x64):
    x = normal(0, 2, 5, 4)
    layer = linen.LoRAEinsum((3, 4, 2), rank=2, use_bias=False, param_dtype=jnp.float64)
    equation = "btd,ndh->btnh"
    params = jax.jit(lambda key: layer.init(key, x, equation))(jax.random.key(0))["params"]
    params["lora"] = at_work(params["lora"])
    run = lambda params: (
        layer.apply({"params": params}, x, equation),
        jnp.einsum(equation, x, linen.merge(params)["kernel"]),
    )
    chex.assert_trees_all_close(*jax.jit(run)(params), rtol=1e-12, atol=1e-12)


def test_merge_errors():
    with pytest.raises(ValueError, match="no LoRA parameter"):
        linen.merge({"kernel": jnp.ones((4, 6))})
    with pytest.raises(ValueError, match="no LoRA layer"):
        lora_nnx.merge(nnx.Linear(4, 6, rngs=nnx.Rngs(0)))
    lora = LowRank(jnp.ones((4, 1)), jnp.ones((1, 6)))
    with pytest.raises(ValueError, match="layer: there is no kernel"):
        linen.merge({"layer": {"lora": lora}})
    with pytest.raises(ValueError, match=r"layer/lora: the kernel is \(6, 4\)"):
        linen.merge({"layer": {"lora": lora, "kernel": jnp.ones((6, 4))}})
    with pytest.raises(ValueError, match=r"layer/lora: .*\(4, 6\).*'oi'"):
        lora = LowRank(lora.a, lora.b, roles="oi")
        linen.merge({"layer": {"lora": lora, "kernel": jnp.ones((4, 6))}})
