"""The tokenizer of a pretrained model: loaded from its folder, held against its weights, and used."""

import functools
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import tokenizers
from jaxtyping import Int
from tokenizers import pre_tokenizers

from experiments import ExperimentError
from experiments.models.gguf_files import gguf_value, read_gguf

_bytes = partial(pre_tokenizers.ByteLevel, add_prefix_space=False)
# By GGUF's name: how a text is normalized, and split into words before byte pairs are merged in them.
_SPLITS = {
    "smollm": (None, [pre_tokenizers.Digits(individual_digits=True), _bytes()]),
    "qwen2": (
        tokenizers.normalizers.NFC(),
        [
            pre_tokenizers.Split(
                tokenizers.Regex(
                    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
                    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
                ),
                behavior="isolated",
            ),
            _bytes(use_regex=False),
        ],
    ),
}
CHUNK = 10_000  # an encoding takes kilobytes until its ids are copied: not all of them at once


@functools.cache
def load_tokenizer(path: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a model: in its folder, from tokenizer.json, or in its GGUF file."""
    if path.suffix == ".gguf":
        return _from_gguf(path)
    path = path / "tokenizer.json"
    if not path.is_file():
        raise ExperimentError(
            f"{path} is missing: copy it from the checkpoint that the weights come from, or write it with "
            "transformers: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises a bare Exception
        raise ExperimentError(f"{path} cannot be read: copy it again from the checkpoint. {error}") from error


def _from_gguf(path: Path) -> tokenizers.Tokenizer:
    """Byte pairs in byte-level words; what else GGUF has is refused."""
    reader = read_gguf(path)
    value = lambda key, default=None: gguf_value(reader, f"tokenizer.ggml.{key}", default)
    for key, supported in (("model", ("gpt2",)), ("pre", tuple(_SPLITS)), ("add_bos_token", (False,))):
        found = value(key, False if key == "add_bos_token" else None)
        if found not in supported:
            expected = " or ".join(map(repr, supported))
            raise ExperimentError(f"{path}: tokenizer.ggml.{key} is {found!r}; only {expected} is supported")
    words, kinds, unknown = value("tokens", []), value("token_type", []), value("unknown_token_id")
    vocabulary = {word: i for i, word in enumerate(words)}
    if not len(vocabulary) == len(words) == len(kinds):
        counts = f"{len(words)} tokens, {len(vocabulary)} of them different, of {len(kinds)} types"
        raise ExperimentError(f"{path}: tokenizer.ggml has {counts}")
    merges = [tuple(merge.split(" ")) for merge in value("merges", [])]
    try:
        unknown = None if unknown is None else words[unknown]
        model = tokenizers.models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True)
    except Exception as error:  # tokenizers raises a bare Exception
        raise ExperimentError(f"{path}: its tokenizer cannot be read: {error}") from error
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer, words_then_bytes = _SPLITS[value("pre")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(words_then_bytes)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    added = {gguf.TokenType.CONTROL: True, gguf.TokenType.USER_DEFINED: False}  # whether they are special
    tokenizer.add_tokens(
        [
            tokenizers.AddedToken(word, normalized=False, special=added[kind])
            for word, kind in zip(words, kinds, strict=True)
            if kind in added
        ]
    )
    return tokenizer


def check_vocabulary(tokenizer: tokenizers.Tokenizer, vocab_size: int, folder: Path) -> None:
    """Every token has a row in the embedding table; rows to spare are padding and do no harm."""
    known = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    if known > vocab_size:
        raise ExperimentError(
            f"the tokenizer in {folder} knows {known} tokens, the weights {vocab_size}: take both from one "
            "checkpoint"
        )


def encode(
    tokenizer: tokenizers.Tokenizer, texts: Sequence[tuple[str, ...]], max_length: int
) -> tuple[list[Int[np.ndarray, " L"]], list[Int[np.ndarray, " L"]]]:
    """Token ids and token types of sentences or pairs, special tokens included, without padding.

    Args:
      texts: of one or two sentences each.
      max_length: of the tokens; the longer sentence of a pair is cut first.
    """
    sentences = len(texts[0])
    least = tokenizer.num_special_tokens_to_add(sentences == 2) + sentences
    if max_length < least:
        raise ExperimentError(f"max-length is {max_length}; expected {least} or more")
    tokenizer = tokenizers.Tokenizer.from_str(tokenizer.to_str())  # the caller's keeps its settings
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length, strategy="longest_first")
    inputs = [text if sentences == 2 else text[0] for text in texts]
    tokens, segments = [], []
    for start in range(0, len(inputs), CHUNK):
        for encoding in tokenizer.encode_batch_fast(inputs[start : start + CHUNK]):
            tokens.append(np.asarray(encoding.ids, np.int32))
            segments.append(np.asarray(encoding.type_ids, np.int32))
    return tokens, segments
