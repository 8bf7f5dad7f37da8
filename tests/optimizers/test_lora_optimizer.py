"""What `lora_optimizer` promises. Its toy is a row of the table of cases, with all the tests that has."""

import inspect
import pathlib
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import oplora_jax
from oplora_jax import LowRank, OuterProduct, each, factor_gradients, lora_dot, lora_optimizer
from oplora_jax.nnx import LoRALinear
from tests.arrays import f64, normals
from tests.optimizers import paths
from tests.optimizers.cases import CASES, KINDS, OURS, gradient_of, make, problem, signature
from tests.optimizers.toy import ToyState, toy

SOURCES = [inspect.getsource(part) for part in (ToyState, toy)]
A, B = jnp.ones((4, 2)), jnp.ones((2, 3))
PARAMS = {"layer": {"lora": LowRank(A, B, 2.0)}, "second": LowRank(B.T, A.T), "bias": jnp.ones(3)}
GRADIENTS = {"layer": {"lora": jnp.ones((4, 3))}, "second": jnp.ones((3, 4)), "bias": jnp.ones(3)}


class Momentum(NamedTuple):
    momentum: Any
    more: Any = None


class Nothing(NamedTuple):
    pass


def zeros(param, key):
    return Momentum(jax.tree.map(jnp.zeros_like, param))


def descend(param, gradient, state, count):
    return jax.tree.map(lambda p, g: p - 0.1 * g, param, factor_gradients(param, gradient)), state


def optimizer(step=descend, init=zeros, **settings):
    return lora_optimizer(init, each(step), others=optax.sgd(0.1), **settings)


def take_step(tx, params=PARAMS, gradients=GRADIENTS):
    """(parameters, state) after one."""
    updates, state = tx.update(gradients, tx.init(params), params)
    return optax.apply_updates(params, updates), state


# The toy.


def test_the_toy_is_small_and_in_the_table():
    assert sum(len(source.splitlines()) for source in SOURCES) <= 25
    assert "lora_optimizer(" in SOURCES[1]
    assert "toy" in OURS and CASES["toy"].kinds == KINDS


def test_the_page_on_writing_one_shows_the_toy():
    page = pathlib.Path(__file__).parents[2] / "docs" / "write-an-optimizer.md"
    assert f"```python\n{SOURCES[0]}\n{SOURCES[1]}```\n" in page.read_text()


@pytest.mark.parametrize("rate", [0.06, paths.schedule], ids=["constant", "schedule"])
def test_the_toy_by_hand(rate, x64):
    """Its formula in NumPy: momentum of both factors, and one second moment for each of the r directions."""
    a, b = paths.factors()
    momentum, squares, b1, b2 = [0 * a, 0 * b], np.zeros(paths.R), 0.5, 0.9

    def step(t, a, b, da, db):
        momentum[:] = (b1 * m + (1 - b1) * g for m, g in zip(momentum, (da, db), strict=True))
        squares[:] = b2 * squares + (1 - b2) * (np.sum(da**2, axis=0) + np.sum(db**2, axis=1))
        eta = float(rate(t - 1)) if callable(rate) else rate
        rates = eta / (np.sqrt(squares / (1 - b2**t)) + 1e-8)
        return a - momentum[0] * rates, b - rates[:, None] * momentum[1]

    targets = paths.full_gradients()
    expected = paths.path_by_hand(step, a, b, 2.0, targets)
    actual = paths.path(toy(rate), targets)(paths.low_rank(a, b, 2.0))
    # float64; a schedule is in float32, as JAX makes it of Python's numbers.
    paths.assert_same_path(actual, expected, 1e-6 if callable(rate) else 1e-10)


# What a step is given.


def recorder(seen, init=zeros, **settings):
    def step(params, gradients, states, count):
        assert all(type(z) is list for z in (params, gradients, states))
        seen.append((params, gradients, states, count))
        return params, states

    return lora_optimizer(init, step, others=optax.sgd(0.1), **settings)


