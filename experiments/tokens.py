"""The tokenizer of a pretrained model: loaded from its folder, held against its weights, and used."""

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers
from jaxtyping import Int

from experiments import ExperimentError

CHUNK = 10_000  # an encoding takes kilobytes until its ids are copied: not all of them at once


@functools.cache
def load_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    """The tokenizer in a model's folder, from its tokenizer.json."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ExperimentError(
            f"{path} is missing: copy it from the checkpoint that the weights come from, or write it with "
            "transformers: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises a bare Exception
        raise ExperimentError(f"{path} cannot be read: copy it again from the checkpoint. {error}") from error


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
