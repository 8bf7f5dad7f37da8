"""Layers that are written out: what they compute, and how large a step's program is. No time is asserted."""

import csv
import json

import jax
import numpy as np
import pytest

from benchmarks import steps
from benchmarks.__main__ import main
from benchmarks.blocks import Blocks
from benchmarks.counts import instructions
from oplora_jax import is_low_rank

TINY = ["unrolled", "--blocks", "1", "--width", "8", "--tokens", "4", "--rank", "2"]
USUAL = Blocks(blocks=16, width=64, tokens=64, rank=8)


def compiled(name, task):
    step, start = steps.build(task, steps.parse(name, task))
    state, frozen = jax.eval_shape(start)
    return jax.jit(step, donate_argnums=0).lower(state, frozen, *task.data()).compile()


def test_there_are_112_parameters_in_7_shapes():
    trainable, _ = jax.eval_shape(lambda: USUAL.init(0, full=False))
    loras = jax.tree.leaves(trainable, is_leaf=is_low_rank)
    assert len(loras) == 112 and all(map(is_low_rank, loras))
    assert len({lora.shape for lora in loras}) == 7


def test_a_step_has_a_little_more_instructions_than_lora_adamw():
    """2.07 times as many were counted; the limit is the design's."""
    plain, ours = (instructions(compiled(name, USUAL)) for name in ("lora_adamw", "oplora_1:outer"))
    print(f"\n{ours} instructions, LoRA-AdamW {plain}: {ours / plain:.2f}")
    assert ours < 2.2 * plain


def by_hand(kernels, x):
    """A pass through the blocks in float64, one head after the other."""
    for kernel in kernels:
        query, key, value = (x @ kernel[name] for name in ("query", "key", "value"))
        keys, values = key.shape[1] // 2, value.shape[1] // 2
        attended = []
        for head in range(4):
            shared = head // 2
            scores = query[:, head * keys : (head + 1) * keys] @ key[:, shared * keys : (shared + 1) * keys].T
            weights = np.exp(scores / np.sqrt(keys))
            weights /= weights.sum(axis=1, keepdims=True)
            attended.append(weights @ value[:, shared * values : (shared + 1) * values])
        x = x + np.concatenate(attended, axis=1) @ kernel["output"]
        gate = x @ kernel["gate"]
        opened = np.repeat(gate / (1 + np.exp(-gate)), 2, axis=1) * (x @ kernel["up"])
        x = x + opened @ kernel["down"]
    return x


@pytest.mark.parametrize("full", [False, True])
def test_blocks_by_hand(full):
    task = Blocks(blocks=2, width=16, tokens=5, rank=3)
    trainable, frozen = task.init(0, full)
    x, y = (np.asarray(z, np.float64) for z in task.data())
    dense = lambda z: np.asarray(z.to_dense() if is_low_rank(z) else z, np.float64)
    kernels = jax.tree.map(dense, {**frozen, **trainable}["kernels"])
    if not full:
        loras = jax.tree.map(dense, trainable["loras"], is_leaf=is_low_rank)
        kernels = jax.tree.map(np.add, kernels, loras)
    expected = np.mean((by_hand(kernels, x) - y) ** 2)
    np.testing.assert_allclose(task.loss(trainable, frozen, *task.data()), expected, rtol=1e-4)  # float32


def test_unrolled(tmp_path, capsys):
    assert main([*TINY, "--methods", "oplora_1:outer", "--output", str(tmp_path)]) == 0
    with open(tmp_path / "unrolled.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["lora_adamw", "oplora_1:outer"]
    for name in ("instructions", "fusions", "compile_seconds"):
        assert float(rows[1][name]) > 0
        assert float(rows[1][f"{name}_ratio"]) > 0
    ratio = float(rows[1]["instructions"]) / float(rows[0]["instructions"])
    assert float(rows[1]["instructions_ratio"]) == ratio
    assert f"{ratio:.3f}" in capsys.readouterr().out
    assert json.loads((tmp_path / "unrolled.json").read_text())["settings"]["blocks"] == 1
    assert (tmp_path / "unrolled.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (["--blocks", "0"], "blocks is 0; expected 1 or more"),
        (["--width", "12"], "width is 12; expected a multiple of 8"),
        (["--rank", "5"], "rank is 5; expected at most 4, the width of the keys"),
    ],
)
def test_bad_sizes(setting, message, tmp_path, capsys):
    assert main([*TINY, *setting, "--output", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
