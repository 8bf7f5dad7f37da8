"""`loraize`, `add_lora` and `merge` on existing linen models."""

import re
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util
from flax.training.train_state import TrainState

import oplora_jax
from oplora_jax import OuterProduct, is_low_rank, to_dense
from oplora_jax.linen import BlockShortcutDense, LoRADense, add_lora, loraize, merge
from oplora_jax.matrix import is_matrix
from tests.arrays import normal, normal_like

X = normal(0, 2, 5, 4)
KEY = jax.random.key(0)


class Block(nn.Module):
    """A transformer block, for `nn.scan`."""

    train: bool

    @nn.compact
    def __call__(self, x, _):
        attention = nn.MultiHeadDotProductAttention(2, dropout_rate=0.1, name="attention")
        x = x + attention(nn.LayerNorm()(x), deterministic=not self.train)
        return x + nn.Dense(4, name="mlp")(nn.tanh(x)), None


class Model(nn.Module):
    """Layers by setup and by compact, shared, scanned, normalised; several methods."""

    def setup(self):
        self.shared = nn.Dense(4)
        self.norm = nn.BatchNorm(momentum=0.9)
        self.conv = nn.Conv(4, (3,))
        self.mix = nn.Einsum((2, 4, 2), "btd,ndh->btnh")
        self.head = nn.Dense(3)

    def encode(self, x):
        return self.shared(nn.tanh(self.shared(x)))

    @nn.compact
    def __call__(self, x, train=False):
        x = self.conv(self.norm(self.encode(x), use_running_average=not train))
        options = {"variable_axes": {"params": 0}, "split_rngs": {"params": True, "dropout": True}}
        blocks = nn.scan(nn.remat(Block, prevent_cse=False), length=2, **options)
        x, _ = blocks(train, name="blocks")(x, None)
        return self.head(self.mix(x).reshape(*x.shape[:-1], -1))


TARGETS = ("shared", "conv", "mix", "blocks/*", "head")
LAYERS = {
    *("shared/lora", "conv/lora", "mix/lora", "blocks/mlp/lora", "head/lora"),
    *(f"blocks/attention/{z}/lora" for z in ("query", "key", "value", "out")),
}


def flatten(tree):
    return traverse_util.flatten_dict(tree, sep="/")


def random_params(tree, dtype=jnp.float32):
    """Random parameters of given shapes, b too, which is zero at the start."""
    return normal_like(1, tree, 0.5, dtype)


def variables_of(model, dtype=jnp.float32):
    variables = jax.eval_shape(model.init, KEY, X)
    stats = {"norm": {"mean": jnp.zeros(4, dtype), "var": jnp.ones(4, dtype)}}
    return {"params": random_params(variables["params"], dtype), "batch_stats": stats}


@pytest.fixture(scope="module")
def model():
    return loraize(Model(), 2, TARGETS, alpha=4)


def test_the_tree_is_the_models_with_lora(model):
    with_lora, plain = (jax.eval_shape(m.init, KEY, X) for m in (model, Model()))
    flat = flatten(with_lora["params"])
    lora = {path: node for path, node in flat.items() if is_low_rank(node)}
    assert set(lora) == LAYERS and {node.scale for node in lora.values()} == {2.0}
    assert lora["blocks/attention/query/lora"].shape == (2, 4, 4)
    assert lora["conv/lora"].shape == (12, 4) and lora["mix/lora"].shape == (4, 4)
    without = {path: node for path, node in flat.items() if path not in lora}
    chex.assert_trees_all_equal_shapes_and_dtypes(without, flatten(plain["params"]))
    chex.assert_trees_all_equal_shapes_and_dtypes(with_lora["batch_stats"], plain["batch_stats"])


