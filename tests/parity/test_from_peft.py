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

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

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


def test_the_classifier(tmp_path, monkeypatch):
    """An adapter with its head that PEFT has trained: the same logits here, and back there merged."""
    monkeypatch.chdir(tmp_path)
    sizes = {"vocab_size": 30, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12}
    torch.manual_seed(0)
    base = transformers.BertForSequenceClassification(
        transformers.BertConfig(**sizes, num_hidden_layers=2, initializer_range=0.5)
    )
    base.save_pretrained("bert")
    config = peft.LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "value"])
    model = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    model.save_pretrained("bert_adapter")
    tokens, scope = np.arange(14).reshape(2, 7), Losses()
    inputs = tokens, np.ones(tokens.shape, bool), np.zeros_like(tokens)
    with torch.no_grad():
        expected = model(input_ids=torch.from_numpy(tokens)).logits.numpy()
    [program] = (program for program in RIGHT if "def load_bert" in program)
    run([program], scope)
    here, params = scope["load_bert"]("bert", "bert_adapter", *inputs)
    # float32 through two layers of width 8.
    np.testing.assert_allclose(here.apply({"params": params}, *inputs), expected, rtol=1e-4, atol=1e-4)

    scope["save_bert"]("back", params, 2)
    base = transformers.BertForSequenceClassification.from_pretrained("bert")
    merged = peft.PeftModel.from_pretrained(base, "back").merge_and_unload().eval()
    with torch.no_grad():
        logits = merged(input_ids=torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
