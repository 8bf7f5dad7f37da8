"""LoRA parameters beside a model that stays untouched."""

import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import oplora_jax
import oplora_jax.linen
import oplora_jax.nnx
from oplora_jax import LowRank, init_lora, merge, to_dense

PARAMS = {
    "layer_0": {"query": {"kernel": jnp.ones((4, 6)), "bias": jnp.zeros(6)}},
    "layer_1": {"query": {"kernel": jnp.ones((4, 6)), "bias": jnp.zeros(6)}},
    "conv": {"kernel": jnp.ones((3, 3, 2, 8), jnp.bfloat16)},
    "steps": jnp.zeros((2, 2), jnp.int32),
}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("query", ["layer_0/query/kernel", "layer_1/query/kernel"]),
        ("layer_0/*", ["layer_0/query/kernel"]),
        ("*/kernel", ["conv/kernel", "layer_0/query/kernel", "layer_1/query/kernel"]),
        (re.compile(r"layer_\d+/query"), ["layer_0/query/kernel", "layer_1/query/kernel"]),
        (["conv", "layer_1"], ["conv/kernel", "layer_1/query/kernel"]),
        (["conv", re.compile("1/.*kernel$")], ["conv/kernel", "layer_1/query/kernel"]),
        ("layer_?/query/*", ["layer_0/query/kernel", "layer_1/query/kernel"]),
        ("layer_[1-9]/*", ["layer_1/query/kernel"]),
        ("conv/kernel", ["conv/kernel"]),
    ],
)
def test_patterns(targets, expected):
    lora = init_lora(jax.random.key(0), PARAMS, 2, targets)
    assert sorted(lora) == expected


NAMES = [
    *("head/out", "multihead/query", "layers/0", "layers/10", "sublayers_norm", "layers_norm/dense"),
    *("dense_1/w", "w[0]", "a.b"),
]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        # A glob is one for the whole path, and "*" stands for slashes too.
        ("head/*", ["head/out"]),
        ("layers/*", ["layers/0", "layers/10"]),
        ("layers/?", ["layers/0"]),
        ("*head/*", ["head/out", "multihead/query"]),
        ("*e*/*0", ["layers/0", "layers/10"]),
        # Without a wildcard it is whole components, anywhere.
        ("head", ["head/out"]),
        ("out", ["head/out"]),
        ("layers", ["layers/0", "layers/10"]),
        ("dense", ["layers_norm/dense"]),
        ("0", ["layers/0"]),
        ("w[0]", ["w[0]"]),
        ("a.b", ["a.b"]),
        # A regular expression is found anywhere.
        (re.compile("head/"), ["head/out", "multihead/query"]),
        (re.compile("^(head|layers)/"), ["head/out", "layers/0", "layers/10"]),
        (["head", re.compile("HEAD", re.IGNORECASE)], ["head/out", "multihead/query"]),
    ],
    ids=str,
)
def test_what_a_pattern_means(targets, expected):
    lora = init_lora(jax.random.key(0), {name: jnp.ones((2, 2)) for name in NAMES}, 1, targets)
    assert list(lora) == sorted(expected)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("targets", [None, 3, [None]])
def test_targets_that_are_no_patterns(targets):
    with pytest.raises(ValueError, match=r"targets is .*; expected a path, a glob or a re.compile"):
        init_lora(jax.random.key(0), {"k": jnp.ones((4, 4))}, 2, targets)


