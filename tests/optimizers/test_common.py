"""The properties of every optimizer in the table."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import oplora_jax
from oplora_jax import LowRank, OuterProduct, is_low_rank
from tests.arrays import normals
from tests.optimizers.cases import (
    CASES,
    KINDS,
    OF_FACTORS,
    OURS,
    OURS_AND_KINDS,
    dense_tree,
    gradient_of,
    make,
    problem,
    run,
    signature,
)

each = pytest.mark.parametrize("name", OURS)
each_of_factors = pytest.mark.parametrize("name", [name for name in OURS if name in OF_FACTORS])
each_kind = pytest.mark.parametrize("kind", KINDS)
# Where the kind of gradient matters to what is wrapped around the optimizer.
each_of_ours_and_kind = pytest.mark.parametrize(
    "name, kind", [*((name, "outer") for name in OURS), ("oplora", "dense"), ("oplora", "factors")]
)


@each
def test_unknown_extra_arguments_are_accepted(name):
    tx = make(name)
    params, loss_fn = problem()
    gradient = gradient_of(loss_fn, "outer")(params)
    update = lambda extra: jax.eval_shape(
        lambda g, s, p: tx.update(g, s, p, **extra), gradient, tx.init(params), params
    )
    plain, extra = update({}), update({"value": 1.0, "unknown": "x"})
    assert signature(plain) == signature(extra)


@each
def test_no_recompilation_and_a_stable_state(name):
    tx = make(name)
    params, loss_fn = problem()
    state = tx.init(params)
    before = signature((params, state))
    gradient = gradient_of(loss_fn, "outer")(params)
    traces = []

    def step(params, state, gradient):
        traces.append(None)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step)
    for _ in range(3):
        params, state = compiled(params, state, gradient)
        assert signature((params, state)) == before
    assert len(traces) == 1
    # A branch that steps, beside one that does not.
    stepped = lambda: step(params, state, gradient)
    jax.eval_shape(lambda: jax.lax.cond(True, stepped, lambda: (params, state)))


@each
def test_map_params(name):
    tx = make(name)
    params, _ = problem()
    state = tx.init(params)
    mapped = optax.tree.map_params(tx, lambda z: z + 1, state, transform_non_params=lambda z: z)
    chex.assert_trees_all_equal_shapes(mapped, state)
    changed = [bool(np.any(x != y)) for x, y in zip(*map(jax.tree.leaves, (mapped, state)), strict=True)]
    counters = [z.ndim == 0 and z.dtype == jnp.int32 for z in jax.tree.leaves(state)]
    assert changed == [not counter for counter in counters]  # all else belongs to parameters
    if CASES[name].mirrors:  # the state takes what belongs to each factor, such as its sharding
        paths = jax.tree.map_with_path(lambda path, _: jax.tree_util.keystr(path), params)
        # As with `optax.masked`: the state has a masked node where a leaf is another transformation's.
        masked = lambda node: isinstance(node, optax.MaskedNode)
        pick = lambda node, path: node if masked(node) else path
        none = lambda _: "none"
        labels = optax.tree.map_params(tx, pick, state, paths, transform_non_params=none, is_leaf=masked)
        for (where, _), label in zip(jax.tree.leaves_with_path(state), jax.tree.leaves(labels), strict=True):
            assert label == "none" or jax.tree_util.keystr(where).endswith(label)
        assert jax.tree.leaves(labels).count("none") == sum(counters)


@each
def test_init_of_a_tree_without_leaves(name):
    make(name).init({})
    make(name).init({"first": None, "bias": optax.MaskedNode()})


@pytest.mark.parametrize("name", CASES)  # Optax's own as a control: the problem can be solved
def test_convergence_inside_a_scan(name):
    params, loss_fn = problem(trains_a=CASES[name].trains_a)
    gradient = gradient_of(loss_fn, "outer" if name in OURS else "factors")
    params_after, state = run(make(name), params, gradient, 200)
    chex.assert_tree_all_finite((params_after, state))
    # The target is of the parameters' rank, so that the loss can go to zero.
    assert loss_fn(params_after) < 1e-3 * loss_fn(params)


@pytest.mark.parametrize("name, kind", OURS_AND_KINDS)
def test_every_kind_of_gradient_descends(name, kind):
    params, loss_fn = problem(b_zero=True, trains_a=CASES[name].trains_a)
    params_after, state = run(make(name), params, gradient_of(loss_fn, kind), 40)
    assert loss_fn(params_after) < 0.1 * loss_fn(params)
    assert int(state.skipped) == 0


@each
def test_injected_hyperparameters_give_the_same_result(name):
    case = CASES[name]
    params, loss_fn = problem()
    gradient = gradient_of(loss_fn, "outer")
    injected = optax.inject_hyperparams(case.factory)(case.learning_rate, **case.settings)
    state = injected.init(params)
    assert np.isclose(optax.tree.get(state, "learning_rate"), case.learning_rate)
    # The same operations on traced numbers: float32 rounding of three steps.
    expected, _ = run(make(name), params, gradient, 3)
    actual, state = run(injected, params, gradient, 3, state)
    chex.assert_trees_all_close(dense_tree(actual), dense_tree(expected), atol=2e-5)
    # A learning rate of zero, put there by hand, is obeyed.
    state = optax.tree.set(state, learning_rate=jnp.zeros(()))
    updates, _ = jax.jit(injected.update)(jax.tree.map(jnp.zeros_like, gradient(actual)), state, actual)
    if name != "oplora_extrapolated":  # whose momentum is in the increment
        after = dense_tree(optax.apply_updates(actual, updates))
        chex.assert_trees_all_close(
            after, dense_tree(actual), atol=1e-5
        )  # float32 rounding of entries near 1


@each
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_updates_have_the_type_of_the_parameters(name, dtype):
    tx = make(name)
    params, loss_fn = problem(dtype)
    state = tx.init(params)
    update = jax.jit(tx.update)
    for _ in range(2):
        gradient = gradient_of(loss_fn, "outer")(params)
        updates, new_state = update(gradient, state, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
        chex.assert_tree_all_finite(updates)
        params, state = optax.apply_updates(params, updates), new_state
    kept = {jnp.dtype(dtype), jnp.dtype(jnp.int32)}
    if CASES[name].wide:  # an average with a decay of 0.99 would not move in bfloat16
        kept.add(jnp.dtype(jnp.float32))
    assert {z.dtype for z in jax.tree.leaves(state)} <= kept


@each_of_factors
def test_accumulation_with_multi_steps(name):
    params, loss_fn = problem()
    gradient = jax.grad(loss_fn)(params)
    other = jax.tree.map(lambda z: 3 * z, gradient)
    tx = optax.MultiSteps(make(name), every_k_schedule=2)
    update = jax.jit(tx.update)
    updates, state = update(gradient, tx.init(params), params)
    assert not any(np.any(z) for z in jax.tree.leaves(updates))
    updates, state = update(other, state, params)
    mean = jax.tree.map(lambda z: 2 * z, gradient)
    inner = make(name)
    expected, _ = jax.jit(inner.update)(mean, inner.init(params), params)
    chex.assert_trees_all_close(updates, expected, rtol=1e-4, atol=1e-5)  # the mean is rounded: some eps


def sharded_problem(mesh, layout):
    """Ones of two layouts: the layers of a stack spread out, or the rows of a and the columns of b."""
    put = lambda spec, *shape: jax.device_put(jnp.ones(shape), NamedSharding(mesh, PartitionSpec(*spec)))
    if layout == "stacked":
        param = LowRank(put(("d",), 8, 16, 2), put(("d",), 8, 2, 8))
        return param, OuterProduct(put(("d",), 8, 3, 16), put(("d",), 8, 3, 8)), put(("d",), 8, 16, 8)
    param = LowRank(put(("d",), 16, 2), put((None, "d"), 2, 8))
    return param, OuterProduct(put((), 3, 16), put((), 3, 8)), put(("d",), 16, 8)


@each
def test_sharding_is_stable_on_a_mesh(name):
    check_sharding(name, "rows_and_columns", AxisType.Auto)


@each
def test_sharding_is_stable_on_a_mesh_of_explicit_axes(name):
    check_sharding(name, "stacked", AxisType.Explicit)


# The rows and columns of a matrix would be spread over the same devices.
@pytest.mark.parametrize("name", [name for name in OURS if not CASES[name].forms])
def test_explicit_axes_that_a_step_contracts(name):
    check_sharding(name, "rows_and_columns", AxisType.Explicit)


def check_sharding(name, layout, axis_type):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(axis_type,), devices=jax.devices("cpu")[:8])
    param, outer, bias = sharded_problem(mesh, layout)
    params = {"lora": param, "bias": bias}
    gradient = {"lora": outer, "bias": bias}
    with jax.set_mesh(mesh):
        tx = make(name)
        state = tx.init(params)
        updates, new_state = jax.jit(tx.update)(gradient, state, params)
    for new, old in zip(*map(jax.tree.leaves, ((updates, new_state), (params, state))), strict=True):
        assert (new.shape, new.dtype) == (old.shape, old.dtype)
        assert new.sharding.is_equivalent_to(old.sharding, new.ndim) or old.ndim == 0
    chex.assert_tree_all_finite(updates)


@each
def test_schedules(name):
    params, loss_fn = problem()
    gradient = gradient_of(loss_fn, "outer")
    rate = CASES[name].learning_rate
    constant, _ = run(make(name), params, gradient, 3)
    scheduled, _ = run(make(name, optax.constant_schedule(rate)), params, gradient, 3)
    chex.assert_trees_all_close(scheduled, constant, atol=2e-5)  # compiled apart: float32 rounding of 3 steps
    # The step size at count 0, 1, 2: three steps differ from one by what the first two do.
    schedule = lambda count: jnp.where(count == 2, rate, 0.0)
    tx, state, now = make(name, schedule), make(name, schedule).init(params), params
    update = jax.jit(tx.update)
    for step in range(3):
        updates, state = update(gradient(now), state, now)
        before, now = now, optax.apply_updates(now, updates)
        moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), dense_tree(now), dense_tree(before))
        if step < 2:  # float32 rounding of entries near 1, where factors are new but the increment is not
            assert max(jax.tree.leaves(moved)) < 1e-5
        else:
            assert min(jax.tree.leaves(moved)) > 1e-3


@each_of_ours_and_kind
def test_partition_with_frozen_leaves(name, kind):
    params, loss_fn = problem()
    gradient = gradient_of(loss_fn, kind)(params)
    labels = {"first": "train", "bias": "freeze"}
    tx = optax.partition({"train": make(name), "freeze": optax.set_to_zero()}, labels)
    updates, state = jax.jit(tx.update)(gradient, tx.init(params), params)
    assert not np.any(updates["bias"]) and np.any(updates["first"].b)
    assert np.any(updates["first"].a) == CASES[name].trains_a
    expected, _ = jax.jit(make(name).update)(gradient, make(name).init(params), params)
    chex.assert_trees_all_close(updates["first"], expected["first"], atol=1e-5)  # compiled apart: float32
    if name == "oplora":
        assert is_low_rank(optax.tree.get(state, "momentum")["first"])


@each_kind
def test_partition_with_a_frozen_lora_parameter(kind):
    params, loss_fn = problem(layers=("first", "second"))
    gradient = gradient_of(loss_fn, kind)(params)
    frozen = lambda path, _: "freeze" if path[0].key == "first" else "train"
    labels = jax.tree.map_with_path(frozen, params, is_leaf=is_low_rank)
    tx = optax.partition({"train": make("oplora"), "freeze": oplora_jax.set_to_zero()}, labels)
    updates, _ = jax.jit(tx.update)(gradient, tx.init(params), params)
    after = optax.apply_updates(params, updates)
    chex.assert_trees_all_equal(after["first"], params["first"])
    assert np.any(updates["second"].b) and np.any(updates["bias"])


@each_of_factors
def test_apply_if_finite(name):
    params, loss_fn = problem()
    gradient = jax.grad(loss_fn)(params)
    broken = gradient | {"first": jax.tree.map(lambda z: z.at[0, 0].set(jnp.nan), gradient["first"])}
    tx = optax.apply_if_finite(make(name), max_consecutive_errors=3)
    update = jax.jit(tx.update)
    state = tx.init(params)
    updates, after = update(broken, state, params)
    assert not any(np.any(z) for z in jax.tree.leaves(updates)) and int(after.total_notfinite) == 1
    chex.assert_trees_all_equal(after.inner_state, state.inner_state)
    updates, _ = update(gradient, after, params)
    assert np.any(updates["first"].b) and np.any(updates["bias"])
    assert np.any(updates["first"].a) == CASES[name].trains_a


@pytest.mark.parametrize(
    "name, kind", [(name, "outer") for name in OURS] + [("oplora", k) for k in KINDS[1:]]
)
def test_after_clipping(name, kind):
    params, loss_fn = problem()
    gradient = gradient_of(loss_fn, kind)(params)
    norm = oplora_jax.global_norm(gradient)
    clipped = optax.chain(oplora_jax.clip_by_global_norm(norm / 4), make(name))
    updates, _ = jax.jit(clipped.update)(gradient, clipped.init(params), params)
    # One side of an outer product.
    quarter = lambda g: OuterProduct(g.x, g.dy / 4) if isinstance(g, OuterProduct) else g / 4
    quarters = jax.tree.map(quarter, gradient, is_leaf=lambda g: isinstance(g, OuterProduct))
    tx = make(name)
    expected, _ = jax.jit(tx.update)(quarters, tx.init(params), params)
    # The norm is rounded, and so is the step: some eps of entries near 1.
    chex.assert_trees_all_close(updates, expected, rtol=1e-4, atol=1e-5)


@each
def test_a_stack_is_as_good_as_its_layers(name):
    normal = normals(0, jnp.float32)
    params = LowRank(normal(3, 8, 2), normal(3, 2, 6), 2.0)
    gradients = [OuterProduct(normal(3, 5, 8), normal(3, 5, 6)) for _ in range(2)]
    tx = make(name)
    update = jax.jit(tx.update)
    state = tx.init(params)
    # Each layer starts where it does in the stack: some moments are random.
    slices = [optax.tree.map_params(tx, lambda z, i=i: z[i], state) for i in range(3)]
    stacked = params
    for gradient in gradients:
        updates, state = update(gradient, state, stacked)
        stacked = optax.apply_updates(stacked, updates)
    for i in range(3):
        layer = lambda tree, i=i: jax.tree.map(lambda z: z[i], tree)
        one, one_state = layer(params), slices[i]
        assert signature(one_state) == signature(tx.init(one))
        for gradient in gradients:
            updates, one_state = update(layer(gradient), one_state, one)
            one = optax.apply_updates(one, updates)
        # Batched solves and decompositions round otherwise: some eps, condition numbers of 10 to 100.
        matrices = [oplora_jax.to_dense(p) for p in (layer(stacked), one)]
        chex.assert_trees_all_close(*matrices, rtol=1e-3, atol=1e-4)


@each
def test_flax_train_state(name):
    params, loss_fn = problem()
    gradient = gradient_of(loss_fn, "outer")(params)
    tx = make(name)
    state = TrainState.create(apply_fn=loss_fn, params=params, tx=tx)
    after = jax.jit(lambda state, gradient: state.apply_gradients(grads=gradient))(state, gradient)
    updates, _ = jax.jit(tx.update)(gradient, tx.init(params), params)
    # Compiled together with the addition: float32 rounding.
    chex.assert_trees_all_close(after.params, optax.apply_updates(params, updates), atol=1e-5)
    assert int(after.step) == 1


@pytest.mark.parametrize("name, kind", OURS_AND_KINDS)
def test_a_non_finite_gradient_is_skipped_and_counted(name, kind):
    params, loss_fn = problem(layers=("first", "second"))
    gradient = gradient_of(loss_fn, kind)(params)
    tx = make(name)
    update = jax.jit(tx.update)
    _, state = update(gradient, tx.init(params), params)
    expected, healthy = update(gradient, state, params)
    for poison in (jnp.nan, jnp.inf, -jnp.inf):
        broken = gradient | {
            "first": jax.tree.map(lambda z, v=poison: z.at[(0,) * z.ndim].set(v), gradient["first"])
        }
        updates, after = update(broken, state, params)
        assert int(after.skipped) == int(state.skipped) + 1
        assert not np.any(updates["first"].a) and not np.any(updates["first"].b)
        for key in ("second", "bias"):
            chex.assert_trees_all_equal(updates[key], expected[key])
        for (path, new), old, good in zip(
            jax.tree.leaves_with_path(after), *map(jax.tree.leaves, (state, healthy)), strict=True
        ):
            if "skipped" not in jax.tree_util.keystr(path):
                mine = any(getattr(key, "key", None) == "first" for key in path)
                np.testing.assert_array_equal(new, old if mine else good)


@each
def test_others(name):
    params, loss_fn = problem()
    gradient = gradient_of(loss_fn, CASES[name].kinds[1])
    params_after, _ = run(make(name, others=optax.set_to_zero()), params, gradient, 2)
    chex.assert_trees_all_equal(params_after["bias"], params["bias"])
    assert np.any(params_after["first"].b != params["first"].b)


@each
def test_float32_parameters_where_x64_is_on(name):
    """Steps and states are those of float32; Adam's bias corrections cancel to 1e-5 there, and not in x64."""
    params, loss_fn = problem()
    gradient = gradient_of(loss_fn, CASES[name].kinds[-1])(params)
    (expected, before), tx = run(make(name), params, lambda _: gradient, 2), make(name)
    with jax.enable_x64(True):
        state = tx.init(params)
        assert signature(state) == signature(before)
        updates, after = jax.eval_shape(tx.update, gradient, state, params)
        assert signature(after) == signature(before)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
        found, _ = run(tx, params, lambda _: gradient, 2)
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)


