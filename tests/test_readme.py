"""The README's programs run as they stand, one after the other."""

import pathlib
import re

import jax

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_programs():
    programs = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(programs) == 3
    scope: dict = {"__name__": "readme"}
    with jax.numpy_rank_promotion("allow"):  # as a user's JAX is configured
        for program in programs:
            exec(compile(program, str(README), "exec"), scope)
            assert scope["loss"] < 0.9  # from 1 or more at the start
