"""Trees of Flax NNX, Qwix and PyTorch's habit, in which a LoRA parameter's factors are separate leaves."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import event, given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st

from oplora_jax import LowRank, from_low_rank, is_low_rank, merge, oplora, pair_factors, to_dense, to_low_rank
from tests.arrays import normals
from tests.optimizers.cases import OF_FACTORS, make, problem, run, signature

pytestmark = pytest.mark.usefixtures("quick_compilation")

SCALE = 2.0  # of the table's problem
# What the two factors of the table's problem, (8, 2) and (2, 6), may look like in a tree.
LAYOUTS = {
    "nnx": ({"lora_a": (8, 2), "lora_b": (2, 6)}, {}),
    "qwix": ({"kernel_lora_a": (8, 2), "kernel_lora_b": (2, 3, 2)}, {}),
    "gemma": ({"lora": {"a": (4, 2, 2), "b": (2, 6)}}, {}),
    "torch": ({"lora_A": (2, 8), "lora_B": (6, 2)}, {"transposed": True}),
    "torch state dict": ({"lora_A.weight": (2, 8), "lora_B.weight": (6, 2)}, {"transposed": True}),
    "dense layers": ({"lora_a": {"kernel": (8, 2)}, "lora_b": {"kernel": (2, 6)}}, {}),
    "other names": (
        {"down": {"w": (8, 2)}, "up": {"w": (2, 6)}, "backup": {"w": (3,)}},
        {"pattern": ("down/w", "up/w")},
    ),
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def separate(params, layout):
    """A tree of the table's problem with factors as separate leaves."""
    shapes, options = LAYOUTS[layout]
    a, b = params["first"].a, params["first"].b
    arrays = [a.T, b.T] if options.get("transposed") else [a, b]
    leaves, treedef = jax.tree.flatten(shapes, is_leaf=lambda z: isinstance(z, tuple))
    if layout == "other names":
        arrays = [jnp.ones(3, a.dtype), *arrays]
    first = [z.reshape(shape) for z, shape in zip(arrays, leaves, strict=True)]
    return {"bias": params["bias"], "first": treedef.unflatten(first)}


def settings(layout):
    return {"scale": SCALE} | LAYOUTS[layout][1]


def separate_loss(loss_fn, layout):
    """The problem's loss as a function of the separate leaves."""

    def separate_loss_fn(tree):
        [lora] = to_low_rank(tree, **settings(layout)).values()
        return loss_fn({"bias": tree["bias"], "first": lora})

    return separate_loss_fn


def setup(layout="qwix", dtype=jnp.float32):
    params, loss_fn = problem(dtype)
    return params, separate(params, layout), jax.grad(loss_fn), jax.grad(separate_loss(loss_fn, layout))


@each_layout
def test_conversion_is_exact(layout):
    params, _ = problem()
    tree = separate(params, layout)
    lora = to_low_rank(tree, **settings(layout))
    [(name, param)] = lora.items()
    assert name == ("first/kernel" if layout == "qwix" else "first")
    chex.assert_trees_all_equal(param, params["first"])
    chex.assert_trees_all_equal(from_low_rank(lora, tree, **settings(layout)), tree)
    zeros = jax.tree.map(jnp.zeros_like, tree)
    back = from_low_rank({name: LowRank(2 * param.a, 2 * param.b, 0.5)}, zeros, **settings(layout))
    [moved] = to_low_rank(back, **settings(layout)).values()
    # Scale 0.5 becomes 2: both factors are halved, without rounding.
    chex.assert_trees_all_equal(moved, params["first"])
    assert not np.any(back["bias"])


