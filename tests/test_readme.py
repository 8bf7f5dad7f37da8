"""The README's programs run as they stand, and its table is the catalogue's."""

import pathlib
import re

import jax
import pytest

from experiments.catalogue import markdown

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()


# What Qwix and Orbax import and call is theirs.
@pytest.mark.filterwarnings(r"ignore::DeprecationWarning:qwix\._src")
def test_programs(tmp_path, monkeypatch):
    """Within a section each goes on where the one before it ends; each section, where the very first does."""
    monkeypatch.chdir(tmp_path)
    first: dict = {"__name__": "readme"}
    count = 0
    with jax.numpy_rank_promotion("allow"):  # as a user's JAX is configured
        for section in README.split("\n## "):
            scope = dict(first)
            for program in re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL):
                exec(compile(program, "README.md", "exec"), scope)
                assert scope["loss"] < 0.9  # from 1 or more at the start
                first = first if count else dict(scope)
                count += 1
    assert count == 8


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
