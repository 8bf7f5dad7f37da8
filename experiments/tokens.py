"""The tokenizer of a pretrained model: loaded from its folder, held against its weights, and used."""

import functools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers
from jaxtyping import Int
from tokenizers import models, normalizers, pre_tokenizers, processors

from experiments import ExperimentError

CHUNK = 10_000  # an encoding takes kilobytes until its ids are copied: not all of them at once


@functools.cache
def load_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    """The tokenizer in a model's folder, from the first of these that is there.

    `tokenizer.json`, whatever it holds; `vocab.txt`, BERT's WordPiece, lower case unless
    `tokenizer_config.json` says otherwise; `vocab.json` and `merges.txt`, RoBERTa's byte-level BPE.

    Raises:
      ExperimentError: there is no such folder, none of the files, or they cannot be read.
    """
    if not folder.is_dir():
        raise ExperimentError(f"{folder} is not a folder; expected that of a pretrained model")
    load = None
    for files, loader in _LOADERS.items():
        if all((folder / name).is_file() for name in files):
            load = loader
            break
    if load is None:
        raise ExperimentError(
            f"{folder} has no tokenizer; expected tokenizer.json, or vocab.txt (BERT), or vocab.json and "
            "merges.txt (RoBERTa): copy them from the checkpoint that the weights come from"
        )
    try:
        return load(folder)
    except ExperimentError:
        raise
    except Exception as error:  # tokenizers raises a bare Exception
        raise ExperimentError(
            f"{folder}: {' and '.join(files)} cannot be read: copy them again from the checkpoint. "
            f"{type(error).__name__}: {error}"
        ) from error


def check_vocabulary(tokenizer: tokenizers.Tokenizer, vocab_size: int, folder: Path | None = None) -> None:
    """Every token has a row in the embedding table; rows to spare are padding and do no harm.

    Args:
      folder: that the tokenizer comes from, for the message.

    Raises:
      ExperimentError: some token has none, and would silently get another's.
    """
    known = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    if known > vocab_size:
        raise ExperimentError(
            f"the tokenizer{f' in {folder}' if folder else ''} knows {known} tokens, the weights "
            f"{vocab_size}: take both from one checkpoint"
        )


def encode(
    tokenizer: tokenizers.Tokenizer, texts: Sequence[tuple[str, ...]], max_length: int
) -> tuple[list[Int[np.ndarray, " L"]], list[Int[np.ndarray, " L"]]]:
    """Token ids and token types of sentences or pairs, special tokens included, without padding.

    Args:
      texts: of one or two sentences each.
      max_length: of the tokens; the longer sentence of a pair is cut first.

    Raises:
      ExperimentError: there is no room for a token of each sentence.
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


def _bert(folder: Path) -> tokenizers.Tokenizer:
    config = _config(folder)
    vocab = folder / "vocab.txt"
    tokenizer = tokenizers.Tokenizer(models.WordPiece.from_file(str(vocab), unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=config.get("do_lower_case", True),
        strip_accents=config.get("strip_accents"),
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = _special(tokenizer, ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], vocab)
    tokenizer.post_processor = processors.BertProcessing(
        ("[SEP]", special["[SEP]"]), ("[CLS]", special["[CLS]"])
    )
    return tokenizer


def _roberta(folder: Path) -> tokenizers.Tokenizer:
    prefix = _config(folder).get("add_prefix_space", False)
    vocab = folder / "vocab.json"
    tokenizer = tokenizers.Tokenizer(models.BPE.from_file(str(vocab), str(folder / "merges.txt")))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    special = _special(tokenizer, ["<s>", "<pad>", "</s>", "<unk>"], vocab)
    if tokenizer.token_to_id("<mask>") is not None:  # it takes the space before it
        tokenizer.add_special_tokens([tokenizers.AddedToken("<mask>", lstrip=True, normalized=False)])
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", special["</s>"]), ("<s>", special["<s>"]), add_prefix_space=prefix
    )
    return tokenizer


def _special(tokenizer: tokenizers.Tokenizer, names: list[str], vocab: Path) -> dict[str, int]:
    """The special tokens' ids; they must be in the vocabulary, new ones would have no embedding."""
    ids = {name: tokenizer.token_to_id(name) for name in names}
    missing = [name for name, token in ids.items() if token is None]
    if missing:
        raise ExperimentError(f"{vocab} lacks {', '.join(missing)}; expected a model's vocabulary")
    tokenizer.add_special_tokens(names)
    return ids


def _config(folder: Path) -> dict:
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ExperimentError(f"{path} is not JSON: copy it again from the checkpoint. {error}") from error


_LOADERS = {
    ("tokenizer.json",): lambda folder: tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")),
    ("vocab.txt",): _bert,
    ("vocab.json", "merges.txt"): _roberta,
}
