"""What the table of all optimizers claims is measured here."""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import oplora_jax
from benchmarks.catalogue import OPTIMIZERS, markdown, state_size, update_operations
from experiments.__main__ import main
from experiments.methods import PRESETS, method
from oplora_jax import LowRank
from tests.optimizers.cases import CASES, dense_tree, gradient_of, problem, run

each = pytest.mark.parametrize("name", OPTIMIZERS)
KIND = {"factors": "factors", "exact": "outer", "moments": "outer"}
N, M, R, TOKENS = 512, 384, 4, 640


def exported_optimizers():
    """The public functions that make a transformation from a learning rate, or from a base optimizer."""
    public = {name: getattr(oplora_jax, name) for name in oplora_jax.__all__}
    signatures = {name: inspect.signature(f) for name, f in public.items() if inspect.isfunction(f)}
    return {
        name
        for name, signature in signatures.items()
        if signature.return_annotation is optax.GradientTransformationExtraArgs
        and next(iter(signature.parameters), None) in ("learning_rate", "base")
    }


def test_the_table_is_complete():
    """Every optimizer is in the printed table, the table of cases, and the methods that are compared."""
    ours = exported_optimizers()
    assert {"oplora", "svdlora", "lora_fa"} < ours  # they are found
    _, _, *rows = markdown().splitlines()
    names = [row.split("`")[1] for row in rows]
    assert sorted(names) == sorted(ours | {"optax.sgd", "optax.adamw"})
    assert ours <= {case.of for case in CASES.values()}
    assert ours <= {method(name).of for name in PRESETS}


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("optax.sgd", R * (N + M)),
        ("optax.adamw", 2 * R * (N + M)),
        ("oplora", R * (N + M)),
        ("scaled_oplora", (R + 1) * (N + M) + 2),  # a momentum, the diagonals of the metric, two lengths
        ("svdlora", N * M),
        ("scaled_gd", 0),
        ("lora_rite", 2 * R * (N + M) + 2 * R**2),
        ("lora_fa", 2 * R * M),
    ],
)
def test_state_by_hand(name, size):
    assert state_size(name, N, M, R) == size


@each
def test_state_is_what_is_kept(name):
    n, m, r = 13, 9, 3
    state = OPTIMIZERS[name].factory(0.1).init(LowRank(jnp.ones((n, r)), jnp.ones((r, m))))
    assert state_size(name, n, m, r) == sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim)


@pytest.mark.parametrize(
    ("name", "operations"),
    [
        ("optax.sgd", 3 * R * (N + M)),
        ("optax.adamw", 12 * R * (N + M)),
        # x and dy times the factors of weights and momentum, forth and back.
        ("oplora", 8 * TOKENS * R * (N + M)),
        ("scaled_oplora", (4 * R + 2) * TOKENS * (N + M)),  # of the weights' factors alone, and the moments
        # The gradient and the increment are formed, and their sum is decomposed.
        ("svdlora", 2 * N * M * (R + TOKENS) + 14 * N * M**2 + 8 * M**3),
        # Two Gram matrices, and their inverses times the gradients.
        ("scaled_gd", (4 * R + 5) * R * (N + M)),
        ("lora_pro", (8 * R + 18) * N * M),
        # x and dy times the two bases, forth and back; the SVD that it starts with is not in a usual step.
        ("mofasgd", 4 * TOKENS * R * (N + M)),
    ],
)
def test_operations_by_hand(name, operations):
    """Within a quarter: leading terms, without what does not grow with n and m."""
    assert 0.8 < update_operations(name, N, M, R, TOKENS) / operations < 1.25


def test_the_table():
    """In units of the LoRA parameters, and of 2 N n m operations, at (768, 768), rank 8, 4096 tokens."""
    rows = [line.strip("| ").split(" | ") for line in markdown().splitlines()[2:]]
    cells = {row[0].strip("`"): row[1:] for row in rows}
    assert list(cells) == list(OPTIMIZERS)
    assert cells["svdlora"][:2] == ["exact", "48"]  # n m / (r (n + m))
    # The gradient formed, 1, the increment, r / N, and 22 n^3 for the SVD.
    assert float(cells["svdlora"][2]) == pytest.approx(1 + 8 / 4096 + 11 * 768 / 4096, rel=0.03)
    assert cells["optax.adamw"][1:4] == ["2", "< 0.001", "none"]
    assert cells["oplora"][3] == "orthogonal R (any R with `regularization=0.0`)"
    assert cells["oplora"][4] == "[2509.19977](https://arxiv.org/abs/2509.19977)"
    assert all(
        re.fullmatch(r"\[\d{4}\.\d{5}\]\(https://arxiv\.org/abs/\d{4}\.\d{5}\)", z[4]) for z in cells.values()
    )


def test_the_table_is_replaced_in_a_file(tmp_path, capsys):
    path = tmp_path / "page.md"
    path.write_text("before\n\n| optimizer | old |\n| --- | --- |\n| `oplora` | 1 |\n\nafter | here\n")
    assert main(["optimizers", "--into", str(path)]) == 0
    assert path.read_text() == f"before\n\n{markdown()}\n\nafter | here\n"
    path.write_text("nothing here\n")
    assert main(["optimizers", "--into", str(path)]) == 1
    assert "page.md has 0 tables that begin with '| optimizer |'; expected one" in capsys.readouterr().err
    assert path.read_text() == "nothing here\n"


def paths(name, **settings):
    """The increment after six steps, as a function of the split R that the factors start in."""
    params, loss_fn = problem(jnp.float64)
    facts, case = OPTIMIZERS[name], CASES[name.removeprefix("optax.")]
    tx = facts.factory(case.learning_rate, **case.settings | settings)
    gradient = gradient_of(loss_fn, KIND[facts.gradient])

    @jax.jit
    def path(rotation):
        lora = params["first"]
        turned = LowRank(lora.a @ rotation, jnp.linalg.solve(rotation, lora.b), lora.scale)
        return dense_tree(run(tx, params | {"first": turned}, gradient, 6)[0])["first"]

    return path


@each
def test_invariance(name, x64):
    """float64 and no decomposition near its limits: an unchanged path agrees to far below a changed one."""
    rng = np.random.default_rng(3)
    eye = jnp.eye(2, dtype=jnp.float64)
    invertible = jnp.asarray([[1.5, 0.4], [-0.7, 0.9]])
    orthogonal = jnp.linalg.qr(jnp.asarray(rng.standard_normal((2, 2))))[0]
    distance = lambda path, rotation: float(jnp.max(jnp.abs(path(rotation) - path(eye))))
    facts, path = OPTIMIZERS[name], paths(name)
    for rotation, unchanged in [
        (orthogonal, facts.invariant != "none"),
        (invertible, facts.invariant == "any"),
    ]:
        assert distance(path, rotation) < 1e-7 if unchanged else distance(path, rotation) > 1e-5
    if facts.invariant_with:
        assert distance(paths(name, **facts.invariant_with), invertible) < 1e-7
