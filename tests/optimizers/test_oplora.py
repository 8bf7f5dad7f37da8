import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import oplora_jax
from oplora_jax import LowRank, OuterProduct, is_low_rank, lora_dot, lorsum, oplora, to_dense
from tests import reference
from tests.arrays import f64, normals
from tests.optimizers.cases import CASES, KINDS, dense_tree, gradient_of, problem, run

VARIANTS = [name for name in CASES if name.startswith("oplora")]
each_variant = pytest.mark.parametrize("name", VARIANTS)


def settings_of(name):
    return CASES[name].settings


def linear_problem(dtype, scale, seed=0):
    """(a, b, loss_fn) with factors for scale 1, so that every scale begins at the same increment."""
    normal = normals(seed, dtype)
    x, w, y = normal(12, 7), normal(7, 5), normal(12, 5)
    root = np.sqrt(scale)
    param = LowRank(normal(7, 2) / root, normal(2, 5) / root, scale)
    return param, lambda p: jnp.sum((lora_dot(x, w, p) - y) ** 2) / 24


@pytest.mark.parametrize("regularization", [0.0, 1e-2])
@pytest.mark.parametrize("num_iters", [0, 1, 2])
@pytest.mark.parametrize("rank", [2, 4])
def test_steps_agree_with_the_reference(rank, num_iters, regularization, x64):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((7, 2)), rng.standard_normal((2, 5))
    ma, mb = rng.standard_normal((7, rank)), rng.standard_normal((rank, 5))
    settings = {"momentum": 0.7, "dampening": 0.2, "num_iters": num_iters}
    tx = oplora(0.1, **settings, regularization=regularization, momentum_rank=rank, weight_decay=0.1)
    params = LowRank(jnp.asarray(a), jnp.asarray(b))
    state = optax.tree.set(tx.init(params), momentum=LowRank(jnp.asarray(ma), jnp.asarray(mb)))
    update = jax.jit(tx.update)
    factors, moments = (a, b), (ma, mb)
    for _ in range(3):
        g = rng.standard_normal((7, 5))
        updates, state = update(jnp.asarray(g), state, params)
        params = optax.apply_updates(params, updates)
        factors, moments = reference.oplora_step(
            factors, moments, g, 0.1, 0.7, 0.2, num_iters, 0.1 * regularization, weight=0.99
        )
        moment = optax.tree.get(state, "momentum")
        for actual, (left, right) in ((params, factors), (moment, moments)):
            size = np.abs(left @ right).max()
            # float64, and Gram matrices of a condition up to 1e6
            chex.assert_trees_all_close(f64(to_dense(actual)), left @ right, rtol=0, atol=1e-9 * size)


