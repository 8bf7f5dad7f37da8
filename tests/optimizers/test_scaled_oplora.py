import inspect
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import oplora_jax
from oplora_jax import LowRank, OuterProduct, lora_dot, oplora, scaled_oplora, tangent_gradient, to_dense
from tests.arrays import normals

STRUCTURES = ("diagonal", "dense")
each_structure = pytest.mark.parametrize("structure", STRUCTURES)
N, M, R, TOKENS = 7, 5, 2, 12
# The two kinds of momentum in relative units, and the paper's optimizer; learning rates of steps that show.
SETTINGS = {
    "factors": {"learning_rate": 0.02},
    "low_rank": {"learning_rate": 0.02, "momentum_kind": "low_rank"},
    "absolute": {"learning_rate": 0.2, "units": "absolute"},
}
each_settings = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


def of_each(names, *rows):
    """Rows of the names' values, each of which begins with the name of settings."""
    values = [(SETTINGS[name], *row) for name, *row in rows]
    return pytest.mark.parametrize(f"settings, {names}", values, ids=["-".join(row) for row in rows])


each_settings_and_some_structure = of_each(
    "structure", ("factors", "diagonal"), ("low_rank", "dense"), ("absolute", "diagonal")
)


def problem(scale=1.0, seed=0):
    """(params, loss_fn) in the enabled precision, with one increment for every scale."""
    normal = normals(seed)
    x, w, y = normal(TOKENS, N), normal(N, M), normal(TOKENS, M)
    root = np.sqrt(scale)
    params = LowRank(normal(N, R) / root, normal(R, M) / root, scale)
    return params, lambda p: jnp.sum((lora_dot(x, w, p) - y) ** 2) / (2 * TOKENS)


def path(tx, params, gradient, steps=4):
    """The parameters after each step, and the last state."""
    update, state, after = jax.jit(tx.update), tx.init(params), []
    for _ in range(steps):
        updates, state = update(gradient(params), state, params)
        params = optax.apply_updates(params, updates)
        after.append(params)
    return after, state


@pytest.mark.parametrize("num_iters", [0, 1, 2])
@pytest.mark.parametrize("b1", [0, 0.9])
@each_structure
def test_the_power_zero_is_oplora(structure, b1, num_iters, x64):
    params, loss_fn = problem(scale=2.0)
    gradient = oplora_jax.grad(loss_fn, "outer")
    same = {"num_iters": num_iters, "regularization": 1e-2}
    scaled = scaled_oplora(0.3, b1=b1, power=0, damping=0, units="absolute", structure=structure, **same)
    plain = oplora(0.3, momentum=b1, dampening=b1, **same)
    actual, expected = (path(tx, params, gradient)[0] for tx in (scaled, plain))
    # The order of operations in float64; a dense identity is the product of its eigenvectors.
    chex.assert_trees_all_close(actual, expected, rtol=1e-10)


def test_a_diagonal_metric_of_ones_is_oplora(x64):
    """b2 = 1 keeps the moments at their start."""
    params, loss_fn = problem()
    gradient = oplora_jax.grad(loss_fn, "outer")
    scaled = scaled_oplora(0.3, b2=1.0, power=0.7, damping=0, units="absolute")
    plain = oplora(0.3, momentum=0.9, dampening=0.9, regularization=1e-2)
    actual, expected = (path(tx, params, gradient)[0] for tx in (scaled, plain))
    chex.assert_trees_all_close(actual, expected, rtol=1e-12)  # the order of operations in float64


