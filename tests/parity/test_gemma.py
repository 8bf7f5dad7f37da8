"""gemma's transformer (linen): its own LoRA in pairs, and exact gradients of all projections."""

import dataclasses
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import qwix

import oplora_jax
from oplora_jax import is_low_rank, linen, to_dense
from oplora_jax.adapters.kernel_axes import kept_roles
from oplora_jax.qwix import LoraProvider
from tests.arrays import as_kernel, normal_like
from tests.sources import programs

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore"),
]  # what gemma imports and calls is its own

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("gemma", reason="gemma needs Python 3.12")
    from gemma import gm
    from gemma.gm.nn import _transformer
    from gemma.gm.nn import config as configs

RANK, ALPHA, WORDS = 4, 8.0, 48


@pytest.fixture(autouse=True)
def as_users_have_jax():
    with jax.numpy_rank_promotion("allow"):
        yield


class Tiny(_transformer.Transformer):
    dtype: Any = jnp.float32
    config: configs.TransformerConfig = configs.TransformerConfig(
        num_embed=WORDS,
        embed_dim=32,
        hidden_dim=48,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        final_logit_softcap=None,
        attention_types=(configs.AttentionType.GLOBAL,) * 2,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        attn_logits_soft_cap=None,
    )


EINSUMS = {
    "q_einsum/w": "BTD,NDH->BTNH",
    "kv_einsum/w": "BSD,CKDH->CBSKH",
    "attn_vec_einsum/w": "BTNH,NHD->BTD",
    "gating_einsum": "...F,NFH->...NH",
    "linear": "...H,HF->...F",
}
ROLES = {
    "q_einsum": "oio",
    "kv_einsum": "ooio",
    "attn_vec_einsum": "iio",
    "gating_einsum": "oio",
    "linear": "io",
}
TOKENS = (np.arange(4)[:, None] + np.arange(1, 5)[:, None] * np.arange(9)) % WORDS
X, Y = (
    jnp.asarray(TOKENS[:, :-1]),
    jnp.asarray(TOKENS[:, 1:]),
)  # under Qwix the model takes JAX's arrays alone


def loss_fn(model, params):
    logits = model.apply({"params": params}, X).logits
    return optax.softmax_cross_entropy_with_integer_labels(logits, Y).mean()


def pretrained():
    return jax.jit(Tiny().init)(jax.random.key(0), X)["params"]


def split(params):
    """(the LoRA parameters by their weights' paths, a function that puts others into the tree)."""
    leaves, treedef = jax.tree.flatten_with_path(params, is_leaf=is_low_rank)
    name = lambda path: "/".join(key.key for key in path if key.key != "lora")
    put = lambda lora: treedef.unflatten([lora[name(p)] if is_low_rank(z) else z for p, z in leaves])
    return {name(path): z for path, z in leaves if is_low_rank(z)}, put


def test_exact_gradients_of_all_projections():
    """Those of the plain transformer with the weights merged; of both weights of a gated layer, too."""
    provider = LoraProvider(module_path=r"layer_\d+/.*", rank=RANK, alpha=ALPHA)
    model = qwix.apply_lora_to_model(Tiny(), provider)
    lora, put = split(linen.add_lora(model, jax.random.key(1), pretrained(), X))
    assert len(lora) == 2 * 5
    lora = normal_like(2, lora, 0.2)
    loss, gradients = jax.jit(oplora_jax.value_and_grad(lambda lora: loss_fn(model, put(lora))))(lora)
    merged = linen.merge(put(lora))
    expected, by_weight = jax.value_and_grad(lambda params: loss_fn(Tiny(), params))(merged)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for path, gradient in gradients.items():
        weight = by_weight
        for key in path.split("/"):
            weight = weight[key]
        found = as_kernel(gradient, lora[path].roles, weight.shape)
        # Relative to the largest: sums of 32 tokens in float32 through two layers.
        np.testing.assert_allclose(found, weight, atol=1e-4 * jnp.abs(weight).max(), err_msg=path)


