"""The messages that the site's pages quote are those that users get."""

import json
import pathlib
import re
from functools import partial

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
import qwix
from flax import errors, nnx

import oplora_jax
from oplora_jax import LowRank, linen
from oplora_jax import equinox as of_equinox
from oplora_jax import nnx as of_nnx
from oplora_jax.peft import load_adapter, save_adapter
from oplora_jax.qwix import LoraProvider
from tests.sources import PAGES

KEY, X = jax.random.key(0), jnp.ones((2, 64))


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = nn.Dense(64, name=f"hidden_{i}")(x)
        return nn.Dense(3, name="head")(x)


class Nnx(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.hidden = nnx.List([nnx.Linear(64, 64, rngs=rngs) for _ in range(2)])
        self.head = nnx.Linear(64, 3, rngs=rngs)

    def __call__(self, x, which=(0, 1)):
        for i in which:
            x = self.hidden[i](x)
        return self.head(x)


class Embeds(nnx.Module):
    def __init__(self):
        self.embed = nnx.Embed(5, 3, rngs=nnx.Rngs(0))


def linen_params(targets="hidden_*", wrong=lambda params: params, x=X):
    params = jax.tree.map(lambda z: jnp.ones(z.shape), jax.eval_shape(Linen().init, KEY, x))["params"]
    model = linen.loraize(Linen(), rank=4, targets=targets)
    return model, linen.add_lora(model, KEY, wrong(params), x)


def transposed(params):
    return params | {"hidden_0": {"kernel": params["hidden_0"]["kernel"].T}}


def linen_embed():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, ids):
            return nn.Embed(5, 3, name="embed")(ids)

    linen.loraize(Model(), rank=1, targets="embed").init(KEY, jnp.ones(2, int))


def linen_without_lora():
    model, params = linen_params()
    model.apply({"params": linen.merge(params)}, X)


def linen_step(tx, value_and_grad, without_leaf=False, penalty=False, **settings):
    model, params = linen_params()
    is_leaf = None if without_leaf else oplora_jax.is_low_rank
    is_lora = lambda path: any(key.key == "lora" for key in path if hasattr(key, "key"))
    labels = jax.tree.map_with_path(lambda path, _: str(is_lora(path)), params, is_leaf=is_leaf)
    tx = optax.partition({"True": tx, "False": optax.set_to_zero()}, labels)

    def loss_fn(params):
        of_all = sum(jnp.sum(z**2) for z in jax.tree.leaves(params)) if penalty else 0.0
        return jnp.mean(model.apply({"params": params}, X) ** 2) + of_all

    def step(params):
        _, gradients = value_and_grad(loss_fn, **settings)(params)
        return tx.update(gradients, tx.init(params), params)

    jax.eval_shape(step, params)


def nnx_model(targets="hidden/*", times=1, model=None):
    model = model or Nnx()
    for _ in range(times):
        of_nnx.loraize(model, rank=4, targets=targets, rngs=nnx.Rngs(1))
    return model


def nnx_step(value_and_grad, tx=None, wrt=nnx.LoRAParam):
    model = nnx_model()
    optimizer = nnx.Optimizer(model, tx or oplora_jax.scaled_oplora(0.1), wrt=wrt)
    _, gradients = value_and_grad(lambda model: jnp.mean(model(X) ** 2))(model)
    optimizer.update(model, gradients)


class LoRALinear(eqx.Module):
    linear: eqx.nn.Linear
    lora: LowRank

    def __call__(self, x, key=None):
        return oplora_jax.lora_dot(x, self.linear.weight.T, self.lora)


def equinox_step(value_and_grad=of_equinox.value_and_grad, lora=True, init=None):
    model = mlp = eqx.nn.MLP(64, 3, width_size=64, depth=1, key=KEY)
    if lora:
        layer = LoRALinear(mlp.layers[0], LowRank(jnp.ones((64, 2)), jnp.ones((2, 64))))
        model = eqx.tree_at(lambda model: model.layers[0], mlp, layer)
    trained = lambda model: eqx.filter(model, oplora_jax.is_low_rank, is_leaf=oplora_jax.is_low_rank)
    tx = oplora_jax.oplora(0.1)
    state = tx.init((init or trained)(model))
    _, gradients = value_and_grad(lambda model: jnp.mean(jax.vmap(model)(X) ** 2))(model)
    tx.update(gradients, state, trained(model))


def equinox_merged():
    mlp = eqx.nn.MLP(64, 3, width_size=64, depth=1, key=KEY)
    lora = oplora_jax.init_lora(KEY, mlp, 2, {"layers/0/weight": "oi"})
    loss_fn = lambda lora: jnp.mean(jax.vmap(oplora_jax.merge(mlp, lora))(X) ** 2)
    oplora_jax.value_and_grad(loss_fn, moments="diagonal")(lora)


def qwix_model(model=None, path="hidden/.*", rank=4, which=(0, 1), **rule):
    provider = LoraProvider(module_path=path, rank=rank, alpha=8, **rule)
    return qwix.apply_lora_to_model(model or Nnx(), provider, X, which, rngs=nnx.Rngs(1))