TYPES = [  # of parameters and gradients, state_dtype, within the step, of the state
    (jnp.bfloat16, None, jnp.float32, jnp.bfloat16),
    (jnp.float16, jnp.bfloat16, jnp.float32, jnp.bfloat16),
    (jnp.bfloat16, jnp.float32, jnp.float32, jnp.float32),
    (jnp.float32, jnp.bfloat16, jnp.float32, jnp.bfloat16),
    (jnp.float64, None, jnp.float64, jnp.float64),
    (jnp.float32, jnp.float64, jnp.float64, jnp.float64),
]


@pytest.mark.parametrize("given, state_dtype, within, kept", TYPES)
def test_a_step_sees_lists_in_float32_or_wider(given, state_dtype, within, kept, x64):
    narrow = lambda tree: jax.tree.map(lambda z: z.astype(given), tree)
    params, gradients, seen = narrow(PARAMS), narrow(GRADIENTS), []
    tx = recorder(seen, state_dtype=state_dtype)
    state = tx.init(params)
    assert {z.dtype for z in jax.tree.leaves(state.lora)} == {jnp.dtype(kept)}
    for k in range(2):
        updates, state = tx.update(gradients, state, params)
        nodes, at_nodes, states, count = seen.pop()
        assert len(nodes) == len(at_nodes) == len(states) == 2
        assert {z.dtype for z in jax.tree.leaves((nodes, states))} == {jnp.dtype(within)}
        chex.assert_trees_all_equal(nodes[0].a, params["layer"]["lora"].a.astype(within))
        assert at_nodes[1] is gradients["second"]
        assert isinstance(states[1], Momentum) and states[1].momentum.shape == (3, 4)
        assert count == k and count.dtype == jnp.int32
        assert {z.dtype for z in jax.tree.leaves((updates, params))} == {jnp.dtype(given)}
        assert {z.dtype for z in jax.tree.leaves(state.lora)} == {jnp.dtype(kept)}


def test_a_step_in_the_backward_pass_sees_lists_of_one():
    seen, x = [], jnp.ones((5, 4))
    loss_fn = lambda p: jnp.sum(lora_dot(lora_dot(x, A @ B, p["layer"]["lora"]), B.T @ A.T, p["second"]))
    tx = recorder(seen)
    state = tx.init(PARAMS)._replace(count=jnp.asarray(7, jnp.int32))
    oplora_jax.value_and_update(loss_fn, tx)(PARAMS, state)
    assert {params[0].shape for params, *_ in seen} == {(4, 3), (3, 4)}
    for params, gradients, states, count in seen:
        assert len(params) == len(gradients) == len(states) == 1
        assert isinstance(gradients[0], OuterProduct) and jnp.shape(count) == ()


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_is_what_stands_at_the_parameter(kind):
    params, loss_fn = problem()
    gradients, seen = gradient_of(loss_fn, kind)(params), []
    take_step(recorder(seen), params, gradients)
    [(_, [gradient], _, _)] = seen
    assert gradient is gradients["first"]


def test_keys_differ_by_parameter_and_by_seed():
    init = lambda param, key: Momentum(jax.random.normal(key, (2,)))
    start = lambda seed: jax.tree.leaves(optimizer(init=init, seed=seed).init(PARAMS).lora)
    drawn = np.stack([*start(0), *start(1)])
    assert len(np.unique(drawn, axis=0)) == 4
    np.testing.assert_array_equal(start(0), drawn[:2])


# What it may return, and what is refused.


RESULTS = {
    "a transposed": lambda p, s: (LowRank(p.a.T, p.b, p.scale), s),
    "a factor to be broadcast": lambda p, s: (LowRank(p.a[:1], p.b, p.scale), s),
    "another scale": lambda p, s: (LowRank(p.a, p.b, 3.0), s),
    "a dense parameter": lambda p, s: (oplora_jax.to_dense(p), s),
    "no parameter": lambda p, s: (None, s),
    "no state": lambda p, s: (p, None),
    "another state": lambda p, s: (p, Nothing()),
    "more state": lambda p, s: (p, s._replace(more=p.a)),
    "a dense momentum": lambda p, s: (p, Momentum(oplora_jax.to_dense(p))),
    "a momentum of another rank": lambda p, s: (p, Momentum(LowRank(p.a[:, :1], p.b[:1], p.scale))),
}