def test_every_pattern_matches_something():
    params = {f"layers_{i}": {name: jnp.ones((2, 2)) for name in ("query", "value")} for i in range(20)}
    with pytest.raises(
        ValueError, match=r"'qurey'; of 40 paths the closest are: 'layers_\d+/query'"
    ) as error:
        init_lora(jax.random.key(0), params, 1, ["value", "qurey"])
    assert "value" not in str(error.value)
    with pytest.raises(ValueError, match=r"'layers_7/valeu'; .*closest are: 'layers_7/value'"):
        init_lora(jax.random.key(0), params, 1, "layers_7/valeu")
    with pytest.raises(ValueError, match=r"'quer\*'; a glob is for the whole path: '\*/quer\*' would; "):
        init_lora(jax.random.key(0), params, 1, "quer*")
    with pytest.raises(ValueError, match=r"'query\|value'; as a regular .*: re.compile\('query\|value'\)"):
        init_lora(jax.random.key(0), params, 1, ["query", "query|value"])
    with pytest.raises(ValueError, match=r"no kernel matches re.compile\('Query'\).*'layers_\d+/query'"):
        init_lora(jax.random.key(0), params, 1, re.compile("Query"))
    with pytest.raises(ValueError, match=r"no kernel matches '\(query'; of 40"):
        init_lora(jax.random.key(0), params, 1, "(query")
    with pytest.raises(ValueError, match=r"targets is \[\]; expected a path, a glob or a re.compile"):
        init_lora(jax.random.key(0), params, 1, [])


def test_start_shapes_scale_and_types():
    lora = init_lora(jax.random.key(0), PARAMS, 2, "kernel", alpha=8)
    assert lora["conv/kernel"].shape == (18, 8)  # all axes but the last are inputs
    assert lora["conv/kernel"].a.dtype == jnp.bfloat16
    assert {p.scale for p in lora.values()} == {4.0}
    assert not any(p.b.any() for p in lora.values())
    chex.assert_trees_all_equal(merge(PARAMS, lora), PARAMS)
    first, second = (lora[f"layer_{i}/query/kernel"].a for i in range(2))
    assert (first != second).any()


NARROW = [jnp.int8, jnp.uint8, jnp.int32, jnp.bool_, jnp.int4, jnp.float8_e4m3fn, jnp.float8_e5m2]


def name_of(value):
    return getattr(value, "__name__", str(value))


@pytest.mark.parametrize("dtype", NARROW, ids=name_of)
@pytest.mark.parametrize("shape", [(4, 6), (3, 4, 6), (2, 2, 2, 6)])
@pytest.mark.parametrize("jitted", [False, True])
def test_nothing_is_merged_into_codes(dtype, shape, jitted):
    """Nor into a type that rounds to 3 bits; nor does LoRA begin beside codes."""
    params = {"layer": {"kernel": jnp.ones(shape, dtype), "other": jnp.ones((4, 6))}}
    batch = shape[:1] if len(shape) == 3 else ()
    n = 8 if len(shape) == 4 else 4
    lora = {"layer/kernel": LowRank(jnp.ones((*batch, n, 2)), jnp.ones((*batch, 2, 6)))}
    layer = {"kernel": params["layer"]["kernel"], "lora": lora["layer/kernel"]}
    uses = {
        "merge": lambda: merge(params, lora),
        "gradient": lambda: oplora_jax.grad(lambda p: jnp.sum(merge(params, p)["layer"]["kernel"] * 1.0))(
            lora
        ),
        "restart": lambda: oplora_jax.merge_and_restart(jax.random.key(0), params, lora),
        "layers": lambda: oplora_jax.merge_and_restart_layers(jax.random.key(0), {"layer": layer}),
        "linen": lambda: oplora_jax.linen.merge({"layer": layer}),
    }
    for use in uses.values():
        with pytest.raises(
            ValueError, match=rf"layer/(kernel|lora): the kernel is {name_of(dtype)}.*dequantise.*apart"
        ):
            (jax.jit(use) if jitted else use)()
    for targets in ("layer/kernel", ["other", "kernel"], "*"):
        with pytest.raises(
            ValueError, match=r"layer/kernel: .*(Dequantise it first|expected dtype=jnp.float32)"
        ):
            init_lora(jax.random.key(0), params, 2, targets, batch_axes=len(batch))
    assert list(init_lora(jax.random.key(0), params, 2, "other")) == ["layer/other"]