@of_each("metric", ("factors", "kfac"), ("low_rank", "shampoo"), ("absolute", "kfac"))
def test_diagonal_is_dense_where_the_moments_are_diagonal(settings, metric, x64):
    """x and dy are scaled columns of one orthogonal basis: x^T x, dy^T dy and G are all diagonal."""
    rng = np.random.default_rng(0)
    params, _ = problem()
    gradients = []
    for _ in range(3):
        basis = np.linalg.qr(rng.standard_normal((TOKENS, TOKENS)))[0]
        x, dy = basis[:, :N] * rng.uniform(0.5, 2.0, N), basis[:, :M] * rng.uniform(0.5, 2.0, M)
        gradients.append(OuterProduct(jnp.asarray(x), jnp.asarray(dy)))
    after = []
    for structure in STRUCTURES:
        source = iter(gradients)
        tx = scaled_oplora(metric=metric, structure=structure, bias_correction=True, **settings)
        after.append(path(tx, params, lambda _, source=source: next(source), 3)[0])
    chex.assert_trees_all_close(*after, rtol=1e-9, atol=1e-11)  # float64, condition numbers below 100


@each_structure
@pytest.mark.parametrize("num_iters", [0, 1])
def test_rescaled_inputs_train_the_same_function(structure, num_iters, x64):
    """A layer that sees x C, with the kernel C^-1 W: C diagonal, or any matrix for a dense metric."""
    rng = np.random.default_rng(1)
    x, w, y = (rng.standard_normal(shape) for shape in ((TOKENS, N), (N, M), (TOKENS, M)))
    a, b = rng.standard_normal((N, R)), rng.standard_normal((R, M))
    change = np.diag(10.0 ** rng.uniform(-1, 1, N))
    if structure == "dense":
        change = change @ np.linalg.qr(rng.standard_normal((N, N)))[0]
    outputs = []
    for c in (np.eye(N), change):
        at, kernel, left = jnp.asarray(x @ c), jnp.linalg.inv(c) @ w, jnp.asarray(np.linalg.inv(c) @ a)
        function = lambda p, at=at, kernel=kernel: lora_dot(at, kernel, p)
        loss_fn = lambda p, f=function: jnp.mean((f(p) - y) ** 2)
        settings = {"structure": structure, "num_iters": num_iters, "bias_correction": True}
        tx = scaled_oplora(0.1, b1=0, power=1, damping=0, units="absolute", **settings)
        gradient = oplora_jax.grad(loss_fn, "outer")
        outputs.append([function(p) for p in path(tx, LowRank(left, jnp.asarray(b)), gradient, 5)[0]])
    moved = max(np.abs(first - outputs[0][0]).max() for first in outputs[0])
    assert moved > 1e-2
    # float64, and moments whose condition number is at most 1e4 times that of x^T x, 1e2.
    chex.assert_trees_all_close(*outputs, rtol=0, atol=1e-9)


@of_each(
    "metric, structure",
    ("absolute", "kfac", "diagonal"),
    ("absolute", "kfac", "dense"),
    ("factors", "shampoo", "diagonal"),
    ("low_rank", "shampoo", "dense"),
)
def test_the_kinds_of_gradient_agree(settings, metric, structure, x64):
    params, loss_fn = problem()
    kinds = {
        "outer": oplora_jax.grad(loss_fn, "outer"),
        "moments": oplora_jax.grad(loss_fn, "dense", moments=structure),
        "dense moments": oplora_jax.grad(loss_fn, "dense", moments="dense"),
    }
    for reduction in ("mean", "sum"):
        tx = scaled_oplora(metric=metric, structure=structure, loss_reduction=reduction, **settings)
        first, *rest = (path(tx, params, gradient) for gradient in kinds.values())
        for other in rest:
            chex.assert_trees_all_close(first, other, rtol=1e-9, atol=1e-12)  # float64, four steps


@each_settings_and_some_structure
def test_shampoo_of_factor_gradients_is_that_of_the_tangent_gradient(settings, structure, x64):
    params, loss_fn = problem(scale=2.0)
    tx = scaled_oplora(metric="shampoo", structure=structure, power=0.25, **settings)
    tangent = lambda p: to_dense(tangent_gradient(p, jax.grad(loss_fn)(p)))
    actual, expected = (path(tx, params, gradient) for gradient in (jax.grad(loss_fn), tangent))
    chex.assert_trees_all_close(actual, expected, rtol=1e-9, atol=1e-12)  # float64, four steps