def test_training():
    provider = LoraProvider(module_path=r"layer_\d+/.*", rank=RANK, alpha=ALPHA)
    model = qwix.apply_lora_to_model(Tiny(), provider)
    lora, put = split(linen.add_lora(model, jax.random.key(1), pretrained(), X))
    tx = oplora_jax.oplora(0.1)
    state = tx.init(lora)

    @jax.jit
    def step(lora, state):
        loss, gradients = oplora_jax.value_and_grad(lambda lora: loss_fn(model, put(lora)))(lora)
        updates, state = tx.update(gradients, state, lora)
        return optax.apply_updates(lora, updates), state, loss

    losses = []
    for _ in range(20):
        lora, state, loss = step(lora, state)
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.1


def test_gemmas_own_lora():
    """Its pairs are the increments that it computes: merged, the plain transformer says the same."""
    model = gm.nn.LoRA(rank=RANK, model=Tiny(), dtype=jnp.float32)
    params = jax.jit(model.init)(jax.random.key(0), X)["params"]
    is_lora = lambda path: any(key.key == "lora" for key in path)
    noise = normal_like(3, params, 0.2)
    params = jax.tree.map_with_path(lambda path, z, n: n if is_lora(path) else z, params, noise)
    pairs = oplora_jax.to_low_rank(params, scale=1.0)
    assert len(pairs) == 2 * 5
    lora = {}
    for name, pair in pairs.items():
        module, _, last = name.partition("/_LoRAEinsum_")
        weight = "w" if last == "0" else last
        roles = ROLES[weight if last != "0" else module.split("/")[-1]]
        lora[f"{module}/{weight}"] = dataclasses.replace(pair, roles=kept_roles(roles))
    merged = oplora_jax.merge(without_lora(params), lora)
    np.testing.assert_allclose(loss_fn(Tiny(), merged), loss_fn(model, params), rtol=1e-5)  # float32
    assert abs(loss_fn(Tiny(), without_lora(params)) - loss_fn(model, params)) > 1e-2


def test_roles_of_raw_parameters():
    """Merged weights reach every projection by public names alone: the einsums of gemma's layers."""
    params = pretrained()
    lora = oplora_jax.init_lora(jax.random.key(1), params, RANK, EINSUMS, alpha=ALPHA)
    assert len(lora) == 2 * 5
    lora = normal_like(2, lora, 0.2)
    loss, gradients = oplora_jax.value_and_grad(lambda z: loss_fn(Tiny(), oplora_jax.merge(params, z)))(lora)
    model = qwix.apply_lora_to_model(Tiny(), LoraProvider(module_path=r"layer.*", rank=RANK, alpha=ALPHA))
    other, put = split(linen.add_lora(model, jax.random.key(1), params, X))
    assert set(other) == set(lora)
    expected, exact = oplora_jax.value_and_grad(lambda lora: loss_fn(model, put(lora)))(lora)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for path, gradient in gradients.items():
        dense = to_dense(exact[path])
        np.testing.assert_allclose(gradient, dense, atol=1e-4 * jnp.abs(dense).max(), err_msg=path)


def test_the_program_of_the_site(monkeypatch):
    """On a tiny transformer of random weights, in the place of the one that it downloads."""
    [program] = [z for z, _ in programs("docs/how-to/qwix-tunix.md") if "from gemma import" in z]
    monkeypatch.setattr(gm.nn, "Gemma3_270M", Tiny)
    monkeypatch.setattr(gm.ckpts, "load_params", lambda path: pretrained())
    scope: dict = {"__name__": "page"}
    exec(compile(program, "docs/how-to/qwix-tunix.md", "exec"), scope)
    params, state, losses = scope["params"], scope["state"], []
    for _ in range(10):
        params, state, loss = scope["train_step"](params, state, jnp.asarray(TOKENS))
        losses.append(float(loss))
    assert losses[-1] < losses[0]


def without_lora(tree):
    """gemma's parameters without those of its LoRA."""
    if not isinstance(tree, dict):
        return tree
    return {name: without_lora(z) for name, z in tree.items() if not name.startswith("_LoRA")}
