"""PEFT adapters as files: exact round trips, and what is refused."""

import json
import os
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from oplora_jax import LowRank, from_low_rank, init_lora, to_low_rank
from oplora_jax.nnx import LoRALinear
from oplora_jax.peft import load_adapter, save_adapter
from tests.arrays import normals

RNG = np.random.default_rng(0)


def low_rank(n, m, r, scale=1.0, dtype=jnp.float32, batch=()):
    normal = normals(RNG, dtype)
    return LowRank(normal(*batch, n, r), normal(*batch, r, m), scale)


def assert_equal(actual, expected):
    """Bit for bit, types and scales included."""
    assert set(actual) == set(expected)
    for path, node in expected.items():
        assert actual[path].scale == node.scale and type(actual[path]) is LowRank
        for old, new in zip((node.a, node.b), (actual[path].a, actual[path].b), strict=True):
            assert old.dtype == new.dtype
            np.testing.assert_array_equal(np.asarray(old), np.asarray(new))


def files(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
    return config, tensors


def write(folder, config, tensors):
    """A folder as PEFT writes it."""
    plain = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"], "bias": "none"}
    written = plain | config if isinstance(config, dict) else config
    (folder / "adapter_config.json").write_text(json.dumps(written))
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


# Names of which one ends like another, or matches it where a dot stands for any letter.
MIXED = {
    "q/kernel": low_rank(4, 6, 2, 4.0),
    "layers/1/q/kernel": low_rank(4, 6, 3, 4.0),
    "layers/11/q/kernel": low_rank(4, 6, 2, 0.3),
    "x/layers/1/q/kernel": low_rank(5, 6, 2, 4.0),
    "layers/1xq/kernel": low_rank(5, 7, 1, 4.0),
    "layers/1/v/kernel": low_rank(5, 7, 1, 1 / 3),
    "bf16/kernel": low_rank(5, 7, 2, 4.0, jnp.bfloat16),
    "f16/kernel": low_rank(5, 7, 2, 4.0, jnp.float16),
}


def test_round_trip(tmp_path):
    save_adapter(tmp_path, MIXED, base_model="org/base", task_type="CAUSAL_LM")
    assert_equal(load_adapter(tmp_path), MIXED)
    config, tensors = json.loads((tmp_path / "adapter_config.json").read_text()), {}
    assert config["base_model_name_or_path"] == "org/base" and config["task_type"] == "CAUSAL_LM"
    assert config["peft_type"] == "LORA" and config["r"] == 2 and config["lora_alpha"] == 8
    assert config["rank_pattern"] == {
        r"^layers\.1\.q": 3,
        r"^layers\.1xq": 1,
        r"^layers\.1\.v": 1,
    }
    assert set(config["target_modules"]) == {p.removesuffix("/kernel").replace("/", ".") for p in MIXED}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    # PyTorch's layout, by PEFT's names.
    save_adapter(tmp_path / "new" / "folder", {"q/kernel": MIXED["q/kernel"]})
    config, tensors = files(tmp_path / "new" / "folder")
    a, b = (tensors[f"base_model.model.q.lora_{x}.weight"] for x in "AB")
    np.testing.assert_array_equal(a, MIXED["q/kernel"].a.T)
    np.testing.assert_array_equal(b, MIXED["q/kernel"].b.T)
    assert len(tensors) == 2 and config["alpha_pattern"] == config["rank_pattern"] == {}
    # What was there before is replaced.
    save_adapter(tmp_path, {"q/kernel": MIXED["q/kernel"]})
    assert_equal(load_adapter(tmp_path), {"q/kernel": MIXED["q/kernel"]})


@given(st.floats(1e-3, 1e3), st.integers(1, 300))
def test_every_scale_comes_back(alpha, rank):
    """A scale that is alpha / rank exactly; any other one within a unit in the last place."""
    from oplora_jax.adapters.peft_config import _alpha

    assert _alpha(alpha / rank, rank) / rank == alpha / rank
    assert abs(_alpha(alpha, rank) / rank - alpha) <= np.spacing(alpha)


@pytest.mark.parametrize("alpha, rank", [(16, 8), (1, 3), (10, 7), (2.5, 6), (0.1, 5)])
def test_whole_alphas_are_written_as_such(alpha, rank, tmp_path):
    lora = init_lora(jax.random.key(0), {"kernel": jnp.ones((9, 8))}, rank, "kernel", alpha=alpha)
    save_adapter(tmp_path, lora, names={"kernel": "q"})
    written = files(tmp_path)[0]["lora_alpha"]
    assert written == alpha and type(written) is type(alpha)
    assert_equal(load_adapter(tmp_path, names={"kernel": "q"}), lora)


def test_double_precision(tmp_path, x64):
    lora = {"q/kernel": low_rank(4, 6, 2, dtype=jnp.float64)}
    save_adapter(tmp_path, lora)
    assert_equal(load_adapter(tmp_path), lora)
    with jax.enable_x64(False), pytest.raises(ValueError, match="q: the numbers are float64; set jax_enable"):
        load_adapter(tmp_path)


def test_names(tmp_path):
    lora = {"layer_0/query/kernel": low_rank(4, 6, 2), "layer_1/query/kernel": low_rank(4, 6, 2)}
    to_module = lambda path: f"encoder.layer.{path[6]}.attention.query"
    to_path = lambda module: f"layer_{module[14]}/query/kernel"
    save_adapter(tmp_path, lora, names=to_module)
    assert set(files(tmp_path)[0]["target_modules"]) == {f"encoder.layer.{i}.attention.query" for i in (0, 1)}
    assert_equal(load_adapter(tmp_path, names=to_path), lora)
    # A dict goes both ways, and may have names that the adapter lacks.
    names = {path: to_module(path) for path in lora} | {"other": "module"}
    assert_equal(load_adapter(tmp_path, names=names), lora)
    save_adapter(tmp_path, lora, names=names)
    assert_equal(load_adapter(tmp_path, names=names), lora)


def test_a_stack_of_layers_is_written_layer_by_layer(tmp_path):
    lora = {"layers/q": low_rank(4, 6, 2, 0.5, batch=(3,)), "head": low_rank(4, 5, 1)}
    names = {"layers/q": [f"layers.{i}.q" for i in range(3)], "head": "head"}
    save_adapter(tmp_path, lora, names=names)
    assert_equal(load_adapter(tmp_path, names=names), lora)
    trained = {"layers.1.q": {"bias": jnp.ones(6)}}  # of one of the layers
    save_adapter(tmp_path, lora, names=names, modules_to_save=trained)
    assert "base_model.model.layers.1.q.base_layer.bias" in files(tmp_path)[1]
    flat = load_adapter(tmp_path)
    chex.assert_trees_all_equal(flat["modules_to_save"], trained)
    chex.assert_trees_all_equal(flat["layers/2/q/kernel"].a, lora["layers/q"].a[2])


class Model(nnx.Module):
    def __init__(self, rngs):
        self.q = LoRALinear(4, 6, 2, alpha=8, rngs=rngs)


def test_trees(tmp_path):
    """A module's state, with its base weights; and a tree of Qwix's through to_low_rank, and back into it."""
    model = Model(nnx.Rngs(0))
    to_module = lambda path: path.removesuffix("/lora")
    save_adapter(tmp_path, nnx.state(model), names=to_module)
    names = lambda module: module + "/lora"
    assert_equal(load_adapter(tmp_path, names=names), {"q/lora": model.q.lora.get_value()})

    normal = normals(RNG, jnp.float32)
    params = {"q": {"kernel_lora_a": normal(4, 2), "kernel_lora_b": normal(2, 3, 5)}, "bias": jnp.ones(3)}
    save_adapter(tmp_path, to_low_rank(params, scale=2.0))
    empty = jax.tree.map(jnp.zeros_like, params)
    chex.assert_trees_all_equal(from_low_rank(load_adapter(tmp_path), empty, scale=2.0)["q"], params["q"])


def test_rank_stabilised_scales_and_patterns(tmp_path):
    """As PEFT matches them: the first key found at the end of a module's name, whole parts of it."""
    tensors = {}
    ranks = {"model.layers.0.q": 2, "model.layers.0.v": 4, "model.layers.10.v": 3, "model.xv": 2}
    for module, r in ranks.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = RNG.standard_normal((r, 5)).astype(np.float32)
        tensors[f"base_model.model.{module}.lora_B.weight"] = RNG.standard_normal((6, r)).astype(np.float32)
    config = {
        "use_rslora": True,
        "rank_pattern": {r"layers\.\d\.v": 4, "v": 3},
        "alpha_pattern": {"^model.layers.0.v": 16.5, "q|v": 8},
    }
    write(tmp_path, config, tensors)
    lora = load_adapter(tmp_path, names=lambda module: module)
    assert {k: p.a.shape[-1] for k, p in lora.items()} == ranks
    assert {k: p.scale for k, p in lora.items()} == {
        "model.layers.0.q": 8 / np.sqrt(2),
        "model.layers.0.v": 16.5 / 2,
        "model.layers.10.v": 8 / np.sqrt(3),
        "model.xv": 4 / np.sqrt(2),
    }


def test_an_interrupted_write_leaves_the_old_adapter(tmp_path, monkeypatch):
    save_adapter(tmp_path, {"q/kernel": MIXED["q/kernel"]})
    before = files(tmp_path)

    def broken(self, content):
        with open(self, "wb") as file:
            file.write(content[:10])
        raise OSError("no space left")

    monkeypatch.setattr(pathlib.Path, "write_bytes", broken)
    with pytest.raises(OSError, match="no space left"):
        save_adapter(tmp_path, {"q/kernel": MIXED["layers/1/q/kernel"]})
    chex.assert_trees_all_equal(files(tmp_path)[1], before[1])
    assert files(tmp_path)[0] == before[0]
    assert sorted(os.listdir(tmp_path)) == ["adapter_config.json", "adapter_model.safetensors"]


A, B = np.ones((2, 4), np.float32), np.ones((6, 2), np.float32)
Q = {"base_model.model.q.lora_A.weight": A, "base_model.model.q.lora_B.weight": B}
REFUSED = {
    "another type": ({"peft_type": "IA3"}, Q, "peft_type is 'IA3'; expected 'LORA'"),
    "no config": (["r"], Q, "peft_type is \\['r'\\]; expected 'LORA'"),
    "bias": ({"bias": "some"}, Q, "bias is 'some'; only plain LoRA is supported"),
    "DoRA": ({"use_dora": True}, Q, "use_dora is True"),
    "lora_bias": ({"lora_bias": True}, Q, "lora_bias is True"),
    "modules_to_save": ({"modules_to_save": "head"}, Q, "modules_to_save is 'head'"),
    "patterns": ({"alpha_pattern": [4]}, Q, r"alpha_pattern is \[4\]"),
    "tokens": ({"trainable_token_indices": [1]}, Q, "trainable_token_indices is"),
    "replication": ({"layer_replication": [[0, 2]]}, Q, "layer_replication is"),
    "what is not yet known": ({"use_future_lora": True}, Q, "use_future_lora is True"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, Q, "'pissa_niter_4', which changes the base model"),
    "alpha 0": ({"lora_alpha": 0}, Q, "q: the config's lora_alpha is 0; expected a positive number"),
    "no alpha": ({"lora_alpha": None}, Q, "q: the config's lora_alpha is None; expected a positive number"),
    "alpha as a word": ({"lora_alpha": "4"}, Q, "q: the config's lora_alpha is '4'; expected a positive"),
    "of a pattern": ({"alpha_pattern": {"q": None}}, Q, "q: the config's lora_alpha is None"),
    "no rank": ({"r": None}, Q, "q: the config's r is None; expected a positive whole number"),
    "rank as a word": ({"r": "2"}, Q, "q: the config's r is '2'; expected a positive whole number"),
    "half a rank": ({"rank_pattern": {"q": 1.5}}, Q, r"q: the config's r is 1\.5; expected a positive whole"),
    "rank": ({"r": 3}, Q, r"q: lora_A \(2, 4\) and lora_B \(6, 2\) do not fit; the config's rank is 3"),
    "half": ({}, {"base_model.model.q.lora_A.weight": A}, "q: lora_A without the other factor"),
    "convolution": ({}, {"base_model.model.q.lora_A.weight": A[..., None, None]}, r"q.* is \(2, 4, 1, 1\)"),
    "half an embedding": ({}, Q | {"base_model.model.e.lora_embedding_A": A}, "e: lora_A without the other"),
    "magnitudes": ({}, Q | {"base_model.model.q.lora_magnitude_vector": A[0]}, "lora_magnitude_vector: only"),
    "a bias of LoRA": ({}, Q | {"base_model.model.q.lora_B.bias": A[0]}, r"lora_B\.bias: only lora_A"),
    "a base without LoRA": ({}, Q | {"base_model.model.p.base_layer.bias": A[0]}, "the base of a layer that"),
    "quantised": ({}, Q | {"score.weight": A.astype(np.uint8)}, "score.weight: a quantised weight, uint8"),
    "copies": (
        {},
        Q | {"p.weight": A, "p.modules_to_save.weight": 2 * A},
        r"save\.weight: expected a copy of p\.weight, ",
    ),
    "no original": ({}, Q | {"p.original_module.weight": A}, "p.original_module.weight: expected a copy"),
    "one within another": (
        {"modules_to_save": ["embeddings"]},
        Q | {"bert.embeddings.word_embeddings.weight": A},
        "PEFT saves both bert.embeddings and bert.embeddings.word_embeddings, one within the other",
    ),
    "no LoRA": ({}, {"score.weight": A}, "the adapter has no LoRA tensors"),
    "nothing": ({}, {}, "the adapter has no tensors"),
}


@pytest.mark.parametrize("config, tensors, message", REFUSED.values(), ids=REFUSED.keys())
def test_what_is_not_plain_lora_is_refused(config, tensors, message, tmp_path):
    write(tmp_path, config, tensors)
    with pytest.raises(ValueError, match=message):
        load_adapter(tmp_path)


def test_what_does_not_change_the_adapter_is_accepted(tmp_path):
    config = {
        "exclude_modules": ["v"],
        "layers_to_transform": [0],
        "lora_dropout": 0.1,
        "init_lora_weights": "gaussian",
        "inference_mode": False,
        "modules_to_save": None,
        "megatron_core": "megatron.core",
        "qalora_group_size": 16,
    }
    write(tmp_path, config, Q)
    expected = {"q/kernel": LowRank(jnp.asarray(A.T), jnp.asarray(B.T), 2.0)}
    assert_equal(load_adapter(tmp_path), expected)


ONE = {"q/kernel": MIXED["q/kernel"]}
UNNAMED = {
    "nothing": ({"bias": jnp.ones(3)}, None, "no LoRA parameters"),
    "no name": (ONE, {"v": "v"}, "q/kernel: no module name; names has v"),
    "None": (ONE, lambda path: None, "q/kernel: a parameter .* needs one module name; names gives None"),
    "twice": (ONE | {"v": ONE["q/kernel"]}, lambda path: "m", "v: another parameter has the module name 'm'"),
    "stack": ({"s": low_rank(4, 6, 2, batch=(3,))}, None, r"s: .* for each of the \(3,\) layers; .* 's'"),
    "few": ({"s": low_rank(4, 6, 2, batch=(3,))}, {"s": ["a", "b"]}, r"s: a parameter \(3, 4, 6\) needs"),
    "two axes": ({"s": low_rank(4, 6, 2, batch=(3, 1))}, {"s": ["a", "b", "c"]}, r"the \(3, 1\) layers"),
    "no stack": (ONE, {"q/kernel": ["a"]}, "q/kernel: .* needs one module name; names gives"),
    "factors": ({"q": LowRank(jnp.ones((3, 2)), jnp.ones((3, 2)))}, None, r"q: factors a \(3, 2\) and b"),
}


@pytest.mark.parametrize("lora, names, message", UNNAMED.values(), ids=UNNAMED.keys())
def test_what_cannot_be_written(lora, names, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        save_adapter(tmp_path / "adapter", lora, names=names)
    assert not (tmp_path / "adapter").exists()


def test_names_that_do_not_fit_what_is_read(tmp_path):
    lora = {"l": low_rank(4, 6, 2, batch=(2,)), "q": low_rank(4, 6, 1)}
    save_adapter(tmp_path, lora, names={"l": ["l.0", "l.1"], "q": "q"})
    for names, message in (
        ({"q": "q"}, r"l\.0, l\.1: no path; names has the modules q"),
        ({"q": "q", "p": "q", "l": ["l.0", "l.1"]}, "q: names has this module more than once"),
        ({"q": "q", "l": ["l.0", "l.1", "l.2"]}, r"l: the adapter lacks some of its layers, l\.2"),
        ({"l": ["l.0", "q"], "m": "l.1"}, "l: layers of one stack differ in shape"),
        (lambda module: "same", r"names\('.*'\) is 'same'; expected a path of its own"),
        (lambda module: None, "is None; expected a path of its own"),
    ):
        with pytest.raises(ValueError, match=message):
            load_adapter(tmp_path, names=names)


def test_the_parameter_of_a_layer_is_no_part_of_its_name(tmp_path):
    """Flax's names, this library's own layers', Qwix's and Equinox's; not where the layer is named so."""
    paths = ["a/q_proj/kernel", "b/q_proj/lora", "c/q_proj/w", "d/q_proj/weight", "w", "lora/x"]
    save_adapter(tmp_path, {path: low_rank(4, 6, 2) for path in paths})
    modules = ["a.q_proj", "b.q_proj", "c.q_proj", "d.q_proj", "w", "lora.x"]
    assert files(tmp_path)[0]["target_modules"] == sorted(modules)


def arrays(*shapes, dtype=jnp.float32):
    return (normals(RNG, dtype)(*shape) for shape in shapes)


def head(n=6, k=3):
    kernel, bias = arrays((n, k), (k,))
    return {"kernel": kernel, "bias": bias}


def round_trip(folder, lora, **settings):
    """What comes back, and the tensors in the file without LoRA's."""
    save_adapter(folder, lora, **settings)
    loaded, (config, tensors) = load_adapter(folder), files(folder)
    others = {key.removeprefix("base_model.model."): z for key, z in tensors.items() if "lora" not in key}
    return loaded, config, others


def test_a_head_comes_back_as_it_was_given(tmp_path):
    trained = {"classifier": head()}
    loaded, config, tensors = round_trip(tmp_path, ONE, task_type="SEQ_CLS", modules_to_save=trained)
    chex.assert_trees_all_equal(loaded.pop("modules_to_save"), trained)
    assert_equal(loaded, ONE)
    assert config["modules_to_save"] == ["classifier", "score"] and config["bias"] == "none"
    assert set(tensors) == {"classifier.weight", "classifier.bias"}
    np.testing.assert_array_equal(tensors["classifier.weight"], trained["classifier"]["kernel"].T)
    # What was loaded is written again as a whole.
    loaded = load_adapter(tmp_path)
    save_adapter(tmp_path / "again", loaded, task_type="SEQ_CLS")
    assert files(tmp_path / "again")[0] == config
    chex.assert_trees_all_equal(load_adapter(tmp_path / "again"), loaded)


def test_trees_of_every_shape_come_back(tmp_path):
    """Names and layouts, where PEFT's own files would not tell them; types, deep heads and flax.nnx."""
    embedding, scale, conv, mean, half = arrays((9, 4), (4,), (8, 4, 3, 3), (8,), (3, 2))
    layer = nnx.state(nnx.Linear(4, 6, rngs=nnx.Rngs(0)))
    trained = {
        "classifier": {"dense": head(6, 6), "out_proj": head(6, 2)},
        "embed.positions": {"embedding": embedding},
        "bert.norm": {"scale": scale},
        "bert.pooler": {"dense": {"kernel": half.astype(jnp.bfloat16)}},
        "conv": {"weight": conv, "running_mean": mean, "num_batches_tracked": jnp.array(3, jnp.int32)},
        "plain": {"weight": half},
        "score.with.dots": {"weight": half},
        "nnx": layer,
    }
    names = {"q/kernel": "layers.0.q"}
    _, config, tensors = round_trip(tmp_path, ONE, names=names, modules_to_save=trained)
    trained["nnx"] = nnx.to_pure_dict(layer)
    chex.assert_trees_all_equal(load_adapter(tmp_path, names=names)["modules_to_save"], trained)
    assert config["modules_to_save"] == list(trained) and config["bias"] == "none"
    for name, expected in {
        "classifier.out_proj.weight": trained["classifier"]["out_proj"]["kernel"].T,
        "embed.positions.weight": embedding,
        "bert.norm.weight": scale,
        "bert.pooler.dense.weight": half.astype(jnp.bfloat16).T,
        "conv.weight": conv,
        "conv.running_mean": mean,
        "plain.weight": half,
    }.items():
        np.testing.assert_array_equal(tensors[name], expected, err_msg=name)
        assert tensors[name].dtype == expected.dtype


def test_biases(tmp_path):
    """PEFT's "lora_only" and "all"; a layer with LoRA keeps its own parameters below its base."""
    bias, other = arrays((6,), (5,))
    trained = {"q": {"bias": bias}}
    loaded, config, tensors = round_trip(tmp_path, ONE, modules_to_save=trained)
    assert config["bias"] == "lora_only" and config["modules_to_save"] is None
    assert set(tensors) == {"q.base_layer.bias"}
    chex.assert_trees_all_equal(loaded["modules_to_save"], trained)

    trained |= {"k": {"bias": other}, "score": head()}
    loaded, config, tensors = round_trip(tmp_path, ONE, modules_to_save=trained, task_type="TOKEN_CLS")
    assert config["bias"] == "all" and config["modules_to_save"] == ["classifier", "score"]
    assert set(tensors) == {"q.base_layer.bias", "k.bias", "score.weight", "score.bias"}
    chex.assert_trees_all_equal(loaded["modules_to_save"], trained)


def test_modules_within_others_are_listed_once(tmp_path):
    """PEFT finds a module by the end of its name, and cannot wrap one within another."""
    names = ["classifier.dense", "pre_classifier", "pooler", "pooler.dense", "x.pooler"]
    trained = {name: head() for name in names}
    _, config, _ = round_trip(tmp_path, ONE, modules_to_save=trained, task_type="SEQ_CLS")
    assert config["modules_to_save"] == ["classifier", "score", "pooler"]


def test_lora_on_embeddings_and_their_weights(tmp_path):
    """(vocabulary, dim) as the weight; of a head with LoRA the kernel lies below its base."""
    lora = {"model/embed_tokens/embedding": low_rank(9, 4, 2, 0.5), "lm_head/kernel": low_rank(4, 9, 1)}
    embedding, kernel = arrays((9, 4), (4, 9))
    trained = {"model.embed_tokens": {"embedding": embedding}, "lm_head": {"kernel": kernel}}
    loaded, config, tensors = round_trip(tmp_path, lora, modules_to_save=trained, task_type="CAUSAL_LM")
    chex.assert_trees_all_equal(loaded.pop("modules_to_save"), trained)
    assert_equal(loaded, lora)
    assert config["modules_to_save"] is None and config["bias"] == "none"
    assert set(tensors) == {"lm_head.base_layer.weight", "model.embed_tokens.base_layer.weight"}
    written = lambda name: files(tmp_path)[1][f"base_model.model.{name}"]
    embedding = lora["model/embed_tokens/embedding"]
    np.testing.assert_array_equal(written("model.embed_tokens.lora_embedding_A"), embedding.a.T)
    np.testing.assert_array_equal(written("model.embed_tokens.lora_embedding_B"), embedding.b.T)
    np.testing.assert_array_equal(written("lm_head.lora_B.weight"), lora["lm_head/kernel"].b.T)
    # Whatever the path is, PyTorch's name says it; and a path does, whatever PyTorch's name is.
    names = {"table/lora": "transformer.wte", "positions/embedding": "bert.positions", "q/lora": "bert.query"}
    lora = {path: low_rank(9, 4, 2) for path in names}
    save_adapter(tmp_path, lora, names=names)
    assert {key.split(".", 2)[2] for key in files(tmp_path)[1]} == {
        *(f"{name}.lora_embedding_{x}" for name in ("transformer.wte", "bert.positions") for x in "AB"),
        *(f"bert.query.lora_{x}.weight" for x in "AB"),
    }
    assert_equal(load_adapter(tmp_path, names=names), lora)


def test_what_a_file_does_not_tell_is_as_in_pytorch(tmp_path):
    """PEFT's files say nothing of layouts: heads have kernels, other weights stay (out, in)."""
    others = {
        "pre_classifier.weight": A,
        "classifier.dense.weight": A,
        "classifier.norm.weight": A[0],
        "model.embed_tokens.weight": A,
        "bert.pooler.dense.weight": A,
        "classifier.modules_to_save.default.dense.weight": A,
        "classifier.original_module.dense.weight": 2 * A,
        "q.base_layer.weight": A,
    }
    tensors = Q | {f"base_model.model.{key}": value for key, value in others.items()}
    config = {"task_type": "SEQ_CLS", "modules_to_save": ["pooler", "classifier", "score"]}
    write(tmp_path, config, tensors)
    expected = {
        "pre_classifier": {"kernel": A.T},
        "classifier": {"dense": {"kernel": A.T}, "norm": {"weight": A[0]}},
        "model.embed_tokens": {"embedding": A},
        "bert.pooler": {"dense": {"weight": A}},
        "q": {"kernel": A.T},
    }
    chex.assert_trees_all_equal(load_adapter(tmp_path)["modules_to_save"], expected)
    # GPT-2's layers are (in, out) in PyTorch, but not its heads.
    write(tmp_path, config | {"fan_in_fan_out": True}, tensors)
    chex.assert_trees_all_equal(load_adapter(tmp_path)["modules_to_save"], expected | {"q": {"weight": A}})


W = jnp.ones((6, 3))
HEADLESS = {
    "no head": ({}, "SEQ_CLS", "task_type 'SEQ_CLS' needs the trained head, .* \\(classifier or score\\)"),
    "no answer": ({}, "QUESTION_ANS", 'modules_to_save={"qa_outputs": {"kernel": ...'),
    "a bias for a head": ({"classifier": {"bias": W[0]}}, "TOKEN_CLS", "'TOKEN_CLS' needs the trained head"),
    "nothing": ({"score": {}}, None, r"modules_to_save\['score'\] has no parameters"),
    "no tree": ({"score": W}, None, r"modules_to_save\['score'\], '': .*; expected arrays by their names"),
    "no array": ({"score": {"kernel": 1.0}}, None, r"\['score'\], 'kernel': float; expected arrays"),
    "a key": ({"score": {"key": jax.random.key(0)}}, None, r"\['score'\], 'key': .*; expected arrays"),
    "LoRA": ({"score": ONE}, None, r"\['score'\], 'q/kernel': LowRank; expected arrays"),
    "convolution": (
        {"c": {"kernel": W[..., None]}},
        None,
        r"a kernel \(6, 3, 1\); .* give another's as 'wei",
    ),
    "twice": (
        {"c": {"kernel": W, "weight": W}},
        None,
        r"another parameter is 'base_model\.model\.c\.weight'",
    ),
    "around": (
        {"layers.0": {"norm": {"scale": W[0]}}},
        None,
        r"layers\.0\.q has a LoRA parameter, but layers\.0",
    ),
}


@pytest.mark.parametrize("trained, task, message", HEADLESS.values(), ids=HEADLESS.keys())
def test_heads_that_cannot_be_written(trained, task, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        save_adapter(
            tmp_path / "adapter",
            ONE,
            names={"q/kernel": "layers.0.q"},
            task_type=task,
            modules_to_save=trained,
        )
    assert not (tmp_path / "adapter").exists()


def test_more_that_cannot_be_written(tmp_path):
    with pytest.raises(ValueError, match="score has a LoRA parameter, but score is trained and saved"):
        lora = {"score": ONE["q/kernel"]}
        save_adapter(tmp_path, lora, task_type="SEQ_CLS", modules_to_save={"classifier": head()})
    with pytest.raises(ValueError, match=r"'kernel': a kernel \(6, 3\); expected a dense layer's"):
        save_adapter(tmp_path, ONE, fan_in_fan_out=True, modules_to_save={"h.0.mlp.c_fc": {"kernel": W}})
    save_adapter(tmp_path, ONE, fan_in_fan_out=True, modules_to_save={"score": {"kernel": W}})


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no adapter_config\.json; found no such folder"):
        load_adapter(tmp_path / "nowhere")
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"no adapter_model\.safetensors; found .*adapter_model\.bin"):
        load_adapter(tmp_path)
