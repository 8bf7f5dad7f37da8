"""The programs of the README and of the site run as they stand, and print what is shown."""

import contextlib
import io
import re

import jax
import pytest

from benchmarks.catalogue import markdown
from tests.sources import PAGES, ROOT, programs

# Programs with what these tests do not install: tests/parity runs them.
ELSEWHERE = re.compile(
    r"^(?:import|from) (?:oplora_jax\.tunix|gemma|peft|torch|transformers|tunix)\b", re.MULTILINE
)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")


class Names(dict):
    """The names that a program binds, for its functions too; every loss that it binds is kept."""

    def __init__(self, scope):
        self.scope, self.losses = scope, []

    def __setitem__(self, name, value):
        super().__setitem__(name, value)
        self.scope[name] = value
        if name == "loss":
            self.losses.append(float(value))


def check_output(printed, shown):
    """The same words and whole numbers; fractions as another processor or another XLA may round them."""
    assert NUMBER.sub("#", printed).split() == NUMBER.sub("#", shown).split()
    for found, expected in zip(NUMBER.findall(printed), NUMBER.findall(shown), strict=True):
        last_digit = 10.0 ** -len(expected.partition(".")[2].partition("e")[0])
        assert found == expected or "." in expected
        assert float(found) == pytest.approx(float(expected), 0.02, 1.5 * last_digit)


@pytest.mark.parametrize("page", [page for page in PAGES if any(programs(page))])
def test_programs(page, tmp_path, monkeypatch):
    """Each goes on where the one before it on its page ends; where it trains, the loss falls."""
    monkeypatch.chdir(tmp_path)
    scope: dict = {"__name__": "page"}
    with jax.numpy_rank_promotion("allow"):  # as a user's JAX is configured
        for program, shown in programs(page):
            if ELSEWHERE.search(program):
                continue
            names, printed = Names(scope), io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(program, page, "exec"), scope, names)
            if len(names.losses) >= 10:
                assert names.losses[-1] < 0.8 * names.losses[0]
            if shown is not None:
                check_output(printed.getvalue(), shown)


def test_pages_have_programs():
    """A fence of Python that the pattern misses would be a program that never ran."""
    for page, text in PAGES.items():
        assert len(list(programs(page))) == len(
            re.findall(r"^ *```+ *(?:python|py)\b", text, re.MULTILINE)
        ), page


def test_the_readme_is_short():
    lines = PAGES["README.md"].splitlines()
    assert len(lines) <= 130
    assert [line for line in lines if len(line) > 110 and not line.startswith("|")] == []


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", PAGES["README.md"]))
def test_links_of_the_readme(target):
    assert (ROOT / target).exists()


def test_the_table_of_optimizers():
    """`python -m experiments optimizers --into docs/optimizers.md` writes it; XLA's counts vary."""
    cells = lambda table: [line.split(" | ") for line in table.splitlines()]
    [written] = re.findall(
        r"^\| optimizer \| gradient.*(?:\n\|.*)*", PAGES["docs/optimizers.md"], flags=re.MULTILINE
    )
    for row, computed in zip(cells(written), cells(markdown()), strict=True):
        operations = row.pop(3), computed.pop(3)
        assert row == computed
        if operations[0] != operations[1]:
            # Two digits, and what the compiler does about single numbers.
            assert float(operations[0]) == pytest.approx(float(operations[1]), rel=0.1)
