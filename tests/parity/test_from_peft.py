"""Both columns of the page for those who come from PEFT run, and load each other's adapters."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: everything here is made on the spot

import contextlib
import io
import re

import jax
import numpy as np
import pytest

from tests.sources import programs

pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.parity,
    # PEFT 0.21.2 asks for a name that transformers 5.23 has changed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

PYTORCH = re.compile(r"^(?:import|from) (?:peft|torch|transformers)\b", re.MULTILINE)
ALL = [program for program, _ in programs("docs/how-to/from-peft.md")]
LEFT = [program for program in ALL if PYTORCH.search(program)]
RIGHT = [program for program in ALL if not PYTORCH.search(program)]
SAVING, MERGING = 5, 6  # their places in both columns


class Losses(dict):
    """The names of a program, and every loss that it binds."""

    def __init__(self):
        super().__init__(__name__="page")
        self.losses = []

    def __setitem__(self, name, value):
        super().__setitem__(name, value)
        if name == "loss":
            self.losses.append(value.item())


def run(column, scope):
    """What the programs print, in a scope in which they leave their names."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), jax.numpy_rank_promotion("allow"):
        for program in column:
            exec(compile(program, "docs/how-to/from-peft.md", "exec"), scope)
    return printed.getvalue()


def edited(program, old, new):
    assert program.count(old) == 1, old
    return program.replace(old, new)


def test_the_columns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    theirs, ours = Losses(), Losses()
    printed = run(LEFT, theirs)
    # In float32, for numbers that can be compared, and on the weights of the left model.
    first = edited(RIGHT[0], "jnp.bfloat16", "jnp.float32")
    first = edited(first, "base.init(jax.random.key(0), tokens)", "{'params': load('base')[1]}")
    loader = edited(next(program for program in RIGHT if "load_decoder" in program), "bfloat16", "float32")
    printed_here = run([loader, first, *RIGHT[1 : MERGING + 1]], ours)
    for scope in (theirs, ours):
        assert len(scope.losses) >= 20 and scope.losses[-1] < 0.5 * scope.losses[0]
    [count] = re.findall(r"trainable params: ([\d,]+)", printed)
    assert printed_here.split() == ["trainable", "params:", count.replace(",", "")]
    of_theirs, of_ours = theirs["logits"].numpy(), np.asarray(ours["logits"])
    assert np.abs(of_theirs - of_ours).max() > 1.0  # two trainings

    run([edited(RIGHT[SAVING], 'load_adapter("adapter_jax"', 'load_adapter("adapter"'), RIGHT[MERGING]], ours)
    saving = edited(LEFT[SAVING], 'model.save_pretrained("adapter")', "")
    run([edited(saving, '"adapter"', '"adapter_jax"'), LEFT[MERGING]], theirs)
    # float32 through two layers, logits of about 10.
    np.testing.assert_allclose(ours["logits"], of_theirs, atol=2e-4)
    np.testing.assert_allclose(theirs["logits"].numpy(), of_ours, atol=2e-4)