@pytest.mark.parametrize("name", OF_FACTORS)
def test_the_steps_are_those_of_the_inner_optimizer(name):
    params, tree, gradient, separate_gradient = setup()
    tx = pair_factors(make(name), **settings("qwix"))
    ends = []
    for optimizer, now, g in ((make(name), params, gradient(params)), (tx, tree, separate_gradient(tree))):
        state, update = optimizer.init(now), jax.jit(optimizer.update)
        for _ in range(2):
            updates, state = update(g, state, now)
            now = optax.apply_updates(now, updates)
        ends.append((now, state))
    (expected, expected_state), (actual, state) = ends
    # The same operations, compiled apart: float32 rounding of two steps.
    chex.assert_trees_all_close(actual, separate(expected, "qwix"), rtol=1e-5, atol=1e-6)
    shapes = [sorted(z.shape for z in jax.tree.leaves(s)) for s in (state, expected_state)]
    assert shapes[0] == shapes[1]
    # The state is the inner optimizer's own, and may be mapped over.
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(tree))
    mapped = optax.tree.map_params(tx, lambda z: z + 1, state, transform_non_params=lambda z: z)
    for old, new in zip(*map(jax.tree.leaves, (state, mapped)), strict=True):
        assert np.any(old != new) == (old.ndim > 0 or old.dtype != jnp.int32)  # all but counters
    nodes = lambda s: sum(is_low_rank(node) for node in jax.tree.leaves(s, is_leaf=is_low_rank))
    assert nodes(state) == nodes(expected_state)
    assert nodes(state) or not name.startswith(("oplora", "altlora")) or name == "oplora_no_momentum"


@each_layout
def test_every_layout_takes_the_same_steps(layout):
    params, tree, gradient, separate_gradient = setup(layout)
    expected, _ = run(make("oplora"), params, gradient, 2)
    actual, _ = run(pair_factors(make("oplora"), **settings(layout)), tree, separate_gradient, 2)
    # Compiled apart: float32 rounding of two steps.
    chex.assert_trees_all_close(actual, separate(expected, layout), rtol=1e-5, atol=1e-6)


def test_the_scale_matters_and_may_depend_on_the_name():
    """Twice the scale with the factors over sqrt(2) is the same matrix, and takes the same path."""
    _, tree, _, _ = setup()
    loss_fn = lambda p, scale: jnp.sum((to_dense(to_low_rank(p, scale=scale)["first/kernel"]) - 1) ** 2)
    small = from_low_rank(to_low_rank(tree, scale=SCALE), tree, scale=2 * SCALE)
    paths = []
    for start, scale in ((tree, SCALE), (small, lambda name: {"first/kernel": 2 * SCALE}[name])):
        tx = pair_factors(oplora(0.1, momentum=0), scale=scale)
        gradient = jax.grad(lambda p, scale=scale: loss_fn(p, scale))
        after, _ = run(tx, start, gradient, 3)
        paths.append(to_dense(to_low_rank(after, scale=scale)["first/kernel"]))
    # float32 rounding of three steps; the step itself is 0.1 and more.
    chex.assert_trees_all_close(*paths, rtol=1e-4, atol=1e-5)
    wrong, _ = run(
        pair_factors(oplora(0.1, momentum=0), scale=1), tree, jax.grad(lambda p: loss_fn(p, SCALE)), 3
    )
    off = to_dense(to_low_rank(wrong, scale=SCALE)["first/kernel"]) - paths[0]
    assert np.abs(off).max() > 1e-2


def step_with(tx, params, gradient):
    return jax.jit(tx.update)(gradient, tx.init(params), params)


