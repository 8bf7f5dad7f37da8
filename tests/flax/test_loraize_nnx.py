"""`loraize` and `merge` on existing NNX models."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import oplora_jax
from oplora_jax import OuterProduct, to_dense
from oplora_jax.nnx import LoRALinear, LoRALinearGeneral, loraize, merge, value_and_grad
from tests.arrays import normal, normal_like

X = normal(0, 2, 5, 4)


class Block(nnx.Module):
    """A transformer block, with dropout and batch statistics."""

    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, 4, decode=False, dropout_rate=0.1, rngs=rngs)
        self.norms = nnx.data({"batch": nnx.BatchNorm(4, rngs=rngs)})
        self.mlp = nnx.Sequential(nnx.Linear(4, 6, rngs=rngs), nnx.gelu, nnx.Linear(6, 4, rngs=rngs))
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norms["batch"](x))
        return x + self.dropout(self.mlp(x))


class Transformer(nnx.Module):
    """A block between two uses of one layer."""

    def __init__(self, rngs):
        self.embed = nnx.Linear(4, 4, rngs=rngs)
        self.blocks = nnx.List([Block(rngs)])
        self.out = self.embed

    def __call__(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.out(x)


def random_lora(model, index=1):
    """Factors that are all at work: b is zero at the start."""
    nnx.update(model, normal_like(index, nnx.state(model, nnx.LoRAParam), 0.3))


def test_a_transformer_with_batch_statistics_and_dropout():
    model = Transformer(nnx.Rngs(0))
    frozen = nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))
    before = nnx.state(model, nnx.Param)
    forward = nnx.jit(lambda model: model(X))

    def evaluate(model):
        model.eval()
        return forward(model)

    start = evaluate(model)
    paths = loraize(model, 2, ["attention", "mlp/layers", "out"], alpha=4, rngs=nnx.Rngs(1))
    names = [*(f"attention/{z}" for z in ("query", "key", "value", "out")), "mlp/layers/0", "mlp/layers/2"]
    assert sorted(paths) == sorted(["out", *(f"blocks/0/{z}" for z in names)])
    assert model.out is model.embed and isinstance(model.out, LoRALinear)
    assert isinstance(model.blocks[0].attention.out, LoRALinearGeneral)
    chex.assert_trees_all_close(evaluate(model), start, rtol=1e-6, atol=1e-6)  # zeros are added

    target = jnp.roll(X, 1, axis=-1)
    optimizer = nnx.Optimizer(model, oplora_jax.oplora(0.1, momentum=None), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model, optimizer):
        loss_fn = lambda model: jnp.mean((model(X) - target) ** 2)
        loss, gradients = value_and_grad(loss_fn)(model)
        optimizer.update(model, gradients)
        return loss

    model.train()
    mean = model.blocks[0].norms["batch"].mean.get_value()
    losses = [float(step(model, optimizer)) for _ in range(20)]
    assert losses[-1] < 0.7 * losses[0]
    chex.assert_trees_all_equal(nnx.state(model, frozen), before)
    assert (model.blocks[0].norms["batch"].mean.get_value() != mean).all()

    merged = merge(model)
    trained = evaluate(model)
    chex.assert_trees_all_close(evaluate(merged), trained, rtol=1e-4, atol=1e-5)  # float32, eight layers
    assert merged.out is merged.embed and type(merged.out) is nnx.Linear
    fresh = Transformer(nnx.Rngs(0))
    fresh.eval()
    assert nnx.graphdef(merged) == nnx.graphdef(fresh)
    assert not nnx.state(merged, nnx.LoRAParam) and isinstance(model.out, LoRALinear)
    chex.assert_trees_all_equal(evaluate(model), trained)


class Shared(nnx.Module, pytree=False):
    """Layers in a dict, a list and a tuple; one of them twice; a way back to the model itself."""

    def __init__(self, rngs):
        linear = nnx.Linear(4, 4, use_bias=False, rngs=rngs)
        self.layers = nnx.Dict({"first": linear, "rest": nnx.List([nnx.Linear(4, 4, rngs=rngs), linear])})
        self.pair = (nnx.Conv(4, 4, (3,), rngs=rngs), nnx.Einsum("btd,de->bte", (4, 4), rngs=rngs))
        self.parent = self

    def __call__(self, x):
        for layer in (self.layers["first"], *self.layers["rest"], *self.pair):
            x = layer(x)
        return x


def test_containers_shared_layers_and_cycles(x64):
    model = nnx.eval_shape(lambda: Shared(nnx.Rngs(0)))
    with pytest.raises(
        ValueError, match=r"no layer matches 'pear'.*'layers/first'.*'layers/rest/1'.*'pair/1'"
    ):
        loraize(model, 2, "pear", rngs=nnx.Rngs(0))
    assert loraize(model, 2, ["rest/1", "pair"], rngs=nnx.Rngs(0)) == ["layers/rest/1", "pair/0", "pair/1"]
    assert model.layers["first"] is model.layers["rest"][1]
    rng = np.random.default_rng(0)
    nnx.update(model, jax.tree.map(lambda z: rng.standard_normal(z.shape), nnx.state(model)))
    x = jnp.asarray(X, jnp.float64)

    @nnx.jit
    def run(model):
        loss = lambda model: jnp.sum(jnp.sin(model(x)))
        merged = merge(model)
        gradients = nnx.to_pure_dict(value_and_grad(loss)(model)[1])
        return model(x) - merged(x), gradients, nnx.to_pure_dict(nnx.grad(loss)(merged))

    difference, gradients, expected = run(model)
    # float64 through five layers
    np.testing.assert_allclose(difference, 0, atol=1e-10)
    kernels = expected["layers"]["first"], *(expected["pair"][i] for i in range(2))
    loras = gradients["layers"]["first"], *(gradients["pair"][i] for i in range(2))
    for kernel, lora in zip(kernels, loras, strict=True):
        got = to_dense(lora["lora"])
        np.testing.assert_allclose(got, kernel["kernel"].reshape(got.shape), rtol=1e-9, atol=1e-9)


class Stacked(nnx.Module):
    """A scan over layers that nnx.vmap has made."""

    def __init__(self, rngs):
        make = nnx.vmap(lambda key: nnx.Linear(4, 4, rngs=nnx.Rngs(key)), in_axes=0, out_axes=0)
        self.layers = make(jax.random.split(rngs(), 3))

    def __call__(self, x):
        body = nnx.scan(lambda layer, x: jnp.tanh(layer(x)), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        return body(self.layers, x)


@pytest.mark.parametrize("kind", ["outer", "dense"])
def test_scanned_layers(kind, x64):
    model = Stacked(nnx.Rngs(0))
    x = jnp.asarray(X, jnp.float64)
    assert loraize(model, 2, "layers", rngs=nnx.Rngs(1)) == ["layers"]
    lora = model.layers.lora.get_value()
    assert lora.shape == (3, 4, 4) and (lora.a[0] != lora.a[1]).any()
    state = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda z: z.astype(jnp.float64), state))
    random_lora(model)

    @nnx.jit
    def run(model):
        loss = lambda model: jnp.sum(model(x) ** 2)
        merged = merge(model)
        _, gradients = value_and_grad(loss, kind)(model)
        return loss(model), loss(merged), gradients, nnx.grad(loss)(merged)

    value, merged_value, gradients, expected = run(model)
    gradient = gradients["layers"]["lora"].get_value()
    assert isinstance(gradient, OuterProduct) == (kind == "outer")
    # float64 through three layers
    chex.assert_trees_all_close(
        (value, to_dense(gradient)),
        (merged_value, expected["layers"]["kernel"].get_value()),
        rtol=1e-10,
        atol=1e-10,
    )


class Named(nnx.Linear):
    """A subclass that computes what its base does."""


class Doubled(nnx.Linear):
    """A subclass that does not."""

    def __call__(self, inputs):
        return 2 * (inputs @ self.kernel[...]) + super().__call__(inputs)


@pytest.mark.parametrize("cls", [Named, Doubled])
def test_subclasses(cls):
    """They stay of their class; the model itself may be the layer."""
    model = cls(4, 3, rngs=nnx.Rngs(0))
    start = model(X)
    assert loraize(model, 2, "*", rngs=nnx.Rngs(1)) == [""]
    assert isinstance(model, cls) and type(model).__name__ == f"LoRA{cls.__name__}"
    chex.assert_trees_all_equal(model(X), start)
    random_lora(model)
    merged = merge(model)
    assert type(merged) is cls
    chex.assert_trees_all_close(model(X), merged(X), rtol=1e-5, atol=1e-5)  # float32, sums of 4
    assert jnp.linalg.norm(model(X) - start) > 0.1
    other = cls(4, 3, rngs=nnx.Rngs(0))
    loraize(other, 2, "*", rngs=nnx.Rngs(1))
    assert type(other) is type(model)  # so that compiled functions take both
    # A jitted function may close over the layer.
    chex.assert_trees_all_close(jax.jit(lambda x: model(x))(X), model(X), rtol=1e-5, atol=1e-5)


def test_what_is_refused_leaves_the_model_alone():
    model = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 2, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"'layers/1': rank is 3.*\(8, 2\)"):
        loraize(model, 3, "*", rngs=nnx.Rngs(1))
    assert [type(layer) for layer in model.layers] == [nnx.Linear] * 2
    assert not nnx.state(model, nnx.LoRAParam)
    loraize(model, 2, "0", rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match="'layers/0': this LoRALinear has LoRA already"):
        loraize(model, 2, "*", rngs=nnx.Rngs(1))
    flax_lora = nnx.LoRALinear(4, 8, lora_rank=2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"no layer matches 'layer/\*'; .*'layers/0', 'layers/1'"):
        loraize(model, 2, ["1", "layer/*"], rngs=nnx.Rngs(1))
    assert type(model.layers[1]) is nnx.Linear
    assert loraize(model, 2, re.compile("s/[1-9]"), rngs=nnx.Rngs(1)) == ["layers/1"]
    with pytest.raises(ValueError, match="'': this LoRALinear has LoRA already"):
        loraize(flax_lora, 2, "*", rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match=r"no layer matches '.*'.*are: none"):
        loraize(nnx.Sequential(nnx.relu), 2, ".*", rngs=nnx.Rngs(1))
    layer = nnx.Linear(4, 8, rngs=nnx.Rngs(0))
    layer.kernel.set_value(jnp.ones((4, 8, 3)))
    with pytest.raises(ValueError, match=r"the kernel is \(4, 8, 3\); expected \(4, 8\)"):
        loraize(layer, 2, "*", rngs=nnx.Rngs(1))

    class Own(LoRALinear):
        def __call__(self, inputs):
            return -super().__call__(inputs)

    coded = nnx.Sequential(LoRALinear(4, 8, 2, rngs=nnx.Rngs(0)))
    coded.layers[0].kernel.set_value(jnp.ones((4, 8), jnp.int8))
    with pytest.raises(ValueError, match=r"'layers/0': the kernel is int8.*dequantise it"):
        merge(coded)
    with pytest.raises(ValueError, match="'': Own has a __call__ of its own"):
        merge(Own(4, 8, 2, rngs=nnx.Rngs(0)))


OTHERS = {
    "embed": lambda rngs: nnx.Embed(3, 4, rngs=rngs),
    "norm": lambda rngs: nnx.BatchNorm(4, rngs=rngs),
    "dropout": lambda rngs: nnx.Dropout(0.1, rngs=rngs),
    "lora": lambda rngs: nnx.LoRA(4, 2, 4, rngs=rngs),
}


@pytest.mark.parametrize("name", OTHERS)
def test_layers_of_other_classes_are_named(name):
    rngs = nnx.Rngs(0)
    model = nnx.Dict({name: OTHERS[name](rngs), "head": nnx.Linear(4, 3, rngs=rngs)})
    graphdef, kind = nnx.graphdef(model), type(model[name]).__name__
    expected = f"'{name}': nnx.{kind} is not supported, expected one of nnx.Linear, nnx.Linear.*or a subclass"
    for targets in (name, ["head", name]):
        with pytest.raises(ValueError, match=expected):
            loraize(model, 2, targets, rngs=rngs)
    with pytest.raises(ValueError, match="no layer matches 'heads'"):
        loraize(model, 2, "heads", rngs=rngs)
    assert nnx.graphdef(model) == graphdef and loraize(model, 2, "*", rngs=rngs) == ["head"]
    found = "no layer matches" if kind == "Dropout" else f"'': nnx.{kind} is not supported"
    with pytest.raises(ValueError, match=found):
        loraize(OTHERS[name](rngs), 2, "*", rngs=rngs)


def normalised(kind, layer):
    options = {"use_scale": False} if kind == "WeightNorm" else {"update_stats": False}
    return getattr(nnx, kind)(layer, rngs=nnx.Rngs(0), **options)


@pytest.mark.parametrize("kind", ["WeightNorm", "SpectralNorm"])
def test_kernels_that_another_module_computes(kind):
    """With LoRA beside it, x (norm(W) + P), is not x norm(W + P): refused, whoever is around whom."""
    block = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    model = nnx.Dict(plain=nnx.Linear(4, 4, rngs=nnx.Rngs(0)), normed=normalised(kind, block))
    graphdef = nnx.graphdef(model)
    match = rf"'normed/layer_instance/layers/0': the kernel of this Linear is computed by the {kind}"
    with pytest.raises(ValueError, match=match):
        loraize(model, 2, "*", rngs=nnx.Rngs(1))
    assert nnx.graphdef(model) == graphdef
    assert loraize(model, 2, "plain", rngs=nnx.Rngs(1)) == ["plain"]
    assert type(merge(model)["plain"]) is nnx.Linear
    whole = normalised(kind, nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=f"'layer_instance': .* computed by the {kind}"):
        loraize(whole, 2, "*", rngs=nnx.Rngs(1))


def test_a_layer_that_is_normalised_later_does_not_merge():
    inner = LoRALinear(4, 3, 2, rngs=nnx.Rngs(0))
    model = nnx.Sequential(inner, normalised("WeightNorm", inner))
    with pytest.raises(
        ValueError, match="'layers/0': the kernel of this LoRALinear is computed by the Weigh"
    ):
        merge(model)


def test_split_merge_and_abstract_models():
    def make():
        model = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.Conv(8, 3, (3,), rngs=nnx.Rngs(0)))
        loraize(model, 2, "*", alpha=4, rngs=nnx.Rngs(1))
        return model

    model, abstract = make(), nnx.eval_shape(make)
    assert "LoRAConv" in repr(model) and "scale=2.0" in repr(model)
    assert nnx.graphdef(abstract) == nnx.graphdef(model)
    graphdef, lora, rest = nnx.split(model, nnx.LoRAParam, ...)
    assert len(jax.tree.leaves(lora)) == 4
    chex.assert_trees_all_equal(nnx.merge(graphdef, lora, rest)(X), model(X))
    nnx.update(abstract, nnx.state(model))
    chex.assert_trees_all_equal(abstract(X), model(X))
