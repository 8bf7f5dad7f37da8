"""Fine-tuning of an encoder: a tiny random one on tiny files, and the bundled one."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments import ExperimentError, metrics, tokens
from experiments.methods import method
from experiments.sentences import Sentences
from experiments.storage import Config, read_metrics
from experiments.text import Batch, Text
from experiments.training import load_parameters, train
from oplora_jax import LowRank
from tests.experiments.encoders import BERT, random_tensors, write, write_tokenizer

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["good", "bad", "film", "plot", "fun", "dull", "a", "the", "is", "was"]


@pytest.fixture
def folders(tmp_path):
    """(weights with a tokenizer, GLUE)."""
    weights = write(tmp_path / "tiny", BERT, random_tensors(BERT))
    write_tokenizer(weights, [*SPECIAL, *WORDS])
    rng = np.random.default_rng(0)
    text = lambda: " ".join(rng.choice(WORDS[2:], rng.integers(1, 3)))
    glue = tmp_path / "glue"
    for split, size in (("train", 20), ("dev", 7)):
        rows = {
            "SST-2": [
                "sentence\tlabel",
                *(f"{'good' if i % 2 else 'bad'} {text()}\t{i % 2}" for i in range(size)),
            ],
            "STS-B": [
                "sentence1\tsentence2\tscore",
                *(f"{text()}\t{text()}\t{i % 6 - 0.5}" for i in range(size)),
            ],
        }
        for name, lines in rows.items():
            (glue / name).mkdir(parents=True, exist_ok=True)
            (glue / name / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return weights, glue


def tiny(folders, dataset="sst2", **changes):
    weights, glue = folders
    settings = {"epochs": 1, "batch_size": 4, "max_length": 10, "dropout": 0.0, **changes}
    return Text("glue", dataset, data_dir=glue, weights=weights, **settings)


@pytest.mark.parametrize(
    ("dataset", "name", "names"),
    [
        ("sst2", "oplora", ["test_accuracy"]),
        ("sst2", "full_adamw", ["test_accuracy"]),
        ("stsb", "scaled_oplora", ["test_pearson", "test_spearman"]),
    ],
)
def test_run(folders, tmp_path, dataset, name, names):
    task = tiny(folders, dataset, dropout=0.1)
    config = Config(task, method(name), 0.01, 0, tmp_path)
    rows = train(config)
    assert rows["epoch"].to_list() == [0.25, 0.5, 0.75, 1]
    assert set(rows) >= {"train_loss", *names} and np.isfinite(rows["train_loss"]).all()
    assert (*names, "train_loss") == task.metrics
    assert read_metrics(config.folder).equals(rows)
    assert set(rows) >= {z.replace("test_", "validation_") for z in names}
    assert task.selection == names[0].replace("test_", "validation_")
    trainable, frozen = load_parameters(config)
    # What trains is queries and values, by LoRA or in full, and the head; the rest is the checkpoint's.
    leaf = "kernel" if name == "full_adamw" else "lora"
    assert trainable["adapted"].keys() == {
        f"encoder/layer_{i}/attention/{part}/{leaf}" for i in range(2) for part in ("query", "value")
    }
    assert {path.split("/")[0] for path in trainable["others"]} == {"head_dense", "head_out"}
    if name == "full_adamw":
        assert frozen.keys() & {"encoder/layer_1/attention/query/bias", "encoder/layer_1/output/kernel"}
        return
    assert all(isinstance(z, LowRank) and np.any(np.asarray(z.b)) for z in trainable["adapted"].values())
    tensors = load_file(task.weights / "model.safetensors")
    kernel = tensors["encoder.layer.1.attention.self.query.weight"].T
    np.testing.assert_array_equal(frozen["encoder/layer_1/attention/query/kernel"], kernel)


@pytest.mark.parametrize("dataset", ["sst2", "stsb"])
def test_loss_and_metrics(folders, dataset):
    task = tiny(folders, dataset)
    train_data, held_out = task.load(0)
    trainable, frozen = task.init(0, full=False)
    batch = task.take(train_data, np.arange(5))
    outputs = np.asarray(task._outputs(trainable, frozen, batch), np.float64)
    if dataset == "sst2":
        losses = np.log(np.exp(outputs).sum(-1)) - outputs[np.arange(5), batch.labels]
    else:
        losses = (outputs[:, 0] - batch.labels) ** 2
    weights = jnp.array([1.0, 1.0, 0.0, 1.0, 0.0])
    expected = losses[[0, 1, 3]].mean()
    # float32 throughout the encoder
    np.testing.assert_allclose(task.loss(trainable, frozen, batch, weights), expected, rtol=1e-5)
    # Padding changes nothing.
    used = batch.mask.sum(1).max()
    assert used < batch.mask.shape[1]
    narrow = Batch(*(z[:, :used] if z.ndim == 2 else z for z in batch))
    np.testing.assert_allclose(task.loss(trainable, frozen, narrow, weights), expected, rtol=1e-5)
    # Each sentence alone, in the files' order.
    data = held_out["test_"]
    alone = [task._outputs(trainable, frozen, task.take(data, np.array([i]))) for i in range(7)]
    found = metrics.score(
        [name.removeprefix("test_") for name in task.metrics], np.concatenate(alone), data.labels
    )
    assert task.evaluate(trainable, frozen, data) == pytest.approx(found, rel=1e-5)


def test_dropout_needs_a_key(folders):
    task = tiny(folders, dropout=0.5)
    trainable, frozen = task.init(0, full=False)
    batch = task.take(task.load(0)[0], np.arange(4))
    loss = lambda key=None: float(task.loss(trainable, frozen, batch, jnp.ones(4), key))
    assert (
        loss()
        == loss()
        == float(tiny(folders).loss(trainable, frozen, batch, jnp.ones(4), jax.random.key(0)))
    )
    assert len({loss(), loss(jax.random.key(0)), loss(jax.random.key(1))}) == 3


def test_bfloat16(folders, tmp_path):
    task = tiny(folders, dtype="bfloat16")
    trainable, frozen = task.init(0, full=False)
    assert {leaf.dtype for leaf in jax.tree.leaves(trainable)} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(frozen)} == {jnp.dtype("bfloat16")}
    assert np.isfinite(train(Config(task, method("oplora"), 0.01, 0, tmp_path))["train_loss"].iloc[-1])


def test_bundled_encoder_learns(tmp_path, monkeypatch):
    """48 film reviews, shown eight times, are known by heart."""
    task = Text(examples=48, epochs=8, batch_size=16, max_length=16, dropout=0.0)
    data, held_out = task.load(0)
    sizes = {prefix: len(z.labels) for prefix, z in held_out.items()}
    assert len(data.labels) == 48 and sizes == {"validation_": 1000, "test_": 1000}
    monkeypatch.setattr(Text, "load", lambda self, seed: (data, {"test_": data}))
    monkeypatch.setattr(Text, "evaluations", 1)
    rows = train(Config(task, method("lora_adamw"), 0.005, 0, tmp_path))
    assert rows["test_accuracy"].iloc[-1] > 0.9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "bundled"}, "dataset is sst2 and data is bundled; movies are bundled"),
        ({"dataset": "movies"}, "dataset is movies and data is glue"),
        ({"data_dir": None}, "data-dir is not given"),
        ({"dropout": 1.0}, "dropout is 1.0; expected 0 or more and less than 1"),
        ({"max_length": 11}, "max-length is 11; the encoder in .*tiny takes 10"),
        ({"examples": 16}, "examples is 16; expected 1 to 15"),
        ({"dataset": "rte"}, "has no folder RTE"),
    ],
)
def test_bad_settings(folders, changes, message):
    with pytest.raises(ExperimentError, match=message):
        dataclasses.replace(tiny(folders), **changes).load(0)


def test_weights_that_are_missing_or_do_not_fit(folders, tmp_path):
    task = tiny(folders)
    with pytest.raises(ExperimentError, match="no folder"):
        dataclasses.replace(task, weights=tmp_path / "none").load(0)
    write_tokenizer(task.weights, [*SPECIAL, *WORDS, *(f"word{i}" for i in range(30))])
    tokens.load_tokenizer.cache_clear()
    with pytest.raises(
        ExperimentError, match="knows 45 tokens, the weights 30: take both from one checkpoint"
    ):
        task.load(0)


def test_what_names_a_run(folders, tmp_path):
    task = tiny(folders)
    config = json.loads(Config(task, method("oplora"), 0.1, 0, tmp_path).to_json())
    assert config["task"] == "text_sst2" and config["weights"] == "tiny" and "data_dir" not in config
    assert task.protocol == "glue" and Text().protocol == "text" and Text().name == "text_movies"


def test_padding():
    rows = [np.arange(1, n + 1, dtype=np.int32) for n in (3, 17)]
    data = Sentences(rows, [0 * row for row in rows], np.array([0, 1]))
    task = Text()
    short, both = (task.take(data, np.array(rows)) for rows in ([0, 0], [0, 1]))
    assert short.tokens.shape == (2, 16) and both.tokens.shape == (2, 32)  # powers of two
    np.testing.assert_array_equal(both.mask.sum(1), [3, 17])
    np.testing.assert_array_equal(both.tokens[0], [1, 2, 3] + 29 * [0])