def test_beside_a_float8_kernel_in_a_type_of_its_own():
    params = {"kernel": jnp.ones((4, 6), jnp.float8_e4m3fn)}
    assert (
        init_lora(jax.random.key(0), params, 2, "kernel", dtype=jnp.bfloat16)["kernel"].dtype == jnp.bfloat16
    )
    for dtype in (jnp.int8, jnp.float8_e4m3fn, jnp.bool_):
        with pytest.raises(
            ValueError, match=rf"kernel: dtype is {name_of(dtype)}.*; expected dtype=jnp.float32"
        ):
            init_lora(jax.random.key(0), {"kernel": jnp.ones((4, 6))}, 2, "kernel", dtype=dtype)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_merging_into_narrower_kernels_rounds_once(dtype):
    kernel, p = jnp.full((4, 6), 3, dtype), LowRank(jnp.ones((4, 2)), jnp.full((2, 6), 0.1), 1.5)
    merged = merge({"kernel": kernel}, {"kernel": p})["kernel"]
    assert merged.dtype == dtype
    # 3.3 in the kernel's type, of a sum in float32
    np.testing.assert_array_equal(merged, jnp.float32(3 + np.float32(0.3)).astype(dtype))


NUMBERS = [0, -1, 0.0, float("nan"), float("inf"), -np.inf, np.nan, True, np.float32(0), jnp.inf]
ARRAYS = [jnp.ones(1), jnp.ones((2, 2)), jnp.asarray(0), np.asarray(-1.0), jnp.asarray(True)]
TAKEN = [8, 8.0, np.float32(8), np.float64(8), np.int32(8), np.asarray(8.0), jnp.float32(8), jnp.bfloat16(8)]


def with_lora(rank, alpha):
    """LoRA parameters of all that takes a rank and an alpha, by what it is."""
    kernel, x, key = {"kernel": jnp.ones((4, 6))}, jnp.ones((1, 4)), jax.random.key(0)
    settings = {"rank": rank, "alpha": alpha}

    def loraized():
        model = nnx.Linear(4, 6, rngs=nnx.Rngs(0))
        oplora_jax.nnx.loraize(model, targets="*", rngs=nnx.Rngs(0), **settings)
        return model.lora.get_value()

    conv = lambda: oplora_jax.nnx.LoRAConv(1, 6, (2, 2), rngs=nnx.Rngs(0), **settings)
    return {
        "init_lora": lambda: init_lora(key, kernel, targets="*", **settings)["kernel"],
        "nnx.loraize": loraized,
        "nnx.LoRAConv": lambda: conv().lora.get_value(),
        "linen.LoRADense": lambda: oplora_jax.linen.LoRADense(6, **settings).init(key, x)["params"]["lora"],
        "linen.loraize": lambda: oplora_jax.linen.loraize(nn.Dense(6), targets="*", **settings).init(key, x)[
            "params"
        ]["lora"],
    }


@pytest.mark.parametrize("of", with_lora(1, 1))
def test_rank_and_alpha_are_checked(of):
    for alpha in (*NUMBERS, *ARRAYS):
        with pytest.raises(ValueError, match=r"(?s)alpha is .*; expected a positive number") as error:
            with_lora(2, alpha)[of]()
        assert repr(alpha) in str(error.value)
    for rank in (2.0, True, np.float32(2), jnp.ones(1, int)[:0], jnp.float32(2), jnp.asarray(True)):
        with pytest.raises(ValueError, match=r"(?s)rank is .*; expected a whole number") as error:
            with_lora(rank, 8)[of]()
        assert repr(rank) in str(error.value)
    for rank in (0, -2, np.int32(0), jnp.int32(5)):
        with pytest.raises(ValueError, match=rf"rank is {rank}; a kernel \(4, 6\) takes 1 to 4"):
            with_lora(rank, 8)[of]()
    with pytest.raises(ValueError, match=r"alpha is .*; expected a positive number that is known"):
        jax.jit(lambda alpha: with_lora(2, alpha)[of]())(8.0)
    for alpha in TAKEN:
        p = with_lora(2, alpha)[of]()
        assert p.scale == 4.0 and type(p.scale) is float and hash(p.scale)
    for rank in (2, np.int64(2), np.uint8(2), jnp.int32(2)):
        p = with_lora(rank, 1)[of]()
        assert p.a.shape == (4, 2) and p.scale == 0.5
    assert with_lora(2, None)[of]().scale == 1.0


