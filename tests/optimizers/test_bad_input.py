"""Wrong input is refused when it is first seen, with the parameter's path and the shapes."""

import inspect

import jax
import jax.numpy as jnp
import optax
import pytest

from oplora_jax import DenseGradient, LowRank, OuterProduct, is_low_rank, oplora, scaled_gd, svdlora
from tests.optimizers.cases import OURS, make

A, B = jnp.ones((4, 2)), jnp.ones((2, 3))
LORA = LowRank(A, B)
PARAMS = {"layer": {"lora": LORA}, "bias": jnp.ones(3)}

# The annotations would refuse some of these first: the functions below their check.
unchecked = inspect.unwrap(oplora)

ARGUMENTS = {
    "momentum_kind": (
        lambda: unchecked(0.1, momentum_kind="nesterov"),
        "momentum_kind is 'nesterov'; expected",
    ),
    "momentum_rank with another kind": (
        lambda: oplora(0.1, momentum_rank=3, momentum_kind="projected"),
        "momentum_rank is 3 with momentum_kind='projected'",
    ),
    "momentum_rank 0": (lambda: oplora(0.1, momentum_rank=0), "momentum_rank is 0 with .*a positive number"),
}


@pytest.mark.parametrize("call, message", ARGUMENTS.values(), ids=ARGUMENTS.keys())
def test_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def step(tx, gradient=None, params=PARAMS):
    gradient = {"layer": {"lora": jnp.ones((4, 3))}, "bias": jnp.ones(3)} if gradient is None else gradient
    return jax.eval_shape(tx.update, gradient, tx.init(params), params)


LATE = {
    "learning rate": (lambda: unchecked(jnp.ones(3)), r"learning_rate has shape \(3,\); expected a scalar"),
    "schedule": (lambda: oplora(lambda count: jnp.ones(2)), r"learning_rate has shape \(2,\)"),
    "num_iters": (lambda: oplora(0.1, num_iters=-1), "num_iters is -1"),
    "num_iters, no momentum": (lambda: oplora(0.1, num_iters=-2, momentum=0), "num_iters is -2"),
    "rank": (lambda: svdlora(optax.sgd(0.1), rank=3), "rank is 3; a parameter of rank 2 takes 1 to 2"),
    "rank 0": (lambda: svdlora(optax.sgd(0.1), rank=0), "rank is 0; a parameter of rank 2 takes 1 to 2"),
}


@pytest.mark.parametrize("call, message", LATE.values(), ids=LATE.keys())
def test_arguments_that_show_at_the_first_step(call, message):
    with pytest.raises(ValueError, match=message):
        step(call())


PATH = r"\['layer'\]\['lora'\]: the gradient "
GRADIENTS = {
    "dense": (jnp.ones((3, 4)), PATH + r"has shape \(3, 4\); the parameter needs \(4, 3\)"),
    "outer": (OuterProduct(jnp.ones((5, 4)), jnp.ones((5, 4))), PATH + r"has shape \(4, 4\); .*\(4, 3\)"),
    "factors": (LowRank(A, jnp.ones((3, 3))), PATH + r"has shape .*\(3, 3\).*needs .*\(4, 2\), \(2, 3\)"),
    "rank": (
        LowRank(jnp.ones((4, 1)), jnp.ones((1, 3))),
        PATH + r"has shape \(\(4, 1\), \(1, 3\)\); the parameter needs \(\(4, 2\), \(2, 3\)\)",
    ),
    "batch": (jnp.ones((2, 4, 3)), PATH + r"has shape \(2, 4, 3\); the parameter needs \(4, 3\)"),
    "missing": (None, PATH + r"is NoneType; expected an OuterProduct or an array of shape \(4, 3\)"),
    "masked": (optax.MaskedNode(), PATH + r"is MaskedNode; expected"),
    "kind": ({"a": A, "b": B}, PATH + r"is dict; expected"),
}


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("gradient, message", GRADIENTS.values(), ids=GRADIENTS.keys())
def test_gradients_that_do_not_fit(name, gradient, message):
    with pytest.raises(ValueError, match=message):
        step(make(name), {"layer": {"lora": gradient}, "bias": jnp.ones(3)})