def test_the_momentum_does_not_lean_on_one_factor():
    """500 steps along one gradient: M tends to G / (1 - mu), and a does not vanish like mu^k."""
    gradient = jnp.ones((4, 3))
    params = LowRank(jnp.ones((4, 1)), jnp.ones((1, 3)))
    tx = oplora(1e-4, momentum=0.5, regularization=1.0)
    update = jax.jit(lambda state: tx.update(gradient, state, params)[1])
    state = jax.lax.fori_loop(0, 500, lambda _, state: update(state), tx.init(params))
    moment = optax.tree.get(state, "momentum")
    assert np.linalg.norm(moment.a) >= 0.99 * np.linalg.norm(moment.b)
    # The regularization of 1e-4, next to Gram matrices of size 7, holds a step back by 1e-5.
    chex.assert_trees_all_close(to_dense(moment), 2 * gradient, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@each_variant
def test_the_path_of_the_increment_does_not_depend_on_the_scale(name, kind, x64):
    paths = []
    for scale in (1.0, 3.0):
        params, loss_fn = linear_problem(jnp.float64, scale)
        tx = oplora(0.1, **settings_of(name))
        gradient, update = gradient_of(loss_fn, kind), jax.jit(tx.update)
        state, path = tx.init(params), []
        for _ in range(4):
            updates, state = update(gradient(params), state, params)
            params = optax.apply_updates(params, updates)
            path.append(f64(to_dense(params)))
        paths.append(np.stack(path))
    assert np.abs(paths[0][-1] - paths[0][0]).max() > 1e-2  # it goes somewhere
    # float64, condition numbers of 1e3 at most, four steps.
    np.testing.assert_allclose(paths[1], paths[0], rtol=0, atol=1e-10)


@each_variant
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_size_zero_changes_nothing(name, kind):
    for b_zero in (False, True):
        params, loss_fn = problem(b_zero=b_zero)
        tx = oplora(0.0, **settings_of(name))
        update, state = jax.jit(tx.update), tx.init(params)
        for _ in range(2):
            updates, state = update(gradient_of(loss_fn, kind)(params), state, params)
            # float32 rounding of entries below 1; not the factors' scaling, which is kept as well.
            chex.assert_trees_all_close(updates, jax.tree.map(jnp.zeros_like, updates), atol=1e-6)
        chex.assert_tree_all_finite(state)


@each_variant
def test_the_state_is_as_large_as_the_parameters(name):
    params = {"lora": LowRank(jnp.ones((64, 4)), jnp.ones((4, 48)))}
    numbers = sum(z.size for z in jax.tree.leaves(params))
    state = oplora(0.1, **settings_of(name)).init(params)
    kept = {"oplora_no_momentum": 0, "oplora_projected": 2}.get(name, 1)  # buffers and previous factors
    # The count, and the number of skipped updates.
    assert kept * numbers <= sum(z.size for z in jax.tree.leaves(state)) <= kept * numbers + 2


def test_a_momentum_of_another_rank():
    params = {"lora": LowRank(jnp.ones((64, 4)), jnp.ones((4, 48)), 2.0)}
    state = oplora(0.1, momentum_rank=8).init(params)
    momentum = optax.tree.get(state, "momentum")["lora"]
    chex.assert_shape([momentum.a, momentum.b], [(64, 8), (8, 48)])
    assert momentum.scale == 2.0 and not np.any(momentum.b)
    # Unit variance at scale 1: 512 draws, four standard deviations of their variance.
    np.testing.assert_allclose(np.var(np.sqrt(2.0) * momentum.a), 1.0, atol=4 * np.sqrt(2 / 512))
    other = optax.tree.get(oplora(0.1, momentum_rank=8, seed=1).init(params), "momentum")["lora"]
    assert np.any(other.a != momentum.a)


WRAPPED = {
    "alone": lambda: oplora(0.1),
    "chain": lambda: optax.chain(oplora_jax.clip_by_global_norm(1.0), oplora(0.1), optax.scale(0.5)),
    "inject_hyperparams": lambda: optax.inject_hyperparams(oplora)(0.1),
    "partition": lambda: optax.partition(
        {"train": oplora(0.1), "freeze": optax.set_to_zero()}, {"first": "train", "bias": "freeze"}
    ),
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED.keys())
def test_the_momentum_is_reached_through_wrappers(wrap):
    params, _ = problem()
    tx = wrap()
    state = tx.init(params)
    momentum = optax.tree.get(state, "momentum", filtering=_is_tree)
    assert is_low_rank(momentum["first"]) and momentum["first"].shape == params["first"].shape
    other = momentum | {"first": jax.tree.map(jnp.ones_like, momentum["first"])}
    state = optax.tree.set(state, _is_tree, momentum=other)
    chex.assert_trees_all_equal(
        optax.tree.get(state, "momentum", filtering=_is_tree)["first"], other["first"]
    )
    gradient = jax.tree.map(jnp.ones_like, params)
    jax.eval_shape(tx.update, gradient, state, params)


def _is_tree(path, value):
    """Not the number of that name among the hyperparameters of `optax.inject_hyperparams`."""
    return isinstance(value, dict)


def test_weight_decay_is_a_coefficient_of_the_anchor(x64):
    params, _ = linear_problem(jnp.float64, 2.0)
    tx = oplora(0.1, momentum=0, weight_decay=0.5, regularization=0.0)
    update = jax.jit(tx.update)
    updates, _ = update(jnp.zeros((7, 5)), tx.init(params), params)
    new = optax.apply_updates(params, updates)
    # The decayed increment has the parameter's rank, and is reached at once: float64 rounding.
    chex.assert_trees_all_close(to_dense(new), 0.95 * to_dense(params), rtol=1e-12)
    g = jnp.ones((7, 5))
    updates, _ = update(g, tx.init(params), params)
    expected = lorsum([(0.95, params), (-0.1, g)])
    chex.assert_trees_all_close(optax.apply_updates(params, updates), expected, rtol=1e-9)  # the same sum


@pytest.mark.parametrize("momentum", [0, 0.6])
@pytest.mark.parametrize("dampening, decay", [(0.0, 0.0), (0.25, 0.1)])
def test_other_leaves_take_heavy_ball_steps(momentum, dampening, decay, x64):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((3, 4))
    params = {"head": jnp.asarray(weight), "lora": LowRank(jnp.ones((3, 1)), jnp.ones((1, 2)))}
    schedule = lambda count: 0.1 / (1 + count)
    tx = oplora(schedule, momentum=momentum, dampening=dampening, weight_decay=decay)
    state, velocity = tx.init(params), np.zeros((3, 4))
    for step in range(4):
        g = rng.standard_normal((3, 4))
        gradient = {"head": jnp.asarray(g), "lora": OuterProduct(jnp.ones((1, 3)), jnp.ones((1, 2)))}
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        velocity = momentum * velocity + (1 - dampening) * g
        weight = weight - schedule(step) * (velocity + decay * weight)
        np.testing.assert_allclose(params["head"], weight, rtol=1e-12)  # float64 rounding


def test_momentum_and_dampening_may_be_schedules_of_inject_hyperparams(x64):
    """The steps of a LoRA parameter and of another leaf, by hand with the numbers that are due."""
    rng = np.random.default_rng(0)
    momentum, dampening = (lambda step: 0.2 * step), (lambda step: 0.3 - 0.1 * step)
    tx = optax.inject_hyperparams(oplora)(0.1, momentum=momentum, dampening=dampening, regularization=0.1)
    factors = rng.standard_normal((7, 2)), rng.standard_normal((2, 5))
    head, velocity = rng.standard_normal((3, 4)), np.zeros((3, 4))
    params = {"lora": LowRank(*map(jnp.asarray, factors)), "head": jnp.asarray(head)}
    state, update = tx.init(params), jax.jit(tx.update)
    start = optax.tree.get(state, "momentum", filtering=_is_tree)["lora"]
    moments = f64(start.a), f64(start.b)
    for step in range(4):
        g, h = rng.standard_normal((7, 5)), rng.standard_normal((3, 4))
        updates, state = update({"lora": jnp.asarray(g), "head": jnp.asarray(h)}, state, params)
        params = optax.apply_updates(params, updates)
        mu, d = momentum(step), dampening(step)
        factors, moments = reference.oplora_step(factors, moments, g, 0.1, mu, d, ridge=0.1 * 0.1)
        velocity = mu * velocity + (1 - d) * h
        head = head - 0.1 * velocity
        # float64, and Gram matrices of a condition up to 1e6
        np.testing.assert_allclose(to_dense(params["lora"]), factors[0] @ factors[1], rtol=0, atol=1e-9)
        np.testing.assert_allclose(params["head"], head, rtol=1e-12)  # float64 rounding


def test_the_exact_step_is_ahead_of_the_projected_gradient_by_the_second_order(x64):
    """One iteration: the first half-step is the same, the increments differ by a square of the step size."""
    params, loss_fn = linear_problem(jnp.float64, 1.0)
    gaps = []
    for learning_rate in (1e-2, 1e-3):
        products = []
        for kind in ("dense", "factors"):
            tx = oplora(learning_rate, momentum=0, regularization=0.0)
            updates, _ = jax.jit(tx.update)(gradient_of(loss_fn, kind)(params), tx.init(params), params)
            new = optax.apply_updates(params, updates)
            products.append((f64(new.a), f64(to_dense(new))))
        np.testing.assert_allclose(*(a for a, _ in products), rtol=1e-10)  # float64: the first half-step
        gaps.append(np.abs(products[0][1] - products[1][1]).max())
    # A ratio of 100, and terms of the third order: a step of 1e-2 times numbers near 1.
    assert 50 < gaps[0] / gaps[1] < 200


@each_variant
def test_the_three_kinds_of_gradient_agree_where_they_must(name):
    params, loss_fn = problem()
    tx = oplora(0.1, **settings_of(name))
    update, state = jax.jit(tx.update), tx.init(params)
    step = lambda gradient: dense_tree(optax.apply_updates(params, update(gradient, state, params)[0]))
    outer, dense, factors = (gradient_of(loss_fn, kind)(params) for kind in KINDS)
    # The same matrix: float32 rounding of sums of 40 tokens.
    chex.assert_trees_all_close(step(outer), step(dense), atol=1e-5)
    # The factors' derivatives stand for the part of it that they determine.
    part = to_dense(oplora_jax.tangent_gradient(params["first"], factors["first"]))
    chex.assert_trees_all_close(step(factors), step(factors | {"first": part}), atol=1e-5)
    assert np.abs(step(factors)["first"] - step(dense)["first"]).max() > 1e-3  # which is not all


@pytest.mark.parametrize("num_iters", [0, 1])
@pytest.mark.parametrize("traced", [False, True])
def test_a_momentum_of_full_rank_is_that_of_the_full_weight(num_iters, traced, x64):
    """Also with Jacobi steps of the weights, in which a momentum would never turn its sign."""
    normal, size = normals(0), 4
    params = LowRank(normal(size, size), normal(size, size), 2.0)
    settings = {"momentum": 0.8, "dampening": 0.3, "regularization": 0.0}
    if traced:
        named = optax.inject_hyperparams(oplora, static_args="momentum")
        tx = named(1e-4, num_iters=jnp.asarray(num_iters), **settings)
    else:
        tx = oplora(1e-4, num_iters=num_iters, **settings)
    state, update, expected = tx.init(params), jax.jit(tx.update), np.zeros((size, size))
    for step in range(6):
        gradient = normal(size, size) * (1 if step % 3 else -4)
        updates, state = update(gradient, state, params)
        before, expected_before = to_dense(params), expected
        expected = 0.8 * expected + 0.7 * f64(gradient)
        params = optax.apply_updates(params, updates)
        moment = optax.tree.get(state, "momentum")
        # float64; the factors of a random momentum are conditioned to 1e3
        np.testing.assert_allclose(to_dense(moment), expected, rtol=0, atol=1e-9 * np.abs(expected).max())
        # A Jacobi step moves both factors by the whole step: twice as far, up to lr^2.
        moved = -1e-4 * (0.7 * f64(gradient) + 0.8 * expected_before) * (1 if num_iters else 2)
        np.testing.assert_allclose(to_dense(params) - before, moved, rtol=0, atol=1e-3 * np.abs(moved).max())


@pytest.mark.parametrize("momentum_kind", ["low_rank", "projected", "extrapolated"])
@pytest.mark.parametrize("shape", [(8, 6, 5), (6, 6, 6), (5, 1, 1), (2, 6, 4, 4)], ids=str)
def test_jacobi_steps_with_momentum_near_full_rank(momentum_kind, shape, x64):
    """They end where the SVD does, as with alternating iterations."""
    (*batch, n, m, r), normal = shape, normals(1)
    goal = normal(*batch, n, m)
    singular = np.linalg.svd(f64(goal), compute_uv=False)
    params = LowRank(normal(*batch, n, r) / np.sqrt(n), jnp.zeros((*batch, r, m)))
    loss_fn = lambda p: jnp.sum((to_dense(p) - goal) ** 2) / 2
    tx = oplora(0.05, momentum=0.8, num_iters=0, momentum_kind=momentum_kind)
    params, state = run(tx, params, oplora_jax.grad(loss_fn), 400)
    best = np.sum(singular[..., r:] ** 2) / 2
    # 0.8^200, and a Hessian that is flat to the gaps between singular values
    assert loss_fn(params) - best < 1e-2 * np.sum(singular**2) and int(state.skipped) == 0