def test_a_bad_alpha_is_named_with_its_path():
    with pytest.raises(ValueError, match="layer_0/query/kernel: alpha is 0"):
        init_lora(jax.random.key(0), PARAMS, 2, "layer_0", alpha=0)
    with pytest.raises(ValueError, match="alpha is inf"):  # before the model is initialised
        oplora_jax.linen.loraize(nn.Dense(6), 2, "*", alpha=float("inf"))


def test_merge_adds_the_increment():
    p = LowRank(jnp.ones((18, 1)), jnp.arange(8.0)[None], 0.5)
    merged = merge(PARAMS, {"conv/kernel": p})
    expected = 1 + to_dense(p).reshape(3, 3, 2, 8)
    np.testing.assert_array_equal(merged["conv"]["kernel"].astype(jnp.float32), expected)  # halves are exact
    chex.assert_trees_all_equal_shapes_and_dtypes(merged, PARAMS)


def test_axes_of_kernels():
    """Stacked layers have factors of their own; several output axes together are m."""
    params = {"query": jnp.ones((3, 4, 2, 6)), "out": jnp.ones((3, 2, 6, 4))}
    lora = init_lora(jax.random.key(0), params, 2, "query", batch_axes=1, output_axes=2)
    lora |= init_lora(jax.random.key(1), params, 2, "out", batch_axes=1)
    assert {path: p.shape for path, p in lora.items()} == {"query": (3, 4, 12), "out": (3, 12, 4)}
    a = lora["query"].a
    assert (a[0] != a[1]).any()
    # uniform as in He's initialisation: n = 4 inputs, whatever the number of layers
    assert 0.5 < float(jnp.abs(a).max()) <= np.sqrt(6 / 4)
    lora = {path: LowRank(p.a, jnp.ones_like(p.b), p.scale) for path, p in lora.items()}
    merged = merge(params, lora)
    for path, p in lora.items():
        # float32: one plus the sum of two
        np.testing.assert_allclose(merged[path], 1 + to_dense(p).reshape(params[path].shape), rtol=1e-6)


