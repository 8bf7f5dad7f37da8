"""What the table of all optimizers claims is measured here."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import oplora_jax
from experiments.catalogue import OPTIMIZERS, markdown
from experiments.methods import METHODS
from oplora_jax import LowRank, OuterProduct
from tests.optimizers.cases import CASES, dense_tree, gradient_of, problem, run

each = pytest.mark.parametrize("name", OPTIMIZERS)
KIND = {"factors": "factors", "exact": "outer", "moments": "outer"}


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
    assert ours <= set(CASES)
    assert ours <= {method.of for method in METHODS.values()}


@each
def test_state(name):
    n, m, r = 13, 9, 3
    param = LowRank(jnp.ones((n, r)), jnp.ones((r, m)))
    state = OPTIMIZERS[name].factory(0.1).init(param)
    kept = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert kept == OPTIMIZERS[name].state_size(n, m, r)


@each
def test_operations(name):
    """Within a quarter: the formulas leave out what does not grow with n and m, and round."""
    n, m, r, tokens = 512, 384, 4, 640
    entry, shape = OPTIMIZERS[name], lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
    param = LowRank(shape(n, r), shape(r, m))
    gradient = param if entry.needs == "factors" else OuterProduct(shape(tokens, n), shape(tokens, m))
    tx = entry.factory(0.1)
    lowered = jax.jit(tx.update).lower(gradient, jax.eval_shape(tx.init, param), param)
    counted = lowered.compile().cost_analysis()["flops"]
    assert 0.8 < counted / entry.step_operations(n, m, r, tokens) < 1.25


def paths(name, **settings):
    """The increment after six steps, as a function of the gauge R that the factors start in."""
    params, loss_fn = problem(jnp.float64)
    entry, case = OPTIMIZERS[name], CASES[name.removeprefix("optax.")]
    tx = entry.factory(case.learning_rate, **case.settings | settings)
    gradient = gradient_of(loss_fn, KIND[entry.needs])

    @jax.jit
    def path(rotation):
        lora = params["first"]
        turned = LowRank(lora.a @ rotation, jnp.linalg.solve(rotation, lora.b), lora.scale)
        return dense_tree(run(tx, params | {"first": turned}, gradient, 6)[0])["first"]

    return path


@each
def test_gauge(name, x64):
    """float64 and no decomposition near its limits: an unchanged path agrees to far below a changed one."""
    rng = np.random.default_rng(3)
    eye = jnp.eye(2, dtype=jnp.float64)
    invertible = jnp.asarray([[1.5, 0.4], [-0.7, 0.9]])
    orthogonal = jnp.linalg.qr(jnp.asarray(rng.standard_normal((2, 2))))[0]
    distance = lambda path, rotation: float(jnp.max(jnp.abs(path(rotation) - path(eye))))
    entry, path = OPTIMIZERS[name], paths(name)
    for rotation, unchanged in [(orthogonal, entry.gauge != "none"), (invertible, entry.gauge == "any")]:
        assert distance(path, rotation) < 1e-7 if unchanged else distance(path, rotation) > 1e-5
    if entry.gauge_exact:
        assert distance(paths(name, **entry.gauge_exact), invertible) < 1e-7