@pytest.mark.parametrize("name", OURS)
def test_trees_that_do_not_fit(name):
    tx = make(name)
    with pytest.raises(ValueError, match=r"does not have the parameters' structure.*"):
        step(tx, {"layer": {"lora": jnp.ones((4, 3))}})
    with pytest.raises(ValueError, match=r"call update\(updates, state, params\)"):
        tx.update(PARAMS, tx.init(PARAMS))


@pytest.mark.parametrize("name", OURS)
def test_parameters_that_are_no_low_rank_matrix(name):
    wrong = {"layer": LowRank(A, jnp.ones((3, 3)))}
    with pytest.raises(ValueError, match=r"\['layer'\]: factors a \(4, 2\) and b \(3, 3\) do not fit"):
        make(name).init(wrong)
    with pytest.raises(ValueError, match=r"the LoRA parameter: scale is -1\.0; expected a positive number"):
        make(name).init(LowRank(A, B, -1.0))


WRAPPERS = {
    "MultiSteps": lambda tx: optax.MultiSteps(tx, every_k_schedule=2),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, max_consecutive_errors=2),
    "trace": lambda tx: optax.chain(optax.trace(0.9), tx),
    "ema": lambda tx: optax.chain(optax.ema(0.9), tx),
    "adam": lambda tx: optax.chain(optax.scale_by_adam(), tx),
    "weight decay": lambda tx: optax.chain(optax.add_decayed_weights(0.1), tx),
}
# One that fits the factors would be added to them, if it were not for the structure of the tree.
EXACT = {
    "outer": OuterProduct(jnp.ones((5, 4)), jnp.ones((5, 3))),
    "outer of rank-many tokens": OuterProduct(A.T, B),
    "dense": jnp.ones((4, 3)),
    "moments": DenseGradient(jnp.ones((4, 3)), jnp.ones(4), jnp.ones(3), jnp.ones(())),
}


# Before, JAX's errors about trees that do not fit name the types alone, and no path.
EXPLAINED = jax.__version_info__ >= (0, 10)


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_what_takes_factor_gradients_alone_refuses_exact_ones(wrapper, kind):
    """JAX and Optax refuse them, with the types that differ: nothing is accumulated wrongly."""
    gradient = {"layer": {"lora": EXACT[kind]}, "bias": jnp.ones(3)}
    with pytest.raises((ValueError, TypeError), match=r"LowRank") as error:
        step(WRAPPERS[wrapper](oplora(0.1)), gradient)
    if EXPLAINED and wrapper in ("MultiSteps", "apply_if_finite"):
        assert "is_leaf=oplora_jax.is_low_rank" in str(error.value) and "jax.grad" in str(error.value)


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("wrap", [optax.masked, lambda tx, mask: optax.partition({True: tx}, mask)])
def test_labels_of_factors_are_refused_with_what_to_do(wrap, kind):
    """Of whole parameters they are right."""
    gradient = {"layer": {"lora": EXACT[kind]}, "bias": jnp.ones(3)}
    by_leaf = jax.tree.map(lambda _: True, PARAMS)
    message = r"\['layer'\]\['lora'\](?s:.*)is_leaf=oplora_jax.is_low_rank" if EXPLAINED else "LowRank"
    with pytest.raises(ValueError, match=message):
        step(wrap(oplora(0.1), by_leaf), gradient)
    step(wrap(oplora(0.1), jax.tree.map(lambda _: True, PARAMS, is_leaf=is_low_rank)), gradient)
    assert repr(LowRank) == "<class 'oplora_jax.matrix.LowRank'>"


def test_a_bare_parameter_has_a_name_too():
    tx = scaled_gd(0.1)
    with pytest.raises(ValueError, match=r"the LoRA parameter: the gradient has shape \(2, 2\)"):
        tx.update(jnp.ones((2, 2)), tx.init(LORA), LORA)