@pytest.mark.parametrize("result", RESULTS.values(), ids=RESULTS.keys())
def test_a_step_that_returns_what_does_not_fit(result):
    """Of the second parameter alone."""
    step = lambda p, g, s, count: result(p, s) if p.shape == (3, 4) else (p, s)
    with pytest.raises(ValueError, match=r"^\['second'\]: the step returns a (parameter|state) .*; expected"):
        take_step(optimizer(step))


def test_the_error_names_the_shapes():
    step = lambda p, g, s, count: (LowRank(p.a.T, p.b), s)
    with pytest.raises(ValueError, match=r"\['lora'\]: .*a=\(2, 4\).*; expected .*a=\(4, 2\)"):
        take_step(optimizer(step))


def test_a_step_that_returns_too_few():
    few = lambda params, gradients, states, count: (params[:1], states)
    with pytest.raises(ValueError, match="returns 1 parameters; expected a list of 2"):
        take_step(lora_optimizer(zeros, few, others=optax.sgd(0.1)))
    few = lambda params, gradients, states, count: (params, [])
    with pytest.raises(ValueError, match="returns 0 states; expected a list of 2"):
        take_step(lora_optimizer(zeros, few, others=optax.sgd(0.1)))


INITS = {
    "two structures": lambda param, key: Momentum(None if param.shape == (3, 4) else param),
    "no arrays": lambda param, key: Momentum(0.0 if param.shape == (3, 4) else param.a),
}


@pytest.mark.parametrize("init", INITS.values(), ids=INITS.keys())
def test_states_that_do_not_fit(init):
    with pytest.raises(
        ValueError, match=r"^\['second'\]: init returns Momentum.*; expected arrays in one structure"
    ):
        optimizer(init=init).init(PARAMS)


def test_states_in_the_backward_pass_begin_with_the_batch_axes():
    """As a scan over layers takes a step of each. Elsewhere one number may be that of all layers."""
    layers = {"layers": LowRank(jnp.ones((5, 3, 2)), jnp.ones((5, 2, 3)))}
    kernels, x = jnp.zeros((5, 3, 3)), jnp.ones((4, 3))
    layer = lambda x, at: (lora_dot(x, *at), None)
    loss_fn = lambda p: jnp.sum(jax.lax.scan(layer, x, (kernels, p["layers"]))[0])
    one = optimizer(init=lambda param, key: Momentum(param.a[..., 0, 0]))
    all_layers = optimizer(init=lambda param, key: Momentum(jnp.zeros(())))
    oplora_jax.value_and_update(loss_fn, one)(layers, one.init(layers))
    take_step(all_layers, layers, {"layers": jnp.ones((5, 3, 3))})
    with pytest.raises(ValueError, match=r"^\['layers'\]: its state's arrays must begin .* \(5,\)$"):
        oplora_jax.value_and_update(loss_fn, all_layers)(layers, all_layers.init(layers))


def test_what_is_wrong_comes_with_the_path():
    check = lambda param, gradient: f"no {gradient.shape}" if param.shape == (3, 4) else None
    with pytest.raises(ValueError, match=r"^\['second'\]: no \(3, 4\)$"):
        take_step(optimizer(check=check))
    take_step(optimizer(check=check), {"layer": PARAMS["layer"]}, {"layer": GRADIENTS["layer"]})


def test_a_joint_step_is_refused_in_the_backward_pass():
    tx, x = optimizer(joint="max_norm is 3"), jnp.ones((5, 4))
    loss_fn = lambda p: jnp.sum(lora_dot(x, A @ B, p["layer"]["lora"]))
    take_step(tx)
    with pytest.raises(ValueError, match=r"^max_norm is 3: a step in the backward pass sees one"):
        oplora_jax.value_and_update(loss_fn, tx)(PARAMS, tx.init(PARAMS))


# `each`, and the lift.


