"""gemma's transformer (linen): its own LoRA in pairs, and exact gradients of all projections."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import qwix

import oplora_jax
from oplora_jax import LowRank, is_low_rank, linen, to_dense
from oplora_jax.adapters.kernel_axes import add_increment
from oplora_jax.qwix import LoraProvider
from tests.arrays import normal_like

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore"),
]  # what gemma imports and calls is its own

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("gemma", reason="gemma needs Python 3.12")
    from gemma import gm
    from gemma.gm.nn import _config, _transformer

RANK, ALPHA, WORDS = 4, 8.0, 48


@pytest.fixture(autouse=True)
def as_users_have_jax():
    with jax.numpy_rank_promotion("allow"):
        yield


class Tiny(_transformer.Transformer):
    config: _config.TransformerConfig = _config.TransformerConfig(
        num_embed=WORDS,
        embed_dim=32,
        hidden_dim=48,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        final_logit_softcap=None,
        attention_types=(_config.AttentionType.GLOBAL,) * 2,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        attn_logits_soft_cap=None,
    )


TOKENS = (np.arange(4)[:, None] + np.arange(1, 5)[:, None] * np.arange(9)) % WORDS
X, Y = TOKENS[:, :-1].astype(np.int32), TOKENS[:, 1:].astype(np.int32)


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
        dense = to_dense(gradient)
        identity = jnp.broadcast_to(jnp.eye(dense.shape[-1]), (*dense.shape[:-2], *[dense.shape[-1]] * 2))
        found = add_increment(jnp.zeros_like(weight), LowRank(dense, identity, roles=lora[path].roles))
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
    assert losses[-1] < 0.8 * losses[0]


def test_gemmas_own_lora():
    """Its pairs are the increments that it computes: merged, the plain transformer says the same."""
    model = gm.nn.LoRA(rank=RANK, model=Tiny(), dtype=jnp.float32)
    params = jax.jit(model.init)(jax.random.key(0), X)["params"]
    is_lora = lambda path: any(key.key == "lora" for key in path)
    noise = normal_like(3, params, 0.2)
    params = jax.tree.map_with_path(lambda path, z, n: n if is_lora(path) else z, params, noise)
    pairs = oplora_jax.to_low_rank(params)
    assert len(pairs) == 2 * 5
