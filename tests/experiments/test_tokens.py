import numpy as np
import pytest
import tokenizers

from experiments import ExperimentError, tokens
from tests.experiments.encoders import write_tokenizer

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "film", "##s", "good", "A"]


@pytest.fixture
def tokenizer(tmp_path):
    return tokens.load_tokenizer(write_tokenizer(tmp_path, WORDS))


def ids(tokenizer, *texts, max_length=16):
    (result,), _ = tokens.encode(tokenizer, [texts], max_length)
    return [tokenizer.id_to_token(token) for token in result]


def test_tokens_and_segments(tokenizer):
    assert ids(tokenizer, "A films, [MASK]") == ["[CLS]", "a", "film", "##s", "[UNK]", "[MASK]", "[SEP]"]
    _, (segments,) = tokens.encode(tokenizer, [("a film", "good")], 16)
    assert segments.tolist() == [0, 0, 0, 0, 1, 1]
    assert segments.dtype == np.int32


def test_padding_that_was_saved_is_not_used(tmp_path):
    padded = tokenizers.Tokenizer.from_file(str(write_tokenizer(tmp_path, WORDS) / "tokenizer.json"))
    padded.enable_padding(length=64)
    padded.save(str(tmp_path / "tokenizer.json"))
    tokenizer = tokens.load_tokenizer(tmp_path)
    assert ids(tokenizer, "a") == ["[CLS]", "a", "[SEP]"]
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
def test_truncation(tokenizer, max_length, texts, expected):
    assert ids(tokenizer, *texts, max_length=max_length) == expected.split()


def test_chunks(tokenizer, monkeypatch):
    texts = [("a " * n,) for n in range(7)]
    whole, _ = tokens.encode(tokenizer, texts, 16)
    monkeypatch.setattr(tokens, "CHUNK", 3)
    parts, segments = tokens.encode(tokenizer, texts, 16)
    assert [len(row) for row in segments] == [n + 2 for n in range(7)]
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("texts", "max_length", "least"), [(("a",), 2, 3), (("a", "a"), 4, 5)])
def test_no_room(tokenizer, texts, max_length, least):
    with pytest.raises(ExperimentError, match=rf"max-length is {max_length}; expected {least} or more"):
        tokens.encode(tokenizer, [texts], max_length)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is missing: copy it from the checkpoint .*\\s*.*save_pretrained"),
        ("{", "cannot be read: copy"),
    ],
)
def test_no_tokenizer(tmp_path, content, message):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ExperimentError, match=rf"{tmp_path}/tokenizer.json {message}"):
        tokens.load_tokenizer(tmp_path)


def test_vocabulary(tokenizer, tmp_path):
    for rows in (10, 16):
        tokens.check_vocabulary(tokenizer, rows, tmp_path)
    with pytest.raises(ExperimentError, match=rf"in {tmp_path} knows 10 tokens, the weights 9: take both"):
        tokens.check_vocabulary(tokenizer, 9, tmp_path)


def test_added_tokens_count(tokenizer, tmp_path):
    tokenizer = tokenizers.Tokenizer.from_str(tokenizer.to_str())
    tokenizer.add_tokens(["oplora"])
    with pytest.raises(ExperimentError, match="knows 11 tokens, the weights 10"):
        tokens.check_vocabulary(tokenizer, 10, tmp_path)