def test_each_takes_the_step_of_one_of_each():
    params = [LowRank(k * A, B) for k in range(3)]
    step = each(lambda param, gradient, state, count: (param.with_factors(param.a + count, gradient), -state))
    new, states = step(params, [10 * B, 11 * B, 12 * B], [1, 2, 3], 5)
    assert states == [-1, -2, -3]
    for k in range(3):
        chex.assert_trees_all_equal(new[k], LowRank(k * A + 5, (10 + k) * B))
    assert each(descend)([], [], [], 0) == ([], [])


def test_the_lift_takes_the_step_and_leaves_others_alone():
    params, state = take_step(optimizer())
    for p, g, new in (
        (PARAMS["layer"]["lora"], GRADIENTS["layer"]["lora"], params["layer"]["lora"]),
        (PARAMS["second"], GRADIENTS["second"], params["second"]),
    ):
        a, b, g = f64(p.a), f64(p.b), f64(g)
        # Small whole numbers and one rounding of a tenth in float32.
        np.testing.assert_allclose(new.a, a - 0.1 * p.scale * g @ b.T, rtol=1e-6)
        np.testing.assert_allclose(new.b, b - 0.1 * p.scale * a.T @ g, rtol=1e-6)
    np.testing.assert_allclose(params["bias"], 0.9, rtol=1e-6)
    assert int(state.count) == 1 and int(state.skipped) == 0


EMPTY = {"no fields": Nothing(), "None in every field": Momentum(None), "None beside an array": None}


@pytest.mark.parametrize("name", EMPTY)
def test_states_without_arrays(name):
    """In every way to take a step."""
    init = lambda param, key: Momentum(None, param.b) if EMPTY[name] is None else EMPTY[name]
    tx = optimizer(init=init)
    (expected, state), before = take_step(tx), tx.init(PARAMS)
    assert signature(state) == signature(before)
    injected = optax.inject_hyperparams(lambda rate: tx)(0.1)
    chex.assert_trees_all_equal(take_step(injected)[0], expected)
    moved = optax.tree.map_params(tx, lambda z: z + 1, before)
    chex.assert_trees_all_equal(moved.lora, jax.tree.map(lambda z: z + 1, before.lora))
    x = normals(0, jnp.float32)(5, 4)
    loss_fn = lambda p: jnp.sum(jnp.sin(lora_dot(x, A @ B, p["layer"]["lora"]))) + jnp.sum(p["bias"])
    _, inside, after = oplora_jax.value_and_update(loss_fn, tx)(PARAMS, before)
    gradients = oplora_jax.grad(loss_fn, "outer")(PARAMS)
    # The same operations in two programs: float32 rounding.
    chex.assert_trees_all_close(inside, tx.update(gradients, before, PARAMS)[0], rtol=1e-5)
    assert signature(after) == signature(before)


def test_a_state_that_is_not_finite_is_a_step_left_out():
    """Though the parameter would be; where it is the parameter alone, too."""
    broken = lambda z: z.at[0, 0].set(jnp.nan)
    for result in (
        lambda p, s: (p, Momentum(LowRank(broken(p.a), p.b, p.scale))),
        lambda p, s: (LowRank(broken(p.a), p.b, p.scale), Momentum(jax.tree.map(jnp.ones_like, p))),
    ):
        of_second = lambda p, g, s, c, f=result: f(p, s) if p.shape == (3, 4) else descend(p, g, s, c)
        tx = optimizer(of_second)
        params, state = take_step(tx)
        chex.assert_trees_all_equal(params["second"], PARAMS["second"])
        assert not any(np.any(z) for z in jax.tree.leaves(state.lora))
        assert np.all(params["layer"]["lora"].a != A) and np.all(params["bias"] != 1)
        assert int(state.skipped) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_groups_without_a_lora_parameter(kind):
    """Each group has a toy of its own; in one there is no LoRA parameter, in one there is nothing at all."""
    params, loss_fn = problem()
    gradients = gradient_of(loss_fn, kind)(params)
    groups = {"lora": make("toy"), "others": make("toy", 0.02), "empty": make("toy")}
    tx = optax.partition(groups, {"first": "lora", "bias": "others"})
    with pytest.warns(UserWarning, match=r"no LoRA parameter.*: \['bias'\]\.") as warned:
        state = tx.init(params)
    assert len(warned) == 1
    updates, after = jax.jit(tx.update)(gradients, state, params)
    assert signature(after) == signature(state)
    one, _ = jax.jit(make("toy").update)(gradients, make("toy").init(params), params)
    chex.assert_trees_all_close(updates["first"], one["first"], rtol=1e-5)  # compiled apart: float32
    np.testing.assert_allclose(updates["bias"], -0.02 * gradients["bias"], rtol=1e-6)  # one rounding