def test_wrappers_around_it():
    """chain, inject_hyperparams, MultiSteps, apply_if_finite: outside, and inside where that is possible."""
    _, tree, _, separate_gradient = setup()
    gradient = separate_gradient(tree)
    pair = lambda tx: pair_factors(tx, **settings("qwix"))
    tx = pair(make("scaled_gd", 0.1))
    expected, _ = step_with(tx, tree, gradient)
    injected = optax.inject_hyperparams(lambda learning_rate: pair(make("scaled_gd", learning_rate)))
    wrapped = {
        "chain": optax.chain(optax.clip_by_global_norm(1e6), tx),
        "inject outside": injected(learning_rate=0.1),
        "inject inside": pair(
            optax.inject_hyperparams(lambda learning_rate: make("scaled_gd", learning_rate))(0.1)
        ),
        "apply_if_finite": optax.apply_if_finite(tx, 3),
        "apply_if_finite inside": pair(optax.apply_if_finite(make("scaled_gd", 0.1), 3)),
        "MultiSteps": optax.MultiSteps(tx, every_k_schedule=1),
        "masked": optax.masked(tx, {"bias": True, "first": True}),
    }
    for name, wrapper in wrapped.items():
        updates, state = step_with(wrapper, tree, gradient)
        # Compiled apart: float32 rounding.
        chex.assert_trees_all_close(updates, expected, rtol=1e-5, atol=1e-6, custom_message=name)
        assert signature(state) == signature(wrapper.init(tree)), name
        mapped = optax.tree.map_params(wrapper, jnp.zeros_like, state, transform_non_params=lambda z: z)
        assert not any(np.any(z) for z in jax.tree.leaves(mapped) if z.ndim), name


def test_partition_masked_and_absent_leaves():
    _, tree, _, separate_gradient = setup()
    gradient = separate_gradient(tree)
    labels = {"bias": "freeze", "first": "train"}
    transforms = {"train": pair_factors(make("scaled_gd"), scale=SCALE), "freeze": optax.set_to_zero()}
    updates, _ = step_with(optax.partition(transforms, labels), tree, gradient)
    assert not np.any(updates["bias"])
    expected, _ = step_with(transforms["train"], tree, gradient)
    # Compiled apart: float32 rounding.
    chex.assert_trees_all_close(updates["first"], expected["first"], rtol=1e-5, atol=1e-6)
    with_none = lambda t: t | {"absent": None, "masked": optax.MaskedNode(), "list": [None, t["bias"]]}
    updates, _ = step_with(transforms["train"], with_none(tree), with_none(gradient))
    assert updates["absent"] is None and updates["masked"] == optax.MaskedNode()
    chex.assert_trees_all_close(updates["first"], expected["first"], rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(updates["list"][1], expected["bias"], rtol=1e-5, atol=1e-6)


def test_low_rank_parameters_and_exact_gradients_pass_through():
    """LowRank nodes beside the pairs, with every kind of gradient."""
    params, tree, _, separate_gradient = setup()
    both = tree | {"merged": params["first"]}
    dense = jnp.ones((8, 6))
    updates, state = step_with(
        pair_factors(make("oplora"), scale=SCALE), both, separate_gradient(tree) | {"merged": dense}
    )
    momentum = optax.tree.get(state, "momentum")
    assert is_low_rank(momentum["rest"]["merged"]) and is_low_rank(momentum["paired"]["first/kernel"])
    # Alone, from the same random start of the momentum.
    inner = make("oplora")
    start = optax.tree.set(inner.init(params["first"]), momentum=_initial_momentum(both)["rest"]["merged"])
    expected, _ = jax.jit(inner.update)(dense, start, params["first"])
    chex.assert_trees_all_close(updates["merged"], expected, rtol=1e-5, atol=1e-6)  # compiled apart: float32
    assert all(np.any(z) for z in jax.tree.leaves(updates))


def _initial_momentum(tree):
    return optax.tree.get(pair_factors(make("oplora"), scale=SCALE).init(tree), "momentum")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_types_and_a_stable_state(dtype):
    _, tree, _, separate_gradient = setup(dtype=dtype)
    tx = pair_factors(make("oplora"), scale=SCALE)
    state = tx.init(tree)
    traces = []

    @jax.jit
    def step(tree, state):
        traces.append(None)
        updates, state = tx.update(separate_gradient(tree), state, tree, value=1.0, unknown="x")
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, tree)
        return optax.apply_updates(tree, updates), state

    before = signature((tree, state))
    for _ in range(3):
        tree, state = step(tree, state)
        assert signature((tree, state)) == before
    assert len(traces) == 1