@each
def test_settings_of_float64_where_x64_is_on(name):
    """Arrays, and a schedule of them, change no type of a LoRA parameter's."""
    case, (params, loss_fn) = CASES[name], problem()
    gradient = gradient_of(loss_fn, case.kinds[0])(params)
    with jax.enable_x64(True):
        numbers = {key: jnp.float64(z) for key, z in case.settings.items() if type(z) is float}
        tx = case.factory(lambda count: jnp.float64(0.1) / (count + 1), **case.settings | numbers)
        state = tx.init(params)
        updates, after = jax.eval_shape(tx.update, gradient, state, params)
    # Not of the other leaves: Optax's own states become float64.
    assert signature(after.lora) == signature(state.lora)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates["first"], params["first"])


@each
def test_strict_dtype_promotion(name):
    """Also of bfloat16 parameters, whose steps are in float32, and with a schedule."""
    for dtype in (jnp.float32, jnp.bfloat16):
        params, loss_fn = problem(dtype)
        gradient = gradient_of(loss_fn, CASES[name].kinds[0])(params)
        with jax.numpy_dtype_promotion("strict"):
            tx = make(name, optax.linear_schedule(0.1, 0.0, 10))
            updates, _ = jax.eval_shape(lambda p, g, tx=tx: tx.update(g, tx.init(p), p), params, gradient)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)


