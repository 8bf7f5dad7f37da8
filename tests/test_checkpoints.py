"""Checkpoints by Orbax: everything comes back bit for bit, and training goes on as if never interrupted."""

import gc

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import oplora_jax
from oplora_jax import LowRank, oplora
from oplora_jax.linen import LoRADense
from oplora_jax.nnx import LoRALinear, value_and_grad
from tests.arrays import normals
from tests.optimizers.cases import CASES, gradient_of, make, problem

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def manager(tmp_path):
    with ocp.CheckpointManager(tmp_path) as manager:
        yield manager


def save(manager, tree):
    manager.save(0, args=ocp.args.StandardSave(tree))
    manager.wait_until_finished()


def restore(manager, target=None):
    return manager.restore(0, args=ocp.args.StandardRestore(target))


def assert_same(actual, expected):
    """The same nodes, and the same bits of the same types."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, x), y in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype), path
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path


def train_step(tx, gradient):
    @jax.jit
    def step(params, state):
        updates, state = tx.update(gradient(params), state, params)
        return optax.apply_updates(params, updates), state

    return step


def after(step, carry, num_steps):
    for _ in range(num_steps):
        carry = step(*carry)
    return carry


def check(manager, tx, params, gradient):
    """Two steps, a checkpoint, two steps; and the last two again from what was restored."""
    step = train_step(tx, gradient)
    # Put on its device, as what is restored will be: one compilation serves both.
    target = jax.device_put((params, tx.init(params)), jax.devices()[0])
    interrupted = after(step, target, 2)
    uninterrupted = after(step, interrupted, 2)
    save(manager, interrupted)
    shapes = jax.eval_shape(lambda: target)
    for restored in (restore(manager, target), restore(manager, shapes)):
        assert_same(restored, interrupted)
        assert_same(after(step, restored, 2), uninterrupted)
    # Without a target come dicts and lists with the same names, which Orbax turns into the target's nodes.
    raw = restore(manager)
    assert type(raw[1]) in (dict, list) and set(raw[0]["first"]) == {"a", "b"}
    assert_same(ocp.tree.deserialize_tree(raw, target), interrupted)


@pytest.mark.parametrize("name", CASES)
def test_every_optimizer(name, manager):
    params, loss_fn = problem()
    kind = CASES[name].kinds[0] if CASES[name].ours else "factors"
    check(manager, make(name), params, gradient_of(loss_fn, kind))


SCHEDULE = optax.linear_schedule(0.2, 0.0, 5)
LABELS = {"first": "train", "bias": "freeze"}
WRAPPED = {
    "inject_hyperparams": lambda: optax.inject_hyperparams(oplora)(SCHEDULE, dampening=0.1),
    "chain": lambda: optax.chain(oplora_jax.clip_by_global_norm(1.0), oplora(SCHEDULE)),
    "partition": lambda: optax.partition({"train": oplora(0.1), "freeze": optax.set_to_zero()}, LABELS),
    "frozen": lambda: optax.partition({"train": optax.sgd(0.1), "freeze": oplora_jax.set_to_zero()}, SWAPPED),
    "apply_if_finite": lambda: optax.apply_if_finite(oplora(0.1), 3),
    "state_dtype": lambda: oplora(0.1, momentum_rank=4, state_dtype=jnp.bfloat16),
}
SWAPPED = {"first": "freeze", "bias": "train"}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED.keys())
def test_wrapped_optimizers(wrap, manager):
    params, loss_fn = problem()
    check(manager, wrap(), params, jax.grad(loss_fn))


def test_accumulated_gradients(manager):
    """A checkpoint halfway through an accumulation: the gradients gathered so far are in it."""
    params, loss_fn = problem()
    check(manager, optax.MultiSteps(make("oplora"), every_k_schedule=3), params, jax.grad(loss_fn))


def test_bfloat16_and_what_was_skipped(manager):
    params = {"first": LowRank(jnp.ones((8, 2), jnp.bfloat16), jnp.ones((2, 6), jnp.bfloat16))}
    tx = oplora(0.1)
    broken = jax.tree.map(lambda z: z * jnp.nan, params)
    _, state = jax.jit(tx.update)(broken, tx.init(params), params)
    save(manager, state)
    restored = restore(manager, tx.init(params))
    assert_same(restored, state)
    assert int(restored.skipped) == 1


# On several devices.


def place(mesh, params):
    """The rows of a and the columns of b spread over the mesh."""
    put = lambda z, *spec: jax.device_put(z, NamedSharding(mesh, PartitionSpec(*spec)))
    lora = params["first"]
    return {
        "first": LowRank(put(lora.a, "d"), put(lora.b, None, "d"), lora.scale),
        "bias": put(params["bias"], "d"),
    }


def sharded_problem(axis_type):
    normal = normals(0, jnp.float32)
    params = {"first": LowRank(normal(16, 2), normal(2, 8), 2.0), "bias": normal(8)}
    mesh = jax.make_mesh((8,), ("d",), axis_types=(axis_type,), devices=jax.devices("cpu")[:8])
    return mesh, place(mesh, params), params


def on_mesh(mesh, tree):
    """The counters, which are made on one device, on all of them."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda z: z if z.ndim else jax.device_put(z, everywhere), tree)