@pytest.mark.parametrize("metric", ["kfac", "shampoo"])
def test_the_loss_reduction(metric, x64):
    """A mean loss and the sum of N times it measure the same."""
    params, loss_fn = problem()
    losses = {"mean": loss_fn, "sum": lambda p: TOKENS * loss_fn(p)}
    moments = []
    for reduction, loss in losses.items():
        tx = scaled_oplora(0.1, metric=metric, loss_reduction=reduction)
        _, state = tx.update(oplora_jax.grad(loss, "outer")(params), tx.init(params), params)
        moments.append(state.lora.moments)
    chex.assert_trees_all_close(*moments, rtol=1e-12)  # float64


@each_settings_and_some_structure
def test_the_path_does_not_depend_on_the_scale(settings, structure, x64):
    paths = []
    for scale in (1.0, 3.0):
        params, loss_fn = problem(scale)
        tx = scaled_oplora(structure=structure, **settings)
        after, _ = path(tx, params, oplora_jax.grad(loss_fn, "outer"))
        paths.append([np.asarray(to_dense(p)) for p in after])
    assert np.abs(paths[0][-1] - paths[0][0]).max() > 1e-2
    # float64, condition numbers of 1e3 at most, four steps.
    np.testing.assert_allclose(*paths, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "units, bias_correction", [("relative", True), ("absolute", True), ("absolute", False)]
)
def test_the_averages(units, bias_correction, x64):
    rng = np.random.default_rng(0)
    params, _ = problem()
    tx = scaled_oplora(0.01, b2=0.9, units=units, bias_correction=bias_correction)
    state, weighted, total = tx.init(params), np.zeros(N), 0.0
    expected = np.ones(N)
    for _ in range(4):
        x, dy = rng.standard_normal((TOKENS, N)), rng.standard_normal((TOKENS, M))
        _, state = tx.update(OuterProduct(jnp.asarray(x), jnp.asarray(dy)), state, params)
        new = np.mean(x**2, axis=0)
        expected = 0.9 * expected + 0.1 * new
        weighted, total = 0.9 * weighted + 0.1 * new, 0.9 * total + 0.1
        average = weighted / total if bias_correction else expected
        np.testing.assert_allclose(state.lora.moments.input, average, rtol=1e-12)  # float64


def test_a_metric_is_decomposed_every_few_steps(x64):
    params, loss_fn = problem()
    gradient = oplora_jax.grad(loss_fn, moments="dense")
    tx = scaled_oplora(0.1, structure="dense", metric_every=3, units="absolute")
    update, state, states = jax.jit(tx.update), tx.init(params), []
    for _ in range(5):
        updates, state = update(gradient(params), state, params)
        params = optax.apply_updates(params, updates)
        states.append(state.lora)
    for t, (old, new) in enumerate(itertools.pairwise(states), start=1):
        assert np.any(old.moments.input != new.moments.input)
        for cache in ("metric", "inverse_metric"):
            same = [np.array_equal(*z) for z in zip(getattr(old, cache), getattr(new, cache), strict=True)]
            assert same == [t % 3 != 0] * 2
    for state in (states[0], states[3]):
        damped = np.asarray(state.moments.input) + 1e-5 * np.eye(N)
        # float64 roots of condition numbers below 100.
        np.testing.assert_allclose(state.metric.input @ state.metric.input, damped, atol=1e-12)
        np.testing.assert_allclose(state.metric.input @ state.inverse_metric.input, np.eye(N), atol=1e-12)


@pytest.mark.parametrize("b1", [0, None])
@each_structure
@each_settings
def test_the_size_of_the_state(settings, structure, b1):
    n, m, r = 64, 48, 4
    params = {"lora": LowRank(jnp.ones((n, r)), jnp.ones((r, m)))}
    state = scaled_oplora(b1=b1, structure=structure, **settings).init(params)
    metric = n + m if structure == "diagonal" else 3 * (n * n + m * m)
    momentum = r * (n + m) if b1 is None else 0
    size = 0 if "units" in settings else 2  # of the steps of either factor
    assert sum(z.size for z in jax.tree.leaves(state.lora)) == metric + momentum + size