def not_quantised():
    plain = nn.Sequential([nn.Dense(64)])
    pretrained = plain.init(KEY, X)["params"]
    provider = LoraProvider(module_path="layers_0", rank=4, alpha=8, weight_qtype="int8")
    linen.add_lora(qwix.apply_lora_to_model(plain, provider), KEY, pretrained, X)


def merged_codes():
    model = qwix_model(weight_qtype="int8")
    lora = oplora_jax.to_low_rank(nnx.state(model, nnx.LoRAParam))
    oplora_jax.merge(nnx.to_pure_dict(nnx.state(model, nnx.Param)), lora)


def of_rank(rank, *batch):
    return LowRank(jnp.ones((*batch, 64, rank)), jnp.ones((*batch, rank, 64)))


PATH = "layer_0/query/kernel"


def save_stacked():
    save_adapter("adapter", {"layers/query/kernel": of_rank(4, 2)}, names={"layers/query/kernel": "q_proj"})


def load_other(folder="adapter"):
    names = {f"layer_{i}/query/kernel": f"model.layers.{i}.self_attn.q_proj" for i in range(2)}
    save_adapter(folder, {path: of_rank(4) for path in names}, names=names)
    del names["layer_1/query/kernel"]
    load_adapter(folder, names=names)


def load_dora(folder="adapter"):
    save_adapter(folder, {PATH: of_rank(4)})
    path = pathlib.Path(folder, "adapter_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": True}))
    load_adapter(folder)


def put_back(path, rank):
    oplora_jax.from_low_rank({path: of_rank(rank)}, {"layers_0": {"lora": of_rank(2)}})


def pair(scale=None, **shapes):
    oplora_jax.to_low_rank({name: jnp.ones(shape) for name, shape in shapes.items()}, scale=scale)


def scaled_pairs():
    params = {"hidden": {"0": {"kernel_lora_a": jnp.ones((64, 2)), "kernel_lora_b": jnp.ones((2, 64))}}}
    tx = oplora_jax.pair_factors(oplora_jax.scaled_oplora(0.1), scale=2.0)
    tx.update(params, tx.init(params), params)


exact = partial(of_nnx.value_and_grad, moments="diagonal")
scaled = oplora_jax.scaled_oplora(0.1)
CASES = {  # in the order of each page
    "linen": [
        lambda: linen_params("hidden"),
        lambda: linen_params("hidden_0/kernel"),
        linen_embed,
        lambda: linen_params("head"),
        lambda: linen_params(wrong=lambda params: {"params": params}),
        lambda: linen_params(wrong=transposed, x=jnp.ones((2, 32))),
        linen_without_lora,
        lambda: linen_step(scaled, jax.value_and_grad),
        lambda: linen_step(scaled, oplora_jax.value_and_grad, without_leaf=True, moments="diagonal"),
        lambda: linen_step(scaled, oplora_jax.value_and_grad, penalty=True),
    ],
    "nnx": [
        lambda: nnx_model("hidden/kernel"),
        lambda: nnx_model("embed", model=Embeds()),
        lambda: nnx_model(times=2),
        lambda: nnx_model("head"),
        lambda: nnx_step(nnx.value_and_grad),
        lambda: nnx_step(exact, wrt=nnx.Param),
        lambda: nnx_step(exact, optax.adamw(0.1)),
    ],
    "equinox": [
        lambda: equinox_step(oplora_jax.value_and_grad),
        lambda: equinox_step(lora=False),
        lambda: equinox_step(init=lambda model: model),
        lambda: equinox_step(eqx.filter_value_and_grad),
        equinox_merged,
    ],
    "qwix-tunix": [
        lambda: qwix_model(path=".*"),
        merged_codes,
        not_quantised,
        lambda: qwix_model(qwix_model(), rank=2),
        lambda: qwix_model(which=(1,))(X),
    ],
    "adapters": [
        lambda: save_adapter("adapter", {PATH: of_rank(4)}, names={"layer_0/query": "q_proj"}),
        lambda: save_adapter("adapter", {PATH: of_rank(4)}, task_type="SEQ_CLS"),
        save_stacked,
        load_other,
        load_dora,
        lambda: put_back("layers_0/kernel", 4),
        lambda: put_back("layers_2/kernel", 2),
    ],
    "pairs": [
        lambda: pair(**{"hidden/0/kernel_lora_a": (64, 4), "hidden/0/kernel_lora_b": (4, 64)}),
        lambda: pair(**{"dense/bias": (3,), "dense/down": (64, 2), "dense/up": (2, 3)}),
        lambda: pair(**{"dense/lora_a": (64, 2)}),
        lambda: pair(lora_A=(4, 64), lora_B=(64, 4)),
        lambda: pair(lora_a=(4, 16, 4), lora_b=(4, 4, 8)),
        scaled_pairs,
    ],
}


def quoted(page):
    """The messages that a page shows."""
    return re.findall(
        r"```text\n(.*?)\n```", PAGES[f"docs/how-to/{page}.md"].split("## Common errors")[1], re.DOTALL
    )


@pytest.mark.parametrize("page", CASES)
def test_messages(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for message, case in zip(quoted(page), CASES[page], strict=True):
        with (
            jax.numpy_rank_promotion("allow"),
            pytest.raises((ValueError, TypeError, errors.FlaxError)) as error,
        ):
            case()
        assert message in f"{type(error.value).__name__}: {error.value}"