def test_extra_arguments_reach_the_inner_optimizer():
    _, tree, _, separate_gradient = setup()
    seen = []

    def update(updates, state, params=None, *, value, **extra_args):
        seen.append((value, params))
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    gradient = separate_gradient(tree)
    tx = pair_factors(inner, scale=SCALE)
    updates, _ = tx.update(gradient, tx.init(tree), value=3.0)
    assert seen == [(3.0, None)]
    chex.assert_trees_all_equal(updates, gradient)


def test_a_tree_without_leaves():
    tx = pair_factors(oplora(0.1))
    tx.init({})
    empty = {"first": None, "bias": optax.MaskedNode()}
    updates, _ = tx.update(empty, tx.init(empty), empty)
    assert updates == empty and to_low_rank(empty) == {}


SHAPES = {
    # b of an einsum keeps the axes of its outputs, a has several inputs; both may be stacks of layers.
    ((4, 2), (2, 3, 5)): ((4, 2), (2, 15)),
    ((3, 5, 2), (2, 4)): ((15, 2), (2, 4)),
    ((3, 5, 1), (1,)): ((15, 1), (1, 1)),
    ((7, 4, 2), (7, 2, 5)): ((7, 4, 2), (7, 2, 5)),
    ((7, 4, 2), (7, 2, 3, 5)): ((7, 4, 2), (7, 2, 15)),
    ((7, 3, 4, 2), (7, 2, 5)): ((7, 12, 2), (7, 2, 5)),
    ((7, 3, 4, 2), (7, 3, 2, 5)): ((7, 3, 4, 2), (7, 3, 2, 5)),
    ((3, 2, 4, 6), (6, 7)): ((24, 6), (6, 7)),
    # A stack of one along another axis is the same matrix without it.
    ((4, 1, 2), (2, 1, 5)): ((4, 2), (2, 5)),
}


@pytest.mark.parametrize("shapes, expected", SHAPES.items())
def test_axes(shapes, expected):
    a, b = (jnp.arange(float(np.prod(shape))).reshape(shape) for shape in shapes)
    tree = {"w": {"lora_a": a, "lora_b": b}}
    param = to_low_rank(tree)["w"]
    assert (param.a.shape, param.b.shape) == expected
    chex.assert_trees_all_equal(from_low_rank({"w": param}, tree), tree)


# Shapes that may be meant in several ways: what is said for each, and the factors that it makes.
OPEN = {
    "a stack, or two axes on each side": (
        ((4, 16, 4), (4, 4, 8)),
        {"batch_axes=0": ((64, 4), (4, 32)), "batch_axes=1": ((4, 16, 4), (4, 4, 8))},
    ),
    "a stack along axis 1, or heads on each side": (
        ((8, 3, 2), (2, 3, 8)),
        {"batch_axes=0": ((24, 2), (2, 24)), "stack_axis=1, batch_axes=1": ((3, 8, 2), (3, 2, 8))},
    ),
    "a stack along the last axis": (
        ((4, 2, 2), (2, 3, 2)),
        {"batch_axes=0": ((8, 2), (2, 6)), "stack_axis=2, batch_axes=1": ((2, 4, 2), (2, 2, 3))},
    ),
    "experts in a stack along axis 2": (
        ((5, 8, 3, 2), (5, 2, 3, 7)),
        {
            "stack_axis=0, batch_axes=1": ((5, 24, 2), (5, 2, 21)),
            "stack_axis=2, batch_axes=2": ((3, 5, 8, 2), (3, 5, 2, 7)),
        },
    ),
    "a stack along the first axis, or the last": (
        ((3, 3, 2), (3, 2, 2, 2)),
        {
            "stack_axis=0, batch_axes=1": ((3, 3, 2), (3, 2, 4)),
            "stack_axis=2, batch_axes=1": ((2, 3, 3), (2, 3, 4)),
            "stack_axis=-1, batch_axes=1": ((2, 3, 3), (2, 3, 4)),
        },
    ),
    "full rank": (
        ((2, 2), (2, 2)),
        {
            "transposed=False, batch_axes=0": ((2, 2), (2, 2)),
            "transposed=True, batch_axes=0": ((2, 2), (2, 2)),
        },
    ),
    "as many layers as inputs, PyTorch's": (
        ((8, 2, 8), (8, 6, 2)),
        {
            "transposed=False, batch_axes=0": ((16, 8), (8, 12)),
            "transposed=True, batch_axes=1": ((8, 8, 2), (8, 2, 6)),
        },
    ),
}