def test_values_gradients_and_state_of_a_training_step(model, x64):
    """Dropout, batch statistics, scan and remat: all as in the plain model with merged weights."""
    x = jnp.asarray(X, jnp.float64)
    variables = variables_of(model, jnp.float64)
    params = variables.pop("params")

    def loss_fn(module, params):
        out, state = module.apply(
            {"params": params, **variables}, x, train=True, rngs={"dropout": KEY}, mutable="batch_stats"
        )
        return jnp.sum(jnp.sin(out)), state

    @jax.jit
    def run(params):
        got = oplora_jax.value_and_grad(lambda p: loss_fn(model, p), has_aux=True)(params)
        expected = jax.value_and_grad(lambda p: loss_fn(Model(), p), has_aux=True)(merge(params))
        return got, expected

    (got, gradients), (expected, kernel_gradients) = run(params)
    # float64 through ten layers
    close = lambda got, expected: chex.assert_trees_all_close(got, expected, rtol=1e-8, atol=1e-9)
    close(got, expected)
    assert (got[1]["batch_stats"]["norm"]["mean"] != 0).all()
    flat = traverse_util.flatten_dict(gradients, sep="/", is_leaf=lambda _, z: is_matrix(z))
    expected = flatten(kernel_gradients)
    for path in LAYERS:
        gradient = to_dense(flat[path])
        kernel = expected[path.rsplit("/", 1)[0] + "/kernel"]
        kernel = kernel.transpose(1, 0, 2) if path == "mix/lora" else kernel
        close(gradient, kernel.reshape(gradient.shape))
    close(
        {path: flat[path] for path in expected if "kernel" not in path},
        {path: z for path, z in expected.items() if "kernel" not in path},
    )


def test_dense_layers_need_no_merged_weights():
    """Their gradients can be had as outer products; a convolution's and those of shared layers cannot."""
    model = loraize(Model(), 2, ["mix", "blocks", "head"])
    variables = jax.eval_shape(model.init, KEY, X)

    def gradient(model, params):
        stats = jax.tree.map(lambda z: jnp.ones(z.shape), variables["batch_stats"])
        loss = lambda params: jnp.sum(model.apply({"params": params, "batch_stats": stats}, X))
        return jax.eval_shape(oplora_jax.grad(loss, "outer"), params)

    nodes = jax.tree.leaves(gradient(model, variables["params"]), is_leaf=is_matrix)
    assert sum(isinstance(node, OuterProduct) for node in nodes) == 7
    for target, match in {"shared": "used 2 times", "conv": "merged into a weight"}.items():
        model = loraize(Model(), 2, target)
        with pytest.raises(ValueError, match=rf"\['{target}'\]\['lora'\].*{match}"):
            gradient(model, jax.eval_shape(model.init, KEY, X)["params"])


def test_pretrained_parameters_with_a_new_head(model):
    plain = variables_of(Model())
    pretrained = {name: tree for name, tree in plain["params"].items() if name != "head"}
    example = jax.ShapeDtypeStruct(X.shape, X.dtype)
    params = add_lora(model, {"params": KEY, "dropout": KEY}, pretrained, example, train=True)
    flat, given = flatten(params), flatten(pretrained)
    assert all(flat[path] is leaf for path, leaf in given.items())
    assert set(flat) == {*given, *LAYERS, "head/kernel", "head/bias"}
    assert flat["head/kernel"].any() and flat["head/lora"].a.any() and not flat["head/lora"].b.any()
    stats = {"batch_stats": plain["batch_stats"]}
    merged = jax.tree.map(
        lambda z: z, {**pretrained, "head": {k: params["head"][k] for k in ("kernel", "bias")}}
    )
    run = jax.jit(
        lambda p, q: (model.apply({"params": p, **stats}, X), Model().apply({"params": q, **stats}, X))
    )
    got, expected = run(params, merged)
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-6)  # the increments are zero
    with pytest.raises(ValueError, match=r"head/kernel: the array is .*; the model needs"):
        add_lora(model, KEY, {**pretrained, "head": {"kernel": jnp.ones((3, 3))}}, X)
    with pytest.raises(ValueError, match="tail/kernel: the model has no such parameter"):
        add_lora(model, KEY, {**pretrained, "tail": {"kernel": jnp.ones((3, 3))}}, X)
    with pytest.raises(ValueError, match="no LoRA parameter"):
        add_lora(Model(), KEY, pretrained, X)