def test_a_warning_of_no_lora_parameter():
    """Once, where `init` is called, with the first paths; and none of trees without any leaf."""
    leaves = {"a": jnp.ones((6, 2)), "b": [jnp.ones((2, 5)), jnp.ones(2)], "c": jnp.ones(2), "d": jnp.ones(2)}
    inits = [
        make("toy").init,
        oplora_jax.oplora(0.1).init,
        oplora_jax.svdlora(optax.adam(0.1)).init,
        optax.chain(optax.clip(1.0), optax.MultiSteps(make("toy"), 2)).init,
        optax.inject_hyperparams(oplora_jax.altlora)(learning_rate=0.1).init,
        optax.masked(make("toy"), {**jax.tree.map(lambda _: True, leaves), "c": False}).init,
        jax.jit(make("toy").init),
        lambda params: jax.eval_shape(make("toy").init, params),
    ]
    for init in inits:
        with pytest.warns(
            UserWarning, match=r"\['a'\], \['b'\]\[0\], \['b'\]\[1\] and [12] more.*pair_factors"
        ) as found:
            init(leaves)
        assert [warning.filename for warning in found] == [__file__]
    with pytest.warns(UserWarning, match="parameters: the parameter. They"):
        make("toy").init(jnp.ones(3))
    for empty in ({}, None, {"a": None}, optax.MaskedNode(), {"a": [optax.MaskedNode()]}):
        make("toy").init(empty)
    params, loss_fn = problem()
    for tx in (make("toy"), oplora_jax.svdlora(optax.adam(0.1))):
        state = tx.init(params)
        optax.tree.map_params(tx, jnp.zeros_like, state)
        optax.masked(tx, {"first": True, "bias": False}).init(params)
    tx = optax.partition({"lora": make("toy"), "rest": optax.sgd(0.1)}, {"first": "lora", "bias": "rest"})
    tx.update(jax.grad(loss_fn)(params), tx.init(params), params)
    oplora_jax.value_and_update(loss_fn, make("toy"))(params, make("toy").init(params))
    factors = {"lora_a": jnp.ones((6, 2)), "lora_b": jnp.ones((2, 5)), "bias": jnp.ones(5)}
    oplora_jax.pair_factors(make("toy")).init(factors)


@pytest.mark.parametrize(
    "make_optimizer", [lambda: make("toy"), lambda: optimizer(init=lambda p, k: Nothing())]
)
def test_nnx(make_optimizer):
    """As an `nnx.Optimizer` steps, which takes the state apart."""
    model = LoRALinear(4, 3, 2, rngs=nnx.Rngs(0))
    x, y = normals(0, jnp.float32)(8, 4), normals(1, jnp.float32)(8, 3)
    wrapped = nnx.Optimizer(model, make_optimizer(), wrt=nnx.LoRAParam)
    tx, param = make_optimizer(), model.lora.get_value()
    state = tx.init(param)
    for _ in range(2):
        gradients = oplora_jax.nnx.value_and_grad(lambda m: jnp.mean((m(x) - y) ** 2), "outer")(model)[1]
        updates, state = tx.update(gradients["lora"].get_value(), state, param)
        param = optax.apply_updates(param, updates)
        wrapped.update(model, gradients)
    assert np.any(param.b) and int(state.count) == 2
    # The same arrays in the same functions, op by op.
    chex.assert_trees_all_close(model.lora.get_value(), param, rtol=1e-6)