# Of a kernel: an einsum, its shape, the roles of its axes, and its matrix.
EINSUMS = {
    "gemma's queries": ("BTD,NDH->BTNH", (2, 6, 4), "oio", (6, 8)),
    "gemma's keys and values": ("BSD,CKDH->CBSKH", (2, 3, 6, 4), "ooio", (6, 24)),
    "one LoRA parameter each": ("CBSD,CKDH->CBSKH", (2, 3, 6, 4), "boio", (2, 6, 12)),
    "gemma's gate": ("...F,NHF->...NH", (2, 5, 6), "ooi", (6, 10)),
    "gemma's output": ("BTNH,NHD->BTD", (2, 4, 6), "iio", (8, 6)),
    "experts": ("gecd,ekfd->kgecf", (3, 2, 5, 6), "booi", (3, 6, 10)),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("layers", [(), (3,)], ids=["one", "stacked"])
@pytest.mark.parametrize("by", ["roles", "einsum"])
@pytest.mark.parametrize("equation, shape, roles, matrix", EINSUMS.values(), ids=EINSUMS.keys())
def test_roles_of_the_axes_of_kernels(equation, shape, roles, matrix, by, layers):
    """Merged, the increment is that of the einsum: the inputs through a, then through b, in NumPy."""
    rng = np.random.default_rng(0)
    params = {"layer": {"w": jnp.asarray(rng.standard_normal((*layers, *shape)))}, "other": jnp.ones((4, 4))}
    target = equation if by == "einsum" else roles
    lora = init_lora(jax.random.key(0), params, 2, {"layer/w": target, "other": "io"}, alpha=6)
    p = lora["layer/w"]
    in_order = "".join(sorted(roles, key="bio".index)) == roles
    assert p.shape == (*layers, *matrix) and p.roles == (None if in_order else roles) and p.scale == 3
    # uniform as in He's initialisation: n inputs, whatever the other axes
    assert 0.5 < float(jnp.abs(p.a).max()) <= np.sqrt(6 / matrix[-2])
    p = p.with_factors(p.a, jnp.asarray(rng.standard_normal(p.b.shape)))
    merged = merge(params, {"layer/w": p})["layer"]["w"]
    inputs, kernel = equation.replace("...", "BT").split("->")[0].split(",")
    outputs = equation.replace("...", "BT").split("->")[1]
    x = rng.standard_normal([shape[kernel.index(c)] if c in kernel else 2 for c in inputs])
    sizes = dict(zip(kernel, shape, strict=True))
    with_role = lambda role: "".join(c for c, r in zip(kernel, roles, strict=True) if r == role)
    batch, n, m = (with_role(role) for role in "bio")
    for layer in np.ndindex(layers):
        a = np.asarray(p.a[layer]).reshape([*(sizes[c] for c in batch + n), 2])
        b = np.asarray(p.b[layer]).reshape([*(sizes[c] for c in batch), 2, *(sizes[c] for c in m)])
        expected = 3 * np.einsum(f"{inputs},{batch}{n}Z,{batch}Z{m}->{outputs}", x, a, b)
        increment = np.asarray(merged[layer] - params["layer"]["w"][layer])
        got = np.einsum(f"{inputs},{kernel}->{outputs}", x, increment)
        # float64: sums of up to 8 products of numbers of size 1, the increment by a difference
        np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-12)


def test_the_gradient_of_a_kernel_with_roles_is_exact():
    """The gradient at the LoRA parameter is that of the whole kernel, its axes in the matrix's order."""
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(0), 3)
        params = {"q": jax.random.normal(keys[0], (2, 6, 4))}
        x = jax.random.normal(keys[1], (3, 5, 6))
        loss_fn = lambda params: jnp.sum(jnp.sin(jnp.einsum("BTD,NDH->BTNH", x, params["q"])))
        lora = init_lora(keys[2], params, 2, {"q": "oio"})
        got = oplora_jax.grad(lambda lora: loss_fn(merge(params, lora)))(lora)["q"]
        expected = jax.grad(loss_fn)(params)["q"].transpose(1, 0, 2).reshape(6, 8)
        chex.assert_trees_all_close(to_dense(got), expected, rtol=1e-12)  # the same sums


BAD_ROLES = {
    "no letters": ({"q": "xyz"}, r"q: targets\['q'\]: the roles of its axes are 'xyz'; expected a letter"),
    "no string": ({"q": 2}, r"targets\['q'\]: the roles of its axes are 2; expected"),
    "empty": ({"q": ""}, r"targets\['q'\]: .* are ''; expected"),
    "no inputs": ({"q": "boo"}, r"targets\['q'\]: .* are 'boo'; expected"),
    "no outputs": ({"q": "BTD,BTD->BT"}, r"targets\['q'\]: .*'BTD,BTD->BT'"),
    "too many": ({"q": "ooio"}, r"targets\['q'\]: the kernel has 3 axes, its roles 'ooio' are of 4"),
    "another einsum": ({"q": "BSD,CKDH->CBSKH"}, r"targets\['q'\]: .*'BSD,CKDH->CBSKH' has 3 axes"),
    "three operands": ({"q": "BTD,DR,RH->BTH"}, r"targets\['q'\]: .* are 'BTD,DR,RH->BTH'; expected"),
    "a sum": ({"q": "BTD,NDH->BTH"}, r"targets\['q'\]: .* is no matrix product"),
    "two meanings": (
        {"q": "oio", re.compile("q"): "iio"},
        r"q: the roles of its axes are 'oio' by targets\['q'\] and 'iio' by targets\[re.compile\('q'\)\]",
    ),
    "no pattern": ({}, "expected a path, a glob"),
    "no match": ({"q": "oio", "k": "oio"}, "no kernel matches 'k'"),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("targets, message", BAD_ROLES.values(), ids=BAD_ROLES.keys())
def test_bad_roles(targets, message):
    with pytest.raises(ValueError, match=message):
        init_lora(jax.random.key(0), {"q": jnp.ones((2, 6, 4))}, 2, targets)


@pytest.mark.usefixtures("unchecked")
def test_roles_beside_other_arguments():
    params = {"q": jnp.ones((3, 2, 6, 4))}
    # All that match agree: "oio" of a stack is "boio".
    lora = init_lora(jax.random.key(0), params, 2, {"q": "oio", "*": "boio"})
    assert lora["q"].shape == (3, 6, 8) and lora["q"].roles == "oio"
    with pytest.raises(ValueError, match=r"has the roles .*leave out batch_axes=1 and output_axes=1"):
        init_lora(jax.random.key(0), params, 2, {"q": "oio"}, batch_axes=1)
    with pytest.raises(ValueError, match=r"targets is \{'q': 'oio'\}; expected"):
        oplora_jax.nnx.loraize(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), 2, {"q": "oio"}, rngs=nnx.Rngs(0))