class Given(nn.Module):
    """A module that is given others, and has modules of the name of what `loraize` wraps."""

    first: nn.Module
    blocks: tuple
    model: nn.Module | None = None

    @nn.compact
    def __call__(self, x):
        for block in (self.first, *self.blocks, self.model or nn.Dense(4, name="model")):
            x = block(x)
        return x


SHARED = nn.Dense(4)
GIVEN = {
    "given": Given(SHARED, (nn.remat(nn.Dense)(4), nn.Sequential([nn.Dense(4), SHARED]))),
    "given_model": Given(SHARED, (SHARED,), Given(nn.Dense(4), (SHARED,))),
    "in_sequence": nn.Sequential([nn.Dense(4), nn.remat(Given)(nn.Dense(4), (SHARED,))]),
    "remat": nn.remat(Given)(nn.Dense(4), (nn.Dense(4), SHARED)),
}


@pytest.mark.parametrize("name", GIVEN)
def test_paths_are_those_of_the_parameters(name):
    """Also where modules are given to others when they are made, which Flax then names otherwise."""
    tree = flatten(jax.eval_shape(GIVEN[name].init, KEY, X)["params"])
    for path in {path.rpartition("/")[0] for path in tree}:
        model = loraize(GIVEN[name], 2, re.compile(f"^{path}$"))
        params = flatten(jax.eval_shape(model.init, KEY, X)["params"])
        assert [z for z in params if is_low_rank(params[z])] == [f"{path}/lora"]
        assert {z.removesuffix("/lora") for z in params} == {*tree, path}


def test_add_lora_leaks_no_tracer():
    pretrained = jax.tree.map(jnp.ones_like, Pair().init(KEY, X)["params"])
    with jax.checking_leaks():
        params = add_lora(loraize(Pair(), 2, "*d"), KEY, pretrained, X)
        with pytest.raises(ValueError, match="f: the model has no such parameter"):
            add_lora(loraize(Pair(), 2, "*d"), KEY, {**pretrained, "f": X}, X)
    assert set(params["d"]) == {"kernel", "bias", "lora"}


def test_train_state_trains_lora_and_a_head():
    """optax.partition: OPLoRA for LoRA, and its SGD for the head; the rest stays, bit for bit."""
    model = loraize(
        nn.Sequential([nn.Dense(8), nn.tanh, nn.Dense(8), nn.tanh, nn.Dense(3)]), 2, "layers_[02]"
    )
    params = add_lora(model, KEY, {}, X)
    label = lambda path, p: "train" if is_low_rank(p) or path[0].key == "layers_4" else "frozen"
    labels = jax.tree.map_with_path(label, params, is_leaf=is_low_rank)
    tx = optax.partition({"train": oplora_jax.oplora(0.1), "frozen": optax.set_to_zero()}, labels)
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    target = X[..., :3] ** 2

    @jax.jit
    def step(state):
        loss_fn = lambda params: jnp.mean((state.apply_fn({"params": params}, X) - target) ** 2)
        loss, gradients = oplora_jax.value_and_grad(loss_fn)(state.params)
        return state.apply_gradients(grads=gradients), loss

    losses = []
    for _ in range(30):
        state, loss = step(state)
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
    old, new = flatten(params), flatten(state.params)
    for path in new:
        if path.endswith("lora") or "layers_4" in path:
            assert all(
                (a != b).any() for a, b in zip(*map(jax.tree.leaves, (old[path], new[path])), strict=True)
            )
        else:
            np.testing.assert_array_equal(new[path], old[path])