@pytest.mark.parametrize("name", CASES)
def test_every_optimizer_on_a_mesh(name, manager):
    mesh, params, on_one_device = sharded_problem(AxisType.Auto)
    tx = make(name)
    kind = CASES[name].kinds[0]
    ones = lambda *shape: jnp.ones(shape)
    gradient = oplora_jax.OuterProduct(ones(3, 16), ones(3, 8)) if kind == "outer" else None
    if not CASES[name].ours:
        gradient = jax.tree.map(jnp.ones_like, params["first"])
    step = train_step(tx, lambda params: {"first": gradient, "bias": params["bias"]})
    with jax.set_mesh(mesh):
        target = on_mesh(mesh, (params, tx.init(params)))
        interrupted = after(step, target, 2)
        uninterrupted = after(step, interrupted, 2)
        save(manager, interrupted)
        restored = restore(manager, target)
        assert_same(restored, interrupted)
        for new, old in zip(*map(jax.tree.leaves, (restored, interrupted)), strict=True):
            assert new.sharding.is_equivalent_to(old.sharding, new.ndim)
        assert_same(after(step, restored, 2), uninterrupted)
    # And on a single device.
    restored = restore(manager, (on_one_device, tx.init(on_one_device)))
    assert_same(restored, interrupted)
    assert {len(z.sharding.device_set) for z in jax.tree.leaves(restored)} == {1}


def test_from_one_device_to_explicit_axes(manager):
    mesh, params, on_one_device = sharded_problem(AxisType.Explicit)
    tx = oplora(0.1)
    tree = on_one_device, tx.init(on_one_device)
    save(manager, tree)
    with jax.set_mesh(mesh):
        target = on_mesh(mesh, (params, tx.init(params)))
        restored = restore(manager, target)
        assert_same(restored, tree)
        for new, old in zip(*map(jax.tree.leaves, (restored, target)), strict=True):
            assert new.sharding == old.sharding
        step = train_step(tx, lambda params: jax.tree.map(jnp.ones_like, params))
        assert_same(step(*restored), step(*target))  # the same start


# Flax.

X, Y = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 4)), jnp.float32)


@pytest.mark.parametrize("name", ["oplora_projected", "scaled_oplora", "scaled_adamw", "toy"])
def test_nnx(name, manager):
    """The LoRA parameters and the optimizer alone: the base model is the same, made from the same seed."""

    def make_both():
        model = LoRALinear(4, 4, 2, alpha=4.0, rngs=nnx.Rngs(0))
        return model, nnx.Optimizer(model, make(name), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model, optimizer):
        loss_fn = lambda model: jnp.mean((model(X) - Y) ** 2)
        loss, gradients = value_and_grad(loss_fn, "outer")(model)
        optimizer.update(model, gradients)
        return loss

    def states(model, optimizer):
        return {"lora": nnx.state(model, nnx.LoRAParam), "optimizer": nnx.state(optimizer)}

    def put(both, restored):
        for node, state in zip(both, restored.values(), strict=True):
            nnx.update(node, state)

    both = make_both()
    for _ in range(2):
        step(*both)
    interrupted = jax.tree.map(jnp.copy, states(*both))
    save(manager, interrupted)
    losses = [step(*both) for _ in range(2)]
    uninterrupted = states(*both)

    again = make_both()
    restored = restore(manager, states(*again))
    assert_same(restored, interrupted)
    put(again, restored)
    assert_same([step(*again) for _ in range(2)], losses)
    assert_same(states(*again), uninterrupted)


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return LoRADense(4, rank=2)(nn.tanh(LoRADense(6, rank=2, alpha=4.0)(x)))


def test_train_state(manager):
    model = MLP()
    params = jax.jit(model.init)(jax.random.key(0), X)["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=oplora(0.1))

    @jax.jit
    def step(state):
        loss_fn = lambda params: jnp.mean((model.apply({"params": params}, X) - Y) ** 2)
        return state.apply_gradients(grads=oplora_jax.grad(loss_fn)(state.params))

    interrupted = step(step(state))
    save(manager, interrupted)
    restored = restore(manager, jax.eval_shape(lambda: state))
    assert_same(restored, interrupted)
    assert_same(step(restored), step(interrupted))


# What a checkpoint does not fit.


# Orbax reads the arrays side by side, and gives up the others at the first error.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_another_rank_is_an_error(manager):
    params, _ = problem()
    save(manager, params["first"])
    message = r"Requested shape: \((8, 3|3, 6)\) is not compatible with the stored shape: \((8, 2|2, 6)\)"
    with pytest.raises(ValueError, match=message):
        restore(manager, LowRank(jnp.ones((8, 3)), jnp.ones((3, 6)), 2.0))
    gc.collect()


@pytest.mark.parametrize("other", [oplora(0.1, momentum=0), oplora(0.1, momentum_kind="projected")])
def test_another_optimizer_is_an_error(other, manager):
    params, _ = problem()
    save(manager, (params, oplora(0.1).init(params)))
    with pytest.raises(ValueError, match=r"tree structures do not match(.|\n)*lora\.(momentum|previous)"):
        restore(manager, (params, other.init(params)))


def test_scale_and_type_are_those_of_the_target(manager):
    """A checkpoint has arrays only: the scale, alpha / r, is part of the model. Types are cast silently."""
    params, _ = problem()
    save(manager, params)
    other = params | {"first": LowRank(*jax.tree.leaves(params["first"]), scale=8.0)}
    restored = restore(manager, other)
    assert restored["first"].scale == 8.0 != params["first"].scale
    chex.assert_trees_all_equal(restored["first"].a, params["first"].a)
    narrow = jax.tree.map(lambda z: z.astype(jnp.bfloat16), params)
    assert_same(restore(manager, narrow), narrow)
