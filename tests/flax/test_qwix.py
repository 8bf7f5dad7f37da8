"""LoRA beside Qwix: on quantised layers, and under quantisation-aware training."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
import qwix
from flax import nnx

import oplora_jax
from oplora_jax import linen, to_dense
from oplora_jax import nnx as lora_nnx
from tests.arrays import normal, normal_like

X = normal(0, 6, 8, dtype=jnp.float32)
PROVIDERS = {"trained": qwix.QtProvider, "quantised": qwix.PtqProvider}
RULES = [qwix.QuantizationRule(module_path=".*", weight_qtype="int8")]


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.Dense(4, name="dense")(x)
        return y + nn.Einsum((8, 2, 2), "td,dnh->tnh", name="mix")(x).reshape(y.shape)


class NNX(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(8, 4, rngs=rngs)
        self.mix = nnx.Einsum("td,dnh->tnh", (8, 2, 2), bias_shape=(2, 2), rngs=rngs)

    def __call__(self, x):
        y = self.dense(x)
        return y + self.mix(x).reshape(y.shape)


def run_linen(provider, lora_first):
    """(outputs, those of the quantised model, the LoRA parameters, gradients, what merges) of one model."""
    quantise = lambda model: qwix.quantize_model(model, provider(RULES))
    wrap = lambda model: linen.loraize(model, 2, "*", alpha=4)
    model = quantise(wrap(Linen())) if lora_first else wrap(quantise(Linen()))
    params = model.init(jax.random.key(0), X)["params"]
    lora = {name: normal_like(i, params[name]["lora"]) for i, name in enumerate(("dense", "mix"))}
    with_lora = lambda lora: {name: {**params[name], "lora": lora[name]} for name in lora}
    apply = lambda lora: model.apply({"params": with_lora(lora)}, X)
    plain = {name: {k: z for k, z in params[name].items() if k != "lora"} for name in params}
    gradients = oplora_jax.grad(lambda lora: jnp.sum(jnp.sin(apply(lora))), "outer")(lora)
    return (
        apply(lora),
        quantise(Linen()).apply({"params": plain}, X),
        lora,
        gradients,
        lambda: linen.merge(with_lora(lora)),
    )


def run_nnx(provider, lora_first):
    quantise = lambda model: qwix.quantize_model(model, provider(RULES), X)
    model = NNX(nnx.Rngs(0))
    plain = quantise(model)(X)
    model = model if lora_first else quantise(model)
    lora_nnx.loraize(model, 2, "*", alpha=4, rngs=nnx.Rngs(1))
    nnx.update(model, normal_like(0, nnx.state(model, nnx.LoRAParam)))
    model = quantise(model) if lora_first else model
    gradients = lora_nnx.value_and_grad(lambda model: jnp.sum(jnp.sin(model(X))), "outer")(model)[1]
    of = lambda tree: {name: tree[name]["lora"].get_value() for name in ("dense", "mix")}
    return model(X), plain, of(nnx.state(model)), of(gradients), lambda: lora_nnx.merge(model)


@pytest.mark.parametrize("lora_first", [True, False])
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("run", [run_linen, run_nnx])
def test_lora_beside_qwix(run, provider, lora_first):
    """The quantised model's outputs and the increments; exact gradients; codes are not merged into."""
    y, plain, lora, gradients, merge = run(PROVIDERS[provider], lora_first)
    increments = X @ to_dense(lora["dense"]) + X @ to_dense(lora["mix"])
    chex.assert_trees_all_close(y, plain + increments, rtol=1e-4, atol=1e-4)  # float32, sums of 8
    for name in lora:
        chex.assert_trees_all_close(to_dense(gradients[name]), X.T @ jnp.cos(y), rtol=1e-4, atol=1e-4)
    if provider == "trained":
        merge()
    else:
        with pytest.raises(
            ValueError, match=r"(dense|mix).*the kernel is a WithAux, as Qwix's.*pair_factors"
        ):
            merge()


def test_merged_weights_need_arrays():
    """Of a convolution, and of a class with a call of its own."""
    rules = [qwix.QuantizationRule(module_path=".*", weight_qtype="int8", act_qtype="int8")]
    conv = nnx.Sequential(nnx.Conv(8, 4, (2,), rngs=nnx.Rngs(0)))
    model = qwix.quantize_model(conv, qwix.PtqProvider(rules), X)
    with pytest.raises(ValueError, match="'layers/0': the kernel is a WithAux"):
        lora_nnx.loraize(model, 2, "*", rngs=nnx.Rngs(1))
    assert type(model.layers[0]) is nnx.Conv
    model = linen.loraize(qwix.quantize_model(nn.Conv(4, (2,), name="conv"), qwix.PtqProvider(rules)), 2, "*")
    variables = model.init(jax.random.key(0), X)
    with pytest.raises(ValueError, match="the kernel is a WithAux"):
        model.apply(variables, X)


def test_a_convolution_under_quantised_training():
    conv = nnx.Sequential(nnx.Conv(8, 4, (2,), rngs=nnx.Rngs(0)))
    lora_nnx.loraize(conv, 2, "*", rngs=nnx.Rngs(1))
    nnx.update(conv, normal_like(0, nnx.state(conv, nnx.LoRAParam)))
    quantise = lambda model: qwix.quantize_model(model, qwix.QtProvider(RULES), X)
    trained = quantise(conv)
    chex.assert_trees_all_close(
        trained(X), quantise(lora_nnx.merge(conv))(X), rtol=1e-5, atol=1e-5
    )  # float32
    assert jnp.abs(trained(X) - conv(X)).max() > 1e-3
