"""The commands that the documents name: each is understood, and each of the results' starts."""

import dataclasses
import itertools
import pathlib
import re
import shlex
import textwrap

import numpy as np
import pytest
from PIL import Image

from experiments import cifar100, lm, mnist, sentences, text
from experiments.__main__ import _configs, parse
from experiments.training import train
from tests.experiments import decoders
from tests.experiments.encoders import BERT, random_tensors, write, write_tokenizer

ROOT = pathlib.Path(__file__).parents[2]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "good", "film"]


def commands(path):
    """In blocks of a shell's or a Makefile's lines, continued over several."""
    joined = re.sub(r"\\\n\s*", " ", path.read_text())
    return re.findall(r"^\s*(?:\$\(BIN\)/)?python -m experiments ((?:run|compare) [^`\n]+)", joined, re.M)


RESULTS = commands(ROOT / "experiments" / "RESULTS.md")
OTHERS = [z for name in ("docs/experiments.md", "Makefile") for z in commands(ROOT / name)]


def configs(command, output):
    command, choices = parse(shlex.split(command, comments=True))
    seeds = getattr(command, "seeds", ()) or command.task.seeds
    return _configs(dataclasses.replace(command, output=output), choices, seeds)


class Started(Exception):
    pass


def stop(*_):
    raise Started


def test_there_are_commands():
    assert len(RESULTS) > 10 and len(OTHERS) > 8
    assert {z.split()[1] for z in RESULTS} == {"linear", "mnist", "cifar100", "lm"}


@pytest.mark.parametrize("command", OTHERS)
def test_every_command_is_understood(command, tmp_path):
    assert configs(command, tmp_path)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Settings of the tasks with less of everything: a tiny encoder, and a few examples of each data set."""
    folder = tmp_path_factory.mktemp("few")
    sizes = BERT | {"vocab_size": len(WORDS), "max_position_embeddings": 64}
    weights = write_tokenizer(write(folder / "tiny", sizes, random_tensors(sizes)), WORDS)
    for name in ("sst2", "mrpc", "stsb"):
        spec = sentences.SPECS[name]
        lines = [
            "\t".join((*spec.texts, spec.label)),
            *["\t".join(["good film"] * len(spec.texts) + ["1"])] * 48,
        ]
        (folder / spec.folder).mkdir()
        for split in ("train", "dev"):
            (folder / spec.folder / f"{split}.tsv").write_text("\n".join(lines))
    names = itertools.product(("train", "test"), ("cat", "dog"), ("0.png", "1.png"))
    for path in (folder.joinpath(*name) for name in names):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32)).save(path)
    sizes = decoders.LLAMA | {"vocab_size": len(WORDS)}
    decoder = write_tokenizer(write(folder / "decoder", sizes, decoders.random_tensors(sizes)), WORDS)
    (folder / "text.txt").write_text("a good film " * 100)
    small = {"weights": decoder, "data": folder / "text.txt", "length": 4, "rank": 2, "steps": 2}
    return {
        lm.Lm: small,
        mnist.Mnist: {"batch_size": 8},
        cifar100.Cifar100: {"data_dir": folder, "examples": 2, "batch_size": 2},
        text.Text: {"weights": weights, "data_dir": folder, "examples": 32},
    }


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("i", range(len(RESULTS)), ids=lambda i: textwrap.shorten(RESULTS[i], 60))
def test_every_result_starts(i, few, tmp_path):
    """With one step of one of its runs: another one in each command."""
    found = configs(RESULTS[i], tmp_path)
    config = found[np.random.default_rng(i).integers(len(found))]
    changes = few.get(type(config.task), {})
    with pytest.raises(Started):
        train(dataclasses.replace(config, task=dataclasses.replace(config.task, **changes)), stop)