def test_methods_by_name_and_as_a_part(model):
    variables = variables_of(model)
    plain = {**variables, "params": merge(variables["params"])}
    # float32, two layers
    close = lambda got, expected: chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-5)
    encoded = model.apply(variables, X, method="encode")
    close(encoded, Model().apply(plain, X, method="encode"))
    close(model.apply(variables, X, method=lambda m, x: m.encode(x)), encoded)
    close(model.bind(variables).encode(X), encoded)
    with pytest.raises(AttributeError, match="decode"):
        model.apply(variables, X, method="decode")

    class Outer(nn.Module):
        tower: nn.Module

        @nn.compact
        def __call__(self, x):
            return nn.Dense(2, name="shared")(self.tower.encode(x))

    outer = Outer(model)
    params = jax.eval_shape(outer.init, KEY, X)["params"]
    assert set(params["shared"]) == {"kernel", "bias"}  # what is outside is not looked at
    assert set(params["tower"]["shared"]) == {"kernel", "bias", "lora"}
    params = random_params(params)
    merged = merge(params)
    close(outer.apply({"params": params}, X), Outer(Model()).apply({"params": merged}, X))


class Doubled(nn.Dense):
    """A layer with a rule of its own."""

    @nn.compact
    def __call__(self, inputs):
        return 2 * super().__call__(inputs) + jnp.sum(self.get_variable("params", "kernel")) * 0


class BySetup(nn.Dense):
    """A layer that makes its kernel in setup."""

    def setup(self):
        self.weight = self.param("kernel", self.kernel_init, (4, self.features))

    def __call__(self, inputs):
        return inputs @ self.weight


class Named(nn.Dense):
    """A layer that computes what its base does."""


@pytest.mark.parametrize("cls", [Doubled, BySetup, Named])
def test_subclasses(cls):
    plain = cls(3)
    model = loraize(plain, 2, "*")  # the model itself is the layer
    params = model.init(KEY, X)["params"]
    assert "lora" in params and hash(model) == hash(loraize(cls(3), 2, "*"))
    chex.assert_trees_all_equal(model.apply({"params": params}, X), plain.apply({"params": params}, X))
    params = {**params, "lora": random_params(params["lora"])}
    got, expected = model.apply({"params": params}, X), plain.apply({"params": merge(params)}, X)
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-5)  # float32, sums of 4
    assert jnp.linalg.norm(got - plain.apply({"params": params}, X)) > 0.1


def test_other_interceptors_intermediates_and_tables(model):
    variables = variables_of(model)
    calls = []

    def interceptor(call, args, kwargs, context):
        calls.append(context.module.name)
        return call(*args, **kwargs)

    with nn.intercept_methods(interceptor):
        jax.eval_shape(model.apply, variables, X)
    assert "conv" in calls
    capture = lambda variables: model.apply(variables, X, capture_intermediates=True)
    out, state = jax.eval_shape(capture, variables)
    assert state["intermediates"]["head"]["__call__"][0].shape == out.shape
    table = model.tabulate(KEY, X, console_kwargs={"width": 200})
    assert "blocks/attention/query" in table and "scale: 2.0" in table


