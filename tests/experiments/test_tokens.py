import numpy as np
import pytest
import tokenizers

from experiments import ExperimentError, tokens
from tests.experiments.decoders import LLAMA, tokenizer_keys, write_gguf
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


MERGES = ["Ġ Ġ", "Ċ Ċ", "1 9", "i n", "e Ģ", "Ġ 1", "Ã ©", "Ċ Ġ", "' s", "i x"]
CONTROL = ("<|endoftext|>", "<|im_start|>")


def in_gguf(path, **others):
    return tokens.load_tokenizer(
        write_gguf(path / "a.gguf", LLAMA, {}, tokenizer=tokenizer_keys(MERGES, CONTROL, ("<br>",), **others))
    )


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("smollm", "in 19", "in Ġ 1 9"),  # a digit is a word of its own
        ("smollm", "n  19", "n ĠĠ 1 9"),  # and the blanks in front are another
        ("smollm", "n  n", "n Ġ Ġ n"),  # while one of these belongs to the next word
        ("smollm", "i's", "i 's"),
        ("smollm", "i\n\nn", "i Ċ Ċ n"),
        ("smollm", "<|im_start|>in<br>", "<|im_start|> in <br>"),
        ("smollm", "n\4\4n", "n <|endoftext|> n"),
        ("smollm", "\u00e9 e\u0301", "Ã© Ġ e Ì ģ"),
        ("qwen2", "\u00e9 e\u0301", "Ã© Ġ Ã©"),
        ("qwen2", "n\n\n in  19", "n ĊĊ Ġ in Ġ Ġ 1 9"),
        ("qwen2", "'SIX", "' S I X"),
        ("qwen2", "!ix", "! ix"),
    ],
)
def test_gguf(tmp_path, pre, text, expected):
    tokenizer = in_gguf(tmp_path, pre=pre)
    encoding = tokenizer.encode(text)
    assert encoding.tokens == expected.split()
    decoded = tokenizer.decode(encoding.ids, skip_special_tokens=False)
    if pre == "smollm":
        assert decoded.replace("<|endoftext|>", "\4\4") == text


def test_special_tokens_of_gguf(tmp_path):
    tokenizer = in_gguf(tmp_path)
    ids = tokenizer.encode("<|im_start|>in<br>").ids
    assert ids[0] == 1
    assert tokenizer.decode(ids) == "in<br>"
    assert tokenizer.get_vocab_size() == 2 + 255 + len(MERGES) + 1
    assert in_gguf(tmp_path, unknown_token_id=1).encode("\4").ids == [0]  # the file is read once


BAD_TOKENIZERS = {
    r"tokenizer\.ggml\.model is 'llama'; only 'gpt2' is supported": {"model": "llama"},
    r"tokenizer\.ggml\.model is None; only 'gpt2' is supported": {"model": None},
    r"tokenizer\.ggml\.pre is 'deepseek-llm'; only 'smollm' or 'qwen2' is": {"pre": "deepseek-llm"},
    r"tokenizer\.ggml\.pre is None; only": {"pre": None},
    r"tokenizer\.ggml\.add_bos_token is True; only False is": {"add_bos_token": True},
    r"tokenizer\.ggml has 3 tokens, 2 of them different, of 3 types": {
        "tokens": ["a", "b", "a"],
        "token_type": [1, 1, 1],
    },
    r"tokenizer\.ggml has 268 tokens, 268 of them different, of 1 types": {"token_type": [1]},
    r"its tokenizer cannot be read: .*`ab`": {"merges": ["a b"]},
    r"its tokenizer cannot be read: ": {"unknown_token_id": 1000},
}


@pytest.mark.parametrize("message", BAD_TOKENIZERS)
def test_bad_gguf(tmp_path, message):
    with pytest.raises(ExperimentError, match=rf"{tmp_path}/a\.gguf: {message}"):
        in_gguf(tmp_path, **BAD_TOKENIZERS[message])
