"""The README's programs run as they stand, and its table is the catalogue's."""

import re

import chex
import jax
import numpy as np
import pytest

from benchmarks.catalogue import markdown
from tests.sources import README, programs

# Programs with what these tests do not install: tests/parity runs them.
ELSEWHERE = ("oplora_jax.tunix", "gemma")


class Names(dict):
    """The names that a program binds, for its functions too; every loss that it binds is kept."""

    def __init__(self, scope):
        self.scope, self.losses = scope, []

    def __setitem__(self, name, value):
        super().__setitem__(name, value)
        self.scope[name] = value
        if name == "loss":
            self.losses.append(float(value))


def check(program, before, after, losses):
    """What a program shows: that it trains, or that what it saves comes back bit for bit."""
    if "load_adapter(" in program:
        assert losses == []
        assert after["lora"] is not before["lora"] and all(np.any(p.b) for p in before["lora"].values())
        chex.assert_trees_all_equal(after["lora"], before["lora"])
    elif "manager.restore(" in program:
        chex.assert_trees_all_equal(after["restored"], {"lora": before["lora"], "state": before["state"]})
        _, _, loss = before["train_step"](before["lora"], before["state"])
        assert losses == [float(loss)]  # it goes on as if never interrupted
    else:
        assert losses[-1] < 0.8 * losses[0] and len(losses) == 10


def test_programs(tmp_path, monkeypatch):
    """Within a section each goes on where the one before it ends; each section, where the very first does."""
    monkeypatch.chdir(tmp_path)
    first: dict = {"__name__": "readme"}
    count = 0
    with jax.numpy_rank_promotion("allow"):  # as a user's JAX is configured
        for section in README.split("\n## "):
            scope = dict(first)
            for program in programs(section):
                if any(name in program for name in ELSEWHERE):
                    continue
                before, names = dict(scope), Names(scope)
                exec(compile(program, "README.md", "exec"), scope, names)
                check(program, before, scope, names.losses)
                first = first if count else dict(scope)
                count += 1
    assert count == 11


def test_the_table_of_optimizers():
    """`python -m experiments optimizers --into README.md` writes it; XLA's counts change with its version."""
    cells = lambda table: [line.split(" | ") for line in table.splitlines()]
    [written] = re.findall(r"^\| optimizer \|.*(?:\n\|.*)*", README, flags=re.MULTILINE)
    for row, computed in zip(cells(written), cells(markdown()), strict=True):
        operations = row.pop(3), computed.pop(3)
        assert row == computed
        if operations[0] != operations[1]:
            # Two digits, and what the compiler does about single numbers.
            assert float(operations[0]) == pytest.approx(float(operations[1]), rel=0.1)