def test_what_is_refused():
    model = loraize(Model(), 2, "*/nothing")
    with pytest.raises(
        ValueError, match=r"no layer matches '\*/nothing'.*'shared', 'conv', 'blocks/attention/query'"
    ):
        jax.eval_shape(model.init, KEY, X)
    model = loraize(Model(), 2, ["head", re.compile("att"), "mlpp"])
    with pytest.raises(ValueError, match=r"no layer matches 'mlpp'; .*'blocks/mlp'"):
        jax.eval_shape(model.init, KEY, X)
    model = loraize(Model(), 2, [re.compile("(query|value)$"), "head/*"])
    with pytest.raises(ValueError, match=r"no layer matches 'head/\*'"):
        jax.eval_shape(model.init, KEY, X)
    with pytest.raises(ValueError, match=r"'head': rank is 4.*\(4, 3\).*1 to 3"):
        jax.eval_shape(loraize(Model(), 4, "head").init, KEY, X)
    with pytest.raises(ValueError, match="'': this LoRADense has LoRA already"):
        jax.eval_shape(loraize(LoRADense(3, rank=2), 2, "*").init, KEY, X)
    twice = lambda targets: loraize(loraize(Model(), 2, "head"), 1, targets)
    with pytest.raises(ValueError, match="'head': this Dense has LoRA already"):
        jax.eval_shape(twice("*").init, KEY, X)
    params = jax.eval_shape(twice("shared").init, KEY, X)["params"]
    assert params["head"]["lora"].a.shape == (4, 2) and params["shared"]["lora"].a.shape == (4, 1)
    model = loraize(nn.Dense(3), 2, "*")
    plain = nn.Dense(3).init(KEY, X)
    with pytest.raises(nn.module.errors.ScopeParamNotFoundError, match='"lora"'):
        model.apply(plain, X)


class Computed(nn.Module):
    """A layer "d" whose kernel something computes."""

    by: Any

    @nn.compact
    def __call__(self, x):
        return self.by(self.is_initializing(), x)


class Pair(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="e")(nn.Dense(4, name="d")(x))


def mapped(layer, init):
    sign = lambda variables: jax.tree.map(jnp.sign, variables)
    return nn.map_variables(layer, "params", trans_in_fn=sign, init=init)


COMPUTED = {
    "WeightNorm": lambda init, x: nn.WeightNorm(nn.Dense(4, name="d"))(x),
    "SpectralNorm": lambda init, x: nn.SpectralNorm(nn.Dense(4, name="d"))(x, update_stats=False),
    "of a block": lambda init, x: nn.WeightNorm(Pair(name="pair"))(x),
    "over remat": lambda init, x: nn.WeightNorm(nn.remat(nn.Dense)(4, name="d"))(x),
    "under remat": lambda init, x: nn.remat(nn.WeightNorm)(nn.Dense(4, name="d"))(x),
    "of a convolution": lambda init, x: nn.WeightNorm(nn.Conv(4, (2,), name="d"))(x),
    "map_variables": lambda init, x: mapped(nn.Dense, init)(4, name="d")(x),
    "map_variables of a function": lambda init, x: mapped(lambda d, x: d(x), init)(nn.Dense(4, name="d"), x),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_kernels_that_are_computed(name):
    """With LoRA beside it, x (norm(W) + P), is not x norm(W + P): refused by the layer's path."""
    model = loraize(Computed(COMPUTED[name]), 2, "*d")
    with pytest.raises(ValueError, match=r"the kernel of the \w+ '(pair/)?d' is computed from its parameter"):
        jax.eval_shape(lambda: model.apply(model.init(KEY, X), X))


@pytest.mark.parametrize(
    "model",
    [
        nn.WeightNorm(loraize(nn.Dense(4), 2, "")),
        loraize(nn.WeightNorm(nn.Dense(4)), 2, "*"),
        nn.WeightNorm(LoRADense(4, rank=2)),
        nn.WeightNorm(nn.Sequential([BlockShortcutDense(4, rank=2, previous=())])),
    ],
    ids=["outside", "inside", "layer", "shortcut"],
)
def test_wrappers_around_layers_with_lora(model):
    with pytest.raises(ValueError, match="is computed from its parameter, as by nn"):
        jax.eval_shape(model.init, KEY, X)


class Beside(nn.Module):
    """A normalised layer between others, which a scan, remat and jit give as other arrays."""

    @nn.compact
    def __call__(self, x):
        x = nn.WeightNorm(nn.Dense(4, name="normed"))(nn.Dense(4, name="first")(x))
        options = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 2}
        return nn.scan(nn.remat(nn.jit(Step)), **options)(name="steps")(x, None)[0]


class Step(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.Dense(4, name="d")(x)), None