@pytest.mark.parametrize("shapes, meanings", OPEN.values(), ids=OPEN.keys())
def test_what_the_shapes_leave_open_is_asked_for(shapes, meanings):
    a, b = (jnp.arange(float(np.prod(shape))).reshape(shape) for shape in shapes)
    tree = {"w": {"lora_a": a, "lora_b": b}}
    with pytest.raises(
        ValueError, match=r"w/lora_a \(.*\) and w/lora_b .* several layouts; say which"
    ) as error:
        to_low_rank(tree)
    for said, expected in meanings.items():
        assert f"{said} (matrices " in str(error.value)
        options = eval(f"dict({said})")
        param = to_low_rank(tree, **options)["w"]
        assert (param.a.shape, param.b.shape) == expected
        chex.assert_trees_all_equal(from_low_rank({"w": param}, tree, **options), tree)
    assert str(error.value).count("matrices") == len(meanings)


# What is said and does not fit is an error, which names what would.
UNFIT = {
    "no stack": (((4, 2), (2, 3)), {"batch_axes": 1}, "do not fit batch_axes=1; .* with batch_axes=0"),
    "another axis": (
        ((8, 3, 2), (2, 3, 8)),
        {"batch_axes": 1},
        "do not fit batch_axes=1; .*batch_axes=0 .* or stack_axis=1, batch_axes=1",
    ),
    "no such axis": (((8, 3, 2), (2, 3, 8)), {"stack_axis": 3}, "do not fit stack_axis=3; .*stack_axis=1"),
    "one of two axes": (
        ((3, 3, 2), (3, 2, 2, 2)),
        {"batch_axes": 2},
        "do not fit batch_axes=2; .*stack_axis=0, .* or stack_axis=-1, ",
    ),
    "both": (
        ((8, 3, 2), (2, 3, 8)),
        {"stack_axis": 1, "batch_axes": 2},
        "do not fit batch_axes=2 and stack_axis=1; ",
    ),
    "the layers as the rank": (((3, 8, 2), (3, 2, 8)), {"batch_axes": 0}, "do not fit batch_axes=0; .*=1"),
    "unsaid": (((8, 2, 3), (2, 9, 3)), {}, "do not fit; .* with stack_axis=2, batch_axes=1"),
    "a negative number": (((4, 2), (2, 3)), {"batch_axes": -1}, "do not fit batch_axes=-1"),
}


@pytest.mark.parametrize("shapes, options, message", UNFIT.values(), ids=UNFIT.keys())
def test_what_is_said_must_fit(shapes, options, message):
    tree = {"w": {"lora_a": jnp.ones(shapes[0]), "lora_b": jnp.ones(shapes[1])}}
    with pytest.raises(ValueError, match=r"w/lora_a \(.*\) and w/lora_b .*: the factors " + message):
        to_low_rank(tree, **options)
    with pytest.raises(ValueError, match=message):
        pair_factors(oplora(0.1), **options).init(tree)