@each
def test_no_array_stands_twice_in_a_fresh_state(name):
    """So that it can be donated to a compiled step together with the parameters."""
    params, _ = problem(layers=("first", "second"))
    places = [z.unsafe_buffer_pointer() for z in jax.tree.leaves((params, make(name).init(params)))]
    assert len(set(places)) == len(places)


@each
def test_donation(name):
    """A step may write over the parameters and the state that it is given, and makes no array twice."""
    params, loss_fn = problem()
    gradient, tx = gradient_of(loss_fn, CASES[name].kinds[0])(params), make(name)
    expected, _ = run(tx, params, lambda _: gradient, 2)

    def step(params, state):
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    donated = jax.jit(step, donate_argnums=(0, 1))
    found = donated(*donated(jax.tree.map(jnp.array, params), tx.init(params)))
    places = [z.unsafe_buffer_pointer() for z in jax.tree.leaves(found)]
    assert len(set(places)) == len(places)
    chex.assert_trees_all_close(found[0], expected, rtol=1e-5, atol=2e-6)  # compiled apart: float32


@each
def test_trees_of_one_sort_of_leaf(name):
    tx = make(name)
    params, _ = problem()
    bare = params["first"]
    ones = OuterProduct(*(jnp.ones((1, size)) for size in bare.shape))
    updates, state = jax.jit(tx.update)(ones, tx.init(bare), bare)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, bare)
    assert np.any(updates.b) and int(state.skipped) == 0
    plain = {"bias": params["bias"], "nested": [jnp.ones((2, 2))]}
    with pytest.warns(UserWarning, match="no LoRA parameter") as found:
        start = tx.init(plain)
    assert len(found) == 1
    updates, state = jax.jit(tx.update)(plain, start, plain)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, plain)
    assert np.any(updates["nested"][0]) and int(state.skipped) == 0