def test_kernels_that_are_not_computed():
    model = loraize(Beside(), 2, ["first", "steps/*"])
    params = random_params(jax.eval_shape(model.init, KEY, X)["params"])
    run = lambda p: (model.apply({"params": p}, X), Beside().apply({"params": merge(p)}, X))
    # float32 through four layers
    chex.assert_trees_all_close(*jax.jit(run)(params), rtol=1e-4, atol=1e-5)


class Table(nn.Module):
    """Parameters that hold a None, alone, beside a kernel and in a list."""

    @nn.compact
    def __call__(self, x):
        init = lambda key: {"values": jnp.ones(1), "zero_point": None, "more": [None, jnp.ones(2)]}
        table = self.param("table", init)
        self.param("nothing", lambda key: None)
        return nn.Dense(3, name="head")(x) * table["values"][0]


def test_a_none_among_the_parameters_stays():
    model, plain = loraize(Table(), 2, "head"), Table().init(KEY, X)["params"]
    params = add_lora(model, KEY, plain, X)
    assert params["nothing"] is None and params["table"]["zero_point"] is None
    params["head"]["lora"] = random_params(params["head"]["lora"])
    without = {**params, "head": {k: z for k, z in params["head"].items() if k != "lora"}}
    chex.assert_trees_all_equal(without, plain)
    merged = merge(params)
    chex.assert_trees_all_equal_structs(merged, plain)
    run = lambda params: (model.apply({"params": params}, X), Table().apply({"params": merged}, X))
    chex.assert_trees_all_close(*run(params), rtol=1e-5, atol=1e-5)  # float32, sums of 4
    lora = {"head/kernel": params["head"]["lora"]}
    assert set(oplora_jax.init_lora(KEY, plain, 2, "head/kernel")) == set(lora)
    chex.assert_trees_all_equal(oplora_jax.merge(plain, lora), merged)


class Inner(nn.Module):
    """Layers by setup: one, in a list, in a dict."""

    width: int

    def setup(self):
        self.one, self.many = nn.Dense(self.width), [nn.Dense(self.width), nn.Dense(self.width)]
        self.named = {"mix": nn.Einsum((self.width, self.width), "td,dh->th")}

    def __call__(self, x):
        return self.named["mix"](self.many[1](self.many[0](self.one(x))))

    def twice(self, x):
        return self.one(nn.tanh(self.one(x)))


class Idioms(nn.Module):
    width: int = 4

    def setup(self):
        self.layer, self.inner = nn.Dense(self.width), Inner(self.width)

    def __call__(self, x):
        return self.encode(x)

    def encode(self, x, times=1):
        return times * self.inner(self._first(x))

    def _first(self, x):
        return self.layer(x)

    @property
    def first_of_ones(self):
        return self.layer(jnp.ones((1, 4)))

    @property
    def double(self):
        return 2 * self.width

    @staticmethod
    def shifted(x):
        return x + 1


class Around(nn.Module):
    tower: nn.Module

    @nn.compact
    def __call__(self, x):
        tower = self.tower
        return tower.layer(x) + tower.inner.many[0](x) + Idioms.encode(tower, x) * tower.width