def test_layouts_may_depend_on_the_name():
    """A stack along axis 1 beside a layer of its own."""
    tree = {
        "layers": {"lora_a": jnp.ones((8, 3, 2)), "lora_b": jnp.ones((2, 3, 8))},
        "head": {"lora_a": jnp.ones((8, 2)), "lora_b": jnp.ones((2, 5))},
    }
    with pytest.raises(ValueError, match=r"head/lora_a .*do not fit stack_axis=1; .*batch_axes=0"):
        to_low_rank(tree, stack_axis=1)
    lora = to_low_rank(tree, stack_axis={"layers": 1, "head": None}.get)
    assert {name: p.shape for name, p in lora.items()} == {"layers": (3, 8, 8), "head": (8, 5)}
    layers = {"layers": tree["layers"]}
    assert to_low_rank(layers, batch_axes=lambda name: 0)["layers"].shape == (24, 24)


SIZES = st.sampled_from([1, 2, 3, 4, 6])


@st.composite
def laid_out(draw):
    """(factors as arrays, what may be said of their layout, the increments over the batch axes in front)."""
    transposed = draw(st.booleans())
    batch, inputs, outputs = (
        draw(st.lists(SIZES, min_size=least, max_size=most))
        for least, most in ((0, 2), (1, 1 if transposed else 2), (1, 1 if transposed else 2))
    )
    rank = draw(st.integers(1, min(np.prod(inputs), np.prod(outputs), 4)))
    a_axes, b_axes = (
        ([rank, *inputs], [*outputs, rank]) if transposed else ([*inputs, rank], [rank, *outputs])
    )
    rng = np.random.default_rng(draw(st.integers(0, 9)))
    a, b = (rng.standard_normal([*batch, *axes]) for axes in (a_axes, b_axes))
    left = np.swapaxes(a, -1, -2) if transposed else a.reshape(*batch, -1, rank)
    right = np.swapaxes(b, -1, -2) if transposed else b.reshape(*batch, rank, -1)
    said = {"transposed": transposed, "batch_axes": len(batch)}
    if batch:  # the first of them somewhere else
        said["stack_axis"] = draw(st.integers(0, min(a.ndim, b.ndim) - 1) | st.just(-1))
        a, b = (np.moveaxis(z, 0, said["stack_axis"]) for z in (a, b))
    return (a, b), said, left @ right


@pytest.mark.usefixtures("x64")
@settings_of_hypothesis(max_examples=100, deadline=None)
@given(case=laid_out(), data=st.data())
def test_a_pair_is_right_or_refused(case, data):
    """Whatever is said of its layout: the increments are those of the layer, or it is an error."""
    (a, b), truth, increments = case
    said = {name: value for name, value in truth.items() if data.draw(st.booleans(), label=name)}
    try:
        param = to_low_rank({"lora_a": jnp.asarray(a), "lora_b": jnp.asarray(b)}, **said)[""]
    except ValueError as error:
        assert "say which" in str(error) or "they would with" in str(error)
        event("refused")
        assert said != truth, "all was said"
        return
    event(f"right, {len(said)} of {len(truth)} said")
    stack = truth.get("stack_axis", 0)
    if "stack_axis" not in said and stack and increments.ndim == 4 and (stack % a.ndim) == 1:
        increments = np.moveaxis(increments, 0, 1)  # it is the second of two batch axes
    # float64: products of four at most.
    np.testing.assert_allclose(to_dense(param).reshape(increments.shape), increments, rtol=1e-12, atol=1e-12)


# Shapes of a and b whose rank no matrix has: as given, and whether the other layout is right.
ABOVE = {
    "square, PyTorch's": ((2, 8), (8, 2), {}, True),
    "square, Flax's": ((8, 2), (2, 8), {"transposed": True}, True),
    "stacked, PyTorch's": ((3, 2, 8), (3, 8, 2), {}, True),
    "stacked, Flax's": ((3, 8, 2), (3, 2, 8), {"transposed": True}, True),
    "above n alone": ((4, 6), (6, 8), {}, False),
    "above m alone": ((8, 6), (6, 4), {}, False),
    "above both": ((4, 9), (9, 3), {}, False),
    "transposed, above m": ((6, 8), (4, 6), {"transposed": True}, False),
    "heads": ((2, 2, 5), (5, 2, 4), {}, False),
    "a vector": ((4, 2), (2,), {}, False),
    "in the axes asked for": ((4, 3, 4), (4, 4, 8), {"batch_axes": 1}, False),
}


