"""The commands that the documents name are commands."""

import pathlib
import re
import shlex

import pytest

from benchmarks import steps, tunix
from benchmarks.__main__ import parse
from benchmarks.layers import Layers
from benchmarks.tunix import Tunix

ROOT = pathlib.Path(__file__).parents[2]
COMMANDS = [
    command
    for path in (ROOT / "docs" / "experiments.md", ROOT / "benchmarks" / "PERFORMANCE.md")
    for command in re.findall(r"python -m benchmarks ([^`\n]+)", path.read_text())
]


def test_there_are_commands():
    assert {shlex.split(command)[0] for command in COMMANDS} == {
        "stack",
        "unrolled",
        "encoder",
        "matrix",
        "scaling",
        "tunix",
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_understood(command):
    workload = parse(shlex.split(command, comments=True))
    task = Layers(layers=1, width=8, tokens=8, rank=2)
    if isinstance(workload, Tunix):
        assert set(workload.methods) <= set(tunix.NAMES)
        return
    for method in getattr(workload, "methods", ()):
        steps.parse(method, task)