Y = X[0]
# What users do with a model and its variables.
IDIOMS = {
    "a name": lambda m, v: m.apply(v, Y, method="encode"),
    "a function": lambda m, v: m.apply(v, Y, 3, method=Idioms.encode),
    "by keyword": lambda m, v: m.apply(v, x=Y, times=3, method=Idioms.encode),
    "a private function": lambda m, v: m.apply(v, Y, method=Idioms._first),
    "a method of it": lambda m, v: m.apply(v, Y, method=m.encode),
    "a method of another": lambda m, v: m.apply(v, Y, method=Idioms().encode),
    "its call": lambda m, v: m.apply(v, Y, method=Idioms.__call__),
    "a lambda": lambda m, v: m.apply(v, Y, method=lambda m, x: m.encode(x) + m.width),
    "a lambda of layers": lambda m, v: m.apply(v, Y, method=lambda m, x: m.inner.one(m.layer(x))),
    "nn.apply": lambda m, v: nn.apply(lambda m, x: m.inner.many[1](m.layer(x)), m)(v, Y),
    "nn.apply, a function": lambda m, v: nn.apply(Idioms.encode, m)(v, Y),
    "bind": lambda m, v: m.bind(v)(Y),
    "bind, a module": lambda m, v: m.bind(v).inner(Y),
    "bind, of a list": lambda m, v: m.bind(v).inner.many[0](Y),
    "bind, of a dict": lambda m, v: m.bind(v).inner.named["mix"](Y),
    "bind, a method": lambda m, v: m.bind(v).inner.twice(Y),
    "bind, a property": lambda m, v: m.bind(v).first_of_ones,
    "attributes": lambda m, v: jnp.array(
        [m.width, m.double, m.bind(v).inner.width, m.bind(v).layer.features]
    ),
    "a static method": lambda m, v: m.shifted(Y),
    "init": lambda m, v: m.init(KEY, Y, method=Idioms._first)["params"]["layer"]["kernel"],
    "within another": lambda m, v: Around(m).apply({"params": {"tower": v["params"]}}, Y),
}


@pytest.fixture(scope="module")
def idioms():
    model = loraize(Idioms(), 2, "*", alpha=4)
    params = random_params(jax.eval_shape(model.init, KEY, Y)["params"])
    return model, {"params": params}, {"params": merge(params)}


@pytest.mark.parametrize("name", IDIOMS)
def test_what_can_be_done_with_the_model(name, idioms):
    """As with the plain model and merged weights."""
    model, variables, merged = idioms
    got, expected = IDIOMS[name](model, variables), IDIOMS[name](Idioms(), merged)
    chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-4)  # float32, up to five layers


def test_attributes_that_there_are_not(idioms):
    model, variables, _ = idioms
    for read in (lambda: model.depth, lambda: model.bind(variables).depth, lambda: model.layer):
        with pytest.raises(AttributeError, match=r'"Idioms" object has no attribute "(depth|layer)"'):
            read()
    with pytest.raises(AttributeError, match='"Inner" object has no attribute "depth"'):
        _ = model.bind(variables).inner.depth


class Many(nn.Module):
    """Layers of classes that take no LoRA, beside one that does."""

    @nn.compact
    def __call__(self, x):
        tokens = jnp.zeros(x.shape[:2], int)
        x = nn.Embed(3, 4, name="embed")(tokens) + nn.LayerNorm(name="norm")(x)
        cell = nn.OptimizedLSTMCell(4, name="cell")
        x = cell(cell.initialize_carry(KEY, x[:, 0].shape), x[:, 0])[1]
        return nn.Dense(4, name="head")(x)


@pytest.mark.parametrize(
    ("target", "kind"), {"embed": "Embed", "norm": "LayerNorm", "cell": "OptimizedLSTMCell"}.items()
)
def test_layers_of_other_classes_are_named(target, kind):
    expected = f"'{target}': nn.{kind} is not supported, expected one of nn.Dense, nn.Dense.*or a subclass"
    for targets in (target, ["head", target]):
        with pytest.raises(ValueError, match=expected):
            jax.eval_shape(loraize(Many(), 2, targets).init, KEY, X)
    with pytest.raises(ValueError, match=r"no layer matches 'embedding'.*'head'"):
        jax.eval_shape(loraize(Many(), 2, "embedding").init, KEY, X)
    jax.eval_shape(loraize(Many(), 2, "*").init, KEY, X)


def test_a_model_that_is_a_layer_of_another_class():
    with pytest.raises(ValueError, match=r"'': nn\.Embed is not supported"):
        jax.eval_shape(loraize(nn.Embed(3, 4), 2, "*").init, KEY, jnp.zeros(2, int))