@pytest.mark.parametrize("a, b, options, other", ABOVE.values(), ids=ABOVE.keys())
@pytest.mark.parametrize("names", [("lora_a", "lora_b"), ("lora_A/weight", "lora_B/weight")])
def test_a_rank_that_no_matrix_has(a, b, options, other, names):
    tree = {"q/" + names[0]: jnp.ones(a), "q/" + names[1]: jnp.ones(b)}
    tx = pair_factors(oplora(0.1), **options)
    said = (
        rf"q/{names[0]} .*do not fit.*: with transposed={options.get('transposed', False)} they are of rank"
    )
    for use in (
        lambda: tx.init(tree),
        lambda: to_low_rank(tree, **options),
        lambda: jax.eval_shape(tx.init, tree),
    ):
        with pytest.raises(ValueError, match=said) as error:
            use()
        assert ("they would with transposed=" in str(error.value)) == other
    if other:
        options = {"transposed": not options.get("transposed", False)}
        assert to_low_rank(tree, **options)["q"].a.shape[-2:] == (8, 2)


def test_full_rank_and_a_rank_that_tells_the_batch_axes():
    assert to_low_rank({"lora_a": jnp.ones((3, 3)), "lora_b": jnp.ones((3, 5))})[""].shape == (3, 5)
    # As a stack of four layers (3, 8) they would be of rank 4.
    tree = {"lora_a": jnp.ones((4, 3, 4)), "lora_b": jnp.ones((4, 4, 8))}
    assert to_low_rank(tree)[""].shape == (12, 32)


A, B = jnp.ones((4, 2)), jnp.ones((2, 3))
BAD = {
    "a alone": ({"q": {"w_lora_a": A}}, {}, r"q/w_lora_a: a LoRA factor without the other one, q/w_lora_b"),
    "b alone": ({"q": {"lora_B": B}}, {}, "q/lora_B: a LoRA factor without the other one, q/lora_A"),
    "mixed": ({"q": {"lora_a": A, "lora_B": B}}, {}, "q/lora_.: a LoRA factor without the other one"),
    "none": ({"q": {"kernel": A}, "r": [B]}, {}, "no pair of LoRA factors: .*; the paths are: q/kernel, r/0"),
    "pattern": ({"lora_a": A, "lora_b": B}, {"pattern": ("up", "down")}, "no paths end in up and down"),
    "shapes": (
        {"q": {"lora_a": A, "lora_b": jnp.ones((3, 3))}},
        {},
        r"q/lora_a \(4, 2\) and .* do not fit; exp",
    ),
    "layout": ({"lora_A": A.T, "lora_B": B.T}, {}, r"\(2, 4\) and .*they would with transposed=True"),
    "not transposed": ({"lora_A": A, "lora_B": B}, {"transposed": True}, "they would with transposed=False"),
    "one axis": ({"lora_a": A[0], "lora_b": B}, {}, r"lora_a \(2,\) and .* do not fit"),
    "rank 0": ({"lora_a": A[:, :0], "lora_b": B[:0]}, {}, "do not fit"),
    "scale": ({"q": {"lora_a": A, "lora_b": B}}, {"scale": 0.0}, r"q/lora_a: scale is 0\.0; expected a pos"),
    "scale of Qwix": (
        {"q": {"w_lora_a": A, "w_lora_b": B}},
        {},
        r"q/w_lora_a: .*Qwix's, which .*by alpha / rank; say scale=alpha / rank",
    ),
    "infinite scale": (
        {"q": {"lora_a": A, "lora_b": B}},
        {"scale": float("inf")},
        "q/lora_a: scale is inf; ",
    ),
    "names": ({"q": {"lora_a": A, "lora_b": B}, "q_lora_a": A, "q_lora_b": B}, {}, "another pair.*named 'q'"),
    "paths": ({"q/x": A, "q": {"x": A}, "lora_a": A, "lora_b": B}, {}, "q/x: several leaves"),
}