def test_gradients_through_a_model_that_knows_nothing_of_lora():
    """A convolution and a dense layer, in float64: the gradient is that of the kernels."""
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(0), 4)
        params = {
            "conv": jax.random.normal(keys[0], (3, 3, 2, 4)),
            "dense": jax.random.normal(keys[1], (4, 5)),
        }
        x = jax.random.normal(keys[2], (2, 6, 6, 2))

        def model(params):
            y = jax.lax.conv_general_dilated(
                x, params["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            return jnp.sum(jnp.sin(jnp.tanh(y) @ params["dense"]))

        lora = init_lora(keys[3], params, 2, ["conv", "dense"])
        got = oplora_jax.grad(lambda lora: model(merge(params, lora)))(lora)
        expected = jax.grad(model)(params)
        for name, gradient in got.items():
            chex.assert_trees_all_close(gradient, expected[name].reshape(gradient.shape), rtol=1e-10)
        with pytest.raises(ValueError, match=r"\['conv'\].*merged into a weight"):
            oplora_jax.grad(lambda lora: model(merge(params, lora)), "outer")(lora)


def test_errors_name_the_paths():
    with pytest.raises(ValueError, match=r"no kernel matches 'key'; the paths are: .*'layer_0/query/kernel'"):
        init_lora(jax.random.key(0), PARAMS, 2, "key")
    with pytest.raises(ValueError, match=r"layer_0/query/kernel: rank is 5.*\(4, 6\).*1 to 4"):
        init_lora(jax.random.key(0), PARAMS, 5, "layer_0")
    with pytest.raises(ValueError, match=r"layer_0/query/kernel: .*\(4, 6\).*batch_axes=1"):
        init_lora(jax.random.key(0), PARAMS, 2, "layer_0", batch_axes=1)
    with pytest.raises(ValueError, match=r"layer_0/query/kernel: .*output_axes=2"):
        init_lora(jax.random.key(0), PARAMS, 2, "layer_0", output_axes=2)
    with pytest.raises(ValueError, match=r"layer_0/query/kernel: .*output_axes=0"):
        init_lora(jax.random.key(0), PARAMS, 2, "layer_0", output_axes=0)
    p = LowRank(jnp.ones((4, 1)), jnp.ones((1, 6)))
    with pytest.raises(ValueError, match=r"layer_2/kernel: no such kernel.*layer_0/query/kernel"):
        merge(PARAMS, {"layer_2/kernel": p})
    with pytest.raises(ValueError, match=r"conv/kernel: the kernel is \(3, 3, 2, 8\).*\(4, 6\)"):
        merge(PARAMS, {"conv/kernel": p})