@each_structure
@pytest.mark.parametrize("power", [0.5, 1.0])
@each_settings
def test_dead_inputs_and_no_damping(settings, structure, power):
    """Second moments that are zero, or of a rank below the side's, do not make a step infinite."""
    rng = np.random.default_rng(0)
    params = LowRank(*(jnp.asarray(rng.standard_normal(z), jnp.float32) for z in ((N, R), (R, M))))
    x = jnp.asarray(rng.standard_normal((3, N)), jnp.float32).at[:, 0].set(0)
    for dy in (jnp.ones((3, M)), jnp.zeros((3, M))):
        tx = scaled_oplora(structure=structure, power=power, damping=0.0, bias_correction=True, **settings)
        (*_, last), state = path(tx, params, lambda _, dy=dy: OuterProduct(x, dy))
        chex.assert_tree_all_finite((last, state))
        assert int(state.skipped) == 0


def test_other_leaves_take_steps_of_adamw():
    params = {"lora": problem()[0], "bias": jnp.ones(3)}
    gradient = {"lora": OuterProduct(jnp.ones((1, N)), jnp.ones((1, M))), "bias": jnp.arange(3.0)}
    tx = scaled_oplora(0.1, b1=0.8, b2=0.95, others_learning_rate=optax.constant_schedule(0.02))
    plain = optax.adamw(0.02, b1=0.8, b2=0.95, weight_decay=0.0)
    updates, _ = tx.update(gradient, tx.init(params), params)
    expected, _ = plain.update(gradient["bias"], plain.init(params["bias"]), params["bias"])
    chex.assert_trees_all_equal(updates["bias"], expected)


@pytest.mark.parametrize(
    "gradient, structure, got",
    [
        ("factors", "diagonal", "factor gradients"),
        ("dense", "diagonal", "an array"),
        ("diagonal", "dense", "a DenseGradient with diagonal moments"),
    ],
)
def test_kfac_says_what_it_needs(gradient, structure, got):
    params, loss_fn = problem()
    params, of_tree = {"layer": {"lora": params}}, lambda p: loss_fn(p["layer"]["lora"])
    if gradient == "factors":
        gradient = jax.grad(of_tree)(params)
    else:
        moments = None if gradient == "dense" else gradient
        gradient = oplora_jax.grad(of_tree, "dense", moments=moments)(params)
    tx = scaled_oplora(0.1, structure=structure)
    message = rf"\['layer'\]\['lora'\]: metric='kfac' .* gradient is {got}.*moments='{structure}'.*'shampoo'"
    with pytest.raises(ValueError, match=message):
        tx.update(gradient, tx.init(params), params)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"metric": "adam"}, "metric is 'adam'; expected 'kfac' or 'shampoo'"),
        ({"structure": "full"}, "structure is 'full'; expected 'diagonal' or 'dense'"),
        ({"loss_reduction": "none"}, "loss_reduction is 'none'; expected 'mean' or 'sum'"),
        ({"metric_every": 2}, "metric_every is 2 with structure='diagonal'"),
        ({"metric_every": 0, "structure": "dense"}, "metric_every is 0 with structure='dense'"),
        ({"units": "meters"}, "units is 'meters'; expected 'relative' or 'absolute'"),
        ({"momentum_kind": "projected"}, "momentum_kind is 'projected'; expected 'factors' or 'low_rank'"),
        ({"num_iters": 1}, "num_iters is 1 .*'factors'.*expected momentum_kind='low_rank'"),
        (
            {"momentum_kind": "factors", "units": "absolute"},
            "units is 'absolute' with momentum_kind='factors'",
        ),
        ({"bias_correction": False}, "bias_correction is False with units='relative'.*units='absolute'"),
    ],
)
def test_arguments(arguments, message):
    # The annotations would refuse some of these first: the function below their check.
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(scaled_oplora)(0.1, **arguments)
