"""Parameters by the names that once had the roles of a kernel's axes: refused, with code that mends them."""

import dataclasses
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, serialization
from flax.training.train_state import TrainState

import oplora_jax
import oplora_jax.nnx
from oplora_jax import LowRank, is_low_rank, merge_and_restart_layers
from oplora_jax.linen import LoRAConvTranspose, LoRAEinsum, add_lora, loraize, merge

X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 4)), jnp.float32)
KEY = jax.random.key(0)


class Model(nn.Module):
    """An einsum whose square kernel is not its matrix, and a plain layer."""

    @nn.compact
    def __call__(self, x):
        x = nn.Einsum((4, 4), "btd,hd->bth", name="mix")(x)
        return nn.Dense(3, name="head")(x)


MODEL = loraize(Model(), 2, "*", alpha=6)


def new_params(model=MODEL):
    """Parameters whose increments are all at work."""
    params = model.init(KEY, X)["params"]
    at_work = lambda p: p.with_factors(p.a, jax.random.normal(KEY, p.b.shape)) if is_low_rank(p) else p
    return jax.tree.map(at_work, params, is_leaf=is_low_rank)


def renamed(tree, kind):
    """A tree of dicts as it was before, with nodes or dicts of the factors."""
    if not isinstance(tree, dict):
        return tree
    tree = {name: renamed(child, kind) for name, child in tree.items()}
    lora = tree.get("lora")
    if isinstance(lora, LowRank) and lora.roles is not None:
        old = tree.pop("lora")
        tree[f"lora_{old.roles}"] = (
            LowRank(old.a, old.b, old.scale) if kind == "node" else {"a": old.a, "b": old.b}
        )
    return tree


def mend(error, **names):
    """Runs the code in the message."""
    _, code = str(error.value).split("Rename it:\n")
    exec(code, {"dataclasses": dataclasses, "oplora_jax": oplora_jax, "alpha": 6, "rank": 2, **names})


USES = {
    "merge": merge,
    "restart": lambda params: merge_and_restart_layers(KEY, params),
    "add_lora": lambda params: add_lora(MODEL, KEY, params, X),
    "call": lambda params: MODEL.apply({"params": params}, X),
}


@pytest.mark.parametrize("kind", ["node", "dict"])
@pytest.mark.parametrize("use", USES)
def test_old_parameters(use, kind):
    expected = new_params()
    old = renamed(expected, kind)
    assert set(old["mix"]) == {"kernel", "bias", "lora_oi"} and "lora" in old["head"]
    with pytest.raises(ValueError, match=r"mix/lora_oi: .* no part of the name any more") as error:
        USES[use](old)
    mend(error, params=old)
    chex.assert_trees_all_equal(old, expected)
    chex.assert_trees_all_equal(USES[use](old), USES[use](expected))


@pytest.mark.parametrize(
    "layer",
    [
        LoRAEinsum((3, 4, 2), "btd,ndh->btnh", rank=2, alpha=6),
        LoRAConvTranspose(3, (2,), transpose_kernel=True, rank=2, alpha=6),
    ],
)
def test_old_parameters_of_a_layer_itself(layer):
    expected = new_params(layer)
    old = renamed(expected, "node")
    with pytest.raises(ValueError, match=r"^lora_[io]{3}: ") as error:
        layer.apply({"params": old}, X)
    mend(error, params=old)
    chex.assert_trees_all_equal(layer.apply({"params": old}, X), layer.apply({"params": expected}, X))
    old["lora"] = dataclasses.replace(old["lora"], roles=None)
    with pytest.raises(ValueError, match=r"^lora: .* has roles=None, its layer needs '[io]{3}'"):
        layer.apply({"params": old}, X)


def test_old_checkpoints():
    """Of flax.serialization: the optimizer's state has the names too."""
    state = TrainState.create(apply_fn=MODEL.apply, params=new_params(), tx=oplora_jax.oplora(0.1))
    old = state.replace(params=renamed(state.params, "node"))
    old = old.replace(opt_state=old.tx.init(old.params))
    restored = serialization.msgpack_restore(serialization.to_bytes(old))
    with pytest.raises(ValueError, match=r"params/mix/lora_oi: .* no part of the name any more"):
        serialization.from_bytes(state, serialization.to_bytes(old))
    for _ in range(len(re.findall("lora_oi", str(restored)))):
        with pytest.raises(ValueError, match=r"(params|opt_state/.*)/mix/lora_oi: ") as error:
            serialization.from_state_dict(state, restored)
        mend(error, state=restored)
    chex.assert_trees_all_equal(serialization.from_state_dict(state, restored), state)
    # Of a target that has the old names, and of what is missing for another reason, nothing is said.
    serialization.from_state_dict(old, serialization.to_state_dict(old))
    with pytest.raises(ValueError, match=r"contains keys {'lora'} which are not present"):
        serialization.from_state_dict({"lora": 1}, {"lora_b": 2})


def test_other_names_are_left_alone():
    """Two arrays by the names of flax.nnx.LoRA, and a dict that is no parameter of ours."""
    params = {**new_params(), "other": {"lora_a": X, "lora_b": X}, "lora_bio": {"weights": X}}
    assert set(merge(params)) == {"mix", "head", "other", "lora_bio"}


def test_a_path_through_a_list():
    old = {
        "blocks": [{}, {"lora_oi": LowRank(jnp.ones((4, 1)), jnp.ones((1, 4))), "kernel": jnp.ones((4, 4))}]
    }
    with pytest.raises(ValueError, match="blocks/1/lora_oi: ") as error:
        merge_and_restart_layers(KEY, old)
    mend(error, params=old)
    assert old["blocks"][1]["lora"].roles == "oi" and "lora_oi" not in old["blocks"][1]


def test_nnx_layers_need_their_roles():
    """A square kernel: without them the increment would be merged transposed, and nothing would be said."""
    layer = oplora_jax.nnx.LoRAEinsum("btd,hd->bth", (4, 4), 2, rngs=nnx.Rngs(0))
    lora = layer.lora.get_value()
    assert lora.roles == "oi"
    layer.lora.set_value(dataclasses.replace(lora, roles=None))
    for use in (lambda: layer(X), lambda: oplora_jax.nnx.merge(layer)):
        with pytest.raises(ValueError, match=r"LoRAEinsum: .* has roles=None, its layer needs 'oi'"):
            use()
