"""What is declared beside the optimizers, and that nothing has to be written down anywhere else."""

import ast
import pathlib
from functools import partial

import jax.numpy as jnp
import optax
import pytest

import oplora_jax
from oplora_jax import LowRank, optimizers
from oplora_jax.optimizers._facts import OPTIMIZERS, facts
from tests.optimizers.cases import CASES


def written_optimizers():
    """The public functions of a learning rate, or of a base, in the optimizers' files."""
    for path in pathlib.Path(optimizers.__file__).parent.glob("[!_]*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.returns and not node.name.startswith("_"):
                returned = ast.unparse(node.returns) == "optax.GradientTransformationExtraArgs"
                if returned and {z.arg for z in node.args.args[:1]} & {"learning_rate", "base"}:
                    yield node.name


def test_every_optimizer_is_declared_and_exported_and_has_a_case():
    found = set(written_optimizers())
    assert {"oplora", "svdlora", "altlora_plus"} <= found
    assert found == set(OPTIMIZERS)
    assert found | {"set_to_zero"} <= set(optimizers.__all__)
    for name in optimizers.__all__:
        assert name in oplora_jax.__all__
        assert getattr(oplora_jax, name) is getattr(optimizers, name)
    assert found <= {case.of for case in CASES.values()}


@pytest.fixture
def toy():
    @facts(gradient="factors", source="0000.00000", invariant="none", base=partial(optax.sgd, momentum=0.5))
    def toy(base, *, factor=1.0):
        return optax.chain(optax.scale(factor), base)

    yield toy
    del OPTIMIZERS["toy"]


def test_a_declared_optimizer_stays_as_it_is(toy):
    tx = toy(optax.sgd(0.1), factor=3.0)
    updates, _ = tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
    assert jnp.allclose(updates, -0.3)


def test_an_optimizer_of_another_one_is_made_of_a_learning_rate(toy):
    """And `inject_hyperparams` finds the settings; the usual base has a momentum of a half."""
    tx = optax.inject_hyperparams(OPTIMIZERS["toy"].factory)(0.1, factor=2.0)
    param = LowRank(jnp.ones((3, 1)), jnp.ones((1, 2)))
    state = tx.init(param)
    assert {"learning_rate", "factor"} == set(state.hyperparams)
    for expected in (-0.2, -0.3):
        updates, state = tx.update(param, state, param)
        assert jnp.allclose(updates.a, expected)