@pytest.mark.parametrize("tree, options, message", BAD.values(), ids=BAD.keys())
def test_bad_trees(tree, options, message):
    tx = pair_factors(oplora(0.1), **options)
    with pytest.raises(ValueError, match=message):
        tx.init(tree)
    with pytest.raises(ValueError, match=message):
        to_low_rank(tree, **options)


def test_bad_gradients_and_parameters():
    tree = {"q": {"lora_a": A, "lora_b": B}, "bias": jnp.ones(3)}
    tx = pair_factors(oplora(0.1))
    state = tx.init(tree)
    for wrong, message in (
        (A.T, r"q/lora_a: the gradient is \(2, 4\); the parameter needs an array \(4, 2\)"),
        (None, "q/lora_a: the gradient is NoneType"),
        (optax.MaskedNode(), "q/lora_a: the gradient is MaskedNode"),
    ):
        with pytest.raises(ValueError, match=message):
            tx.update(tree | {"q": {"lora_a": wrong, "lora_b": B}}, state, tree)
    with pytest.raises(ValueError, match="does not have the parameters' structure"):
        tx.update({"q": tree["q"]}, state, tree)
    with pytest.raises(ValueError, match=r"call update\(updates, state, params\)"):
        tx.update(tree, state)
    half = optax.masked(tx, {"q": {"lora_a": True, "lora_b": False}, "bias": False})
    with pytest.raises(ValueError, match=r"q/lora_a: .*both masked or none"):
        half.init(tree)
    with pytest.raises(ValueError, match=r"r: no such LoRA parameter; the tree has q"):
        from_low_rank({"r": LowRank(A, B)}, tree)
    with pytest.raises(ValueError, match=r"q: the factors are .*\(4, 1\).*; the tree needs .*\(4, 2\)"):
        from_low_rank({"q": LowRank(A[:, :1], B[:1])}, tree)


def test_whole_parameters_by_their_weights():
    """`LowRank` nodes, named by the weights beside them, with pairs or without; put back with their roles."""
    new = normals(0, jnp.float32)
    node = lambda **of: LowRank(new(4, 2), new(2, 6), **of)
    tree = {
        "dense": {"kernel": new(4, 6), "lora": node(scale=2.0)},
        "query": {"lora": {"w": node(roles="oio")}, "w": new(2, 4, 3)},
        "other": {"kernel_lora_a": new(4, 2), "kernel_lora_b": new(2, 6)},
    }
    lora = to_low_rank(tree, scale=3.0)
    assert lora["dense/kernel"] is tree["dense"]["lora"] and lora["query/w"] is tree["query"]["lora"]["w"]
    assert set(lora) == {"dense/kernel", "query/w", "other/kernel"}
    other = {name: LowRank(2 * p.a, p.b, p.scale / 2) for name, p in lora.items()}
    back = from_low_rank(other, tree, scale=3.0)
    assert back["query"]["lora"]["w"].roles == "oio"
    for name, p in to_low_rank(back, scale=3.0).items():
        assert p.scale == lora[name].scale
        chex.assert_trees_all_close(to_dense(p), to_dense(lora[name]), rtol=1e-5, atol=1e-5)  # float32
    merged = merge(tree, {"query/w": lora["query/w"]})
    assert jnp.abs(merged["query"]["w"] - tree["query"]["w"]).max() > 0.1
    with pytest.raises(ValueError, match="key/w: no such LoRA parameter; the tree has dense/kernel, query/w"):
        from_low_rank({"key/w": node()}, tree, scale=3.0)
