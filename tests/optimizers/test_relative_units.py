"""scaled_oplora in relative units: what a rate means, whatever the units of the loss and the inputs are."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import oplora_jax
from oplora_jax import LowRank, OuterProduct, lora_dot, scaled_oplora, to_dense
from tests.arrays import f64, normals

LAYERS, N, M, R, TOKENS, STEPS, RATE = 3, 7, 5, 2, 12, 5, 0.02
FACTORS, LOW_RANK = {}, {"momentum_kind": "low_rank"}
each_momentum = pytest.mark.parametrize("settings", [FACTORS, LOW_RANK], ids=["factors", "low_rank"])
each_structure = pytest.mark.parametrize("structure", ["diagonal", "dense"])


def start(layers=LAYERS, dtype=None):
    """(param, x, w, y) of layers beside each other."""
    normal = normals(0, dtype)
    lora = LowRank(normal(layers, N, R), 0.3 * normal(layers, R, M))
    return lora, normal(layers, TOKENS, N), normal(layers, N, M), normal(layers, TOKENS, M)


def outputs(tx, param, x, w, y, loss_scale=1.0, gradient="outer", steps=STEPS, **kind):
    """(what a layer makes of its inputs after each step, the last state)."""

    def loss_fn(param):
        return loss_scale * jnp.mean((lora_dot(x, w, param) - y) ** 2)

    gradient = oplora_jax.grad(loss_fn, gradient, **kind)

    def step(carry, _):
        param, state = carry
        updates, state = tx.update(gradient(param), state, param)
        param = optax.apply_updates(param, updates)
        return (param, state), lora_dot(x, w, param)

    scan = jax.jit(lambda: jax.lax.scan(step, (param, tx.init(param)), length=steps))
    (_, state), path = scan()
    return np.asarray(path), state


@each_momentum
@each_structure
def test_no_unit_matters(settings, structure, x64):
    """Of the loss, of the inputs; nor how the increment is split into factors, nor the kind of gradient."""
    tx = scaled_oplora(RATE, structure=structure, **settings)
    lora, x, w, y = start()
    turn = jnp.linalg.qr(normals(1)(R, R))[0]
    changed = {
        "loss * 1000": ((lora, x, w, y), {"loss_scale": 1000.0}),
        "loss / 1000": ((lora, x, w, y), {"loss_scale": 1e-3}),
        "inputs halved": ((LowRank(2 * lora.a, lora.b), x / 2, 2 * w, y), {}),
        "inputs tripled": ((LowRank(lora.a, lora.b / 3), 3 * x, w / 3, y), {}),
        "turned": ((LowRank(lora.a @ turn, turn.T @ lora.b), x, w, y), {}),
        "formed": ((lora, x, w, y), {"gradient": "dense", "moments": structure}),
    }
    expected, _ = outputs(tx, lora, x, w, y)
    assert np.abs(expected[-1] - expected[0]).max() > 0.1
    for name, (arrays, how) in changed.items():
        actual, _ = outputs(tx, *arrays, **how)
        # float64, five steps, condition numbers of some 1e3.
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-10, err_msg=name)


def by_hand(a, b, gradients, rate, structure, b1=0.8, b2=0.99, ridge=0.1, damping=1e-3, power=0.5, hold=4.0):
    """The factors after each step with the factors' momentum, along given (x, dy) of a mean loss."""
    (n, _), (_, m) = a.shape, b.shape
    part = (lambda e: e) if structure == "dense" else (lambda e: np.diag(np.diag(e)))
    mean = lambda e: np.mean(np.diag(e))
    inverse = lambda gram, more=0.0: np.linalg.inv(gram + (ridge * mean(gram) + more) * np.eye(len(gram)))
    sums, total, squares, ahead_a, ahead_b, after = [0.0, 0.0], 0.0, [0.0, 0.0], 0 * a, 0 * b, []

    def metric(e):
        values, vectors = np.linalg.eigh(e / mean(e) + damping * np.eye(len(e)))
        return (vectors * values**power) @ vectors.T

    for t, (x, dy) in enumerate(gradients, start=1):
        g, moments = x.T @ dy, (x.T @ x / len(x), len(x) * dy.T @ dy)
        usual = [z / total if z else np.inf for z in squares]
        total = b2 * total + 1 - b2
        sums = [b2 * s + (1 - b2) * part(e) for s, e in zip(sums, moments, strict=True)]
        e_in, e_out = (s / total for s in sums)
        d_in, d_out = metric(e_in), metric(e_out)
        solve_b = inverse(a.T @ d_in @ a)
        along = [
            np.linalg.inv(d_in) @ g @ b.T @ inverse(b @ d_out @ b.T) @ b if b.any() else 0 * g,
            a @ solve_b @ a.T @ g @ np.linalg.inv(d_out),
        ]
        new = [np.sum((d_in @ z @ d_out) * z) for z in along]
        shares = [min(1.0, 2.0 * np.sqrt(u / z)) if z else 1.0 for u, z in zip(usual, new, strict=True)]
        squares = [b2 * s + (1 - b2) * c**2 * z for s, c, z in zip(squares, shares, new, strict=True)]
        typical = mean(e_in) * np.exp(np.mean(np.log(np.diag(e_in) / mean(e_in) + damping)))
        length = rate * np.sqrt(n * m) / np.sqrt(max(typical, 0.1**2))
        c = length / np.sqrt(squares[1] / total)
        held = hold * length**2 / mean(a.T @ d_in @ a)
        ahead_a = b1 * ahead_a + (1 - b1) * shares[0] * g @ b.T
        ahead_b = b1 * ahead_b + (1 - b1) * shares[1] * a.T @ g
        c /= 1 - b1**t
        a, b = (
            a - c * np.linalg.inv(d_in) @ ahead_a @ inverse(b @ d_out @ b.T, held),
            b - c * solve_b @ ahead_b @ np.linalg.inv(d_out),
        )
        after.append((a, b))
    return after


# The size of the inputs, larger and smaller than the least that counts; and of b.
@pytest.mark.parametrize("size, of_b", [(1.0, 1.0), (1.0, 0.0), (0.05, 1.0)])
@each_structure
def test_the_path_by_hand(structure, size, of_b, x64):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((N, R)), of_b * rng.standard_normal((R, M))
    draw = lambda *shape: rng.standard_normal(shape) * rng.uniform(0.2, 3.0, shape[-1])
    gradients = [(size * draw(TOKENS, N), draw(TOKENS, M)) for _ in range(STEPS)]
    gradients[2] = gradients[2][0], 10 * gradients[2][1]  # an odd batch
    tx = scaled_oplora(RATE, structure=structure)
    param = LowRank(jnp.asarray(a), jnp.asarray(b))
    state, update = tx.init(param), jax.jit(tx.update)
    for (x, dy), expected in zip(gradients, by_hand(a, b, gradients, RATE, structure), strict=True):
        updates, state = update(OuterProduct(jnp.asarray(x), jnp.asarray(dy)), state, param)
        param = optax.apply_updates(param, updates)
        # float64, condition numbers of some 1e3.
        np.testing.assert_allclose(param.a, expected[0], rtol=0, atol=1e-11)
        np.testing.assert_allclose(param.b, expected[1], rtol=0, atol=1e-11)


@each_momentum
def test_the_length_of_a_step_is_the_rate(settings, x64):
    """In the Frobenius norm, from LoRA's usual start: the root mean square, for inputs of size 1 and 4."""
    lora, *_ = start(1)
    signs = jnp.sign(normals(1)(1, TOKENS, N))
    for size in (1.0, 4.0):
        tx = scaled_oplora(RATE, power=0, **settings)
        param = LowRank(lora.a, 0 * lora.b)
        updates, _ = tx.update(OuterProduct(size * signs, normals(2)(1, TOKENS, M)), tx.init(param), param)
        moved = to_dense(optax.apply_updates(param, updates))
        # The damping of the typical size, 1e-3, is half of that in its root.
        np.testing.assert_allclose(np.sqrt(np.mean(moved**2)), RATE / size, rtol=6e-4)


@each_structure
def test_low_rank_momentum_without_iterations_or_momentum(structure, x64):
    """The Jacobi step is that of both factors from the old ones; LoRSum does not hold a."""
    arrays = start()
    jacobi = scaled_oplora(RATE, b1=0, structure=structure, num_iters=0, **LOW_RANK)
    factors = scaled_oplora(RATE, b1=0, structure=structure, hold=0.0)
    # float64, condition numbers of some 1e3.
    expected, _ = outputs(factors, *arrays)
    np.testing.assert_allclose(outputs(jacobi, *arrays)[0], expected, rtol=0, atol=1e-10)
    # Nor does a momentum that starts at zero shorten the first step.
    slow = scaled_oplora(RATE, b1=0.9, structure=structure, num_iters=0, **LOW_RANK)
    np.testing.assert_allclose(outputs(slow, *arrays, steps=1)[0], expected[:1], rtol=0, atol=1e-10)


@each_momentum
@each_structure
def test_starts_at_zero_train(settings, structure):
    lora, x, w, _ = start(dtype=jnp.float32)
    y = np.asarray(lora_dot(x, w, lora))
    for zeros in ("a", "b"):
        param = LowRank(lora.a * (zeros != "a"), lora.b * (zeros != "b"))
        path, state = outputs(scaled_oplora(RATE, structure=structure, **settings), param, x, w, y, steps=60)
        errors = np.mean((path - y) ** 2, axis=(1, 2, 3))
        assert int(state.skipped) == 0
        assert errors[-1] < 0.1 * errors[0], zeros


@each_momentum
@each_structure
def test_nothing_to_learn_moves_nothing(settings, structure):
    """No gradients, before and after some; no inputs; both factors at zero."""
    lora, x, *_ = start(dtype=jnp.float32)
    tx = scaled_oplora(RATE, b1=0, structure=structure, **settings)
    update, dy = jax.jit(tx.update), jnp.ones((LAYERS, TOKENS, M))
    zero = jax.tree.map(jnp.zeros_like, lora)
    _, trained = update(OuterProduct(x, dy), tx.init(lora), lora)
    for gradient, state, param in (
        (OuterProduct(x, 0 * dy), tx.init(lora), lora),
        (OuterProduct(x, 0 * dy), trained, lora),
        (OuterProduct(0 * x, dy), tx.init(lora), lora),
        (OuterProduct(x, dy), tx.init(zero), zero),
    ):
        updates, after = update(gradient, state, param)
        assert int(after.skipped) == 0
        # LoRSum's factors are new where the increment is not: float32 rounding of entries near 1.
        moved = to_dense(optax.apply_updates(param, updates)) - to_dense(param)
        np.testing.assert_allclose(moved, 0, atol=1e-5 if settings else 0)
        chex.assert_tree_all_finite(after)


@each_structure
def test_dead_inputs(structure):
    """Their rows of a are not moved, and the length of a step is hardly that of a layer without them."""
    lora, x, w, y = start(dtype=jnp.float32)
    tx = scaled_oplora(RATE, structure=structure)
    dead = x.at[..., 0].set(0)
    gradient = OuterProduct(dead, lora_dot(x, w, lora) - y)
    updates, state = jax.jit(tx.update)(gradient, tx.init(lora), lora)
    assert int(state.skipped) == 0
    np.testing.assert_array_equal(updates.a[:, 0], 0)
    assert np.all(np.abs(updates.b).max((1, 2)) > 1e-3)


@each_structure
def test_the_first_moments_are_the_first_gradients(structure):
    """Rounding leaves nothing of the start at 1, which is more than the squares of small gradients."""
    lora, x, *_ = start(dtype=jnp.float32)
    dy = 1e-4 * normals(1, jnp.float32)(LAYERS, TOKENS, M)
    tx = scaled_oplora(RATE, structure=structure)
    _, state = jax.jit(tx.update)(OuterProduct(x, dy), tx.init(lora), lora)
    expected = TOKENS * np.swapaxes(f64(dy), -1, -2) @ f64(dy)
    if structure == "diagonal":
        expected = np.diagonal(expected, axis1=-2, axis2=-1)
    largest = np.abs(expected).max()
    np.testing.assert_allclose(state.lora.moments.output, expected, rtol=0, atol=1e-6 * largest)  # float32


@pytest.mark.parametrize("settings", [FACTORS, {"b1": 0, **LOW_RANK}], ids=["factors", "low_rank"])
@each_structure
def test_many_shapes_at_once_are_one_by_one(settings, structure, x64):
    normal = normals(0)
    shapes = {"first": (N, M), "second": (N, M), "wide": (M, 2 * N), "stack": (LAYERS, N, M)}
    draw = lambda *z: LowRank(normal(*z[:-1], R), normal(*z[:-2], R, z[-1]))
    params = {name: draw(*shape) for name, shape in shapes.items()}
    outer = lambda *z: OuterProduct(normal(*z[:-2], TOKENS, z[-2]), normal(*z[:-2], TOKENS, z[-1]))
    gradients = [{name: outer(*shape) for name, shape in shapes.items()} for _ in range(2)]
    tx = scaled_oplora(RATE, structure=structure, **settings)

    def end(names):
        now = {name: params[name] for name in names}
        state, update = tx.init(now), jax.jit(tx.update)
        for gradient in gradients:
            updates, state = update({name: gradient[name] for name in names}, state, now)
            now = optax.apply_updates(now, updates)
        return now

    together = end(shapes)
    for name in shapes:
        chex.assert_trees_all_close(end([name])[name], together[name], rtol=0, atol=1e-11)  # float64


@each_momentum
def test_gradients_of_any_size(settings):
    """The same step as long as float32 has their squares; none beyond, and what is too large is counted."""
    lora, x, *_ = start(dtype=jnp.float32)
    dy = normals(1, jnp.float32)(LAYERS, TOKENS, M)
    tx = scaled_oplora(RATE, **settings)
    update, before = jax.jit(tx.update), to_dense(lora)
    moved = {}
    for size in (1e-30, 1e-20, 1e-15, 1.0, 1e16, 1e30):
        updates, state = update(OuterProduct(x, jnp.float32(size) * dy), tx.init(lora), lora)
        chex.assert_tree_all_finite((updates, state))
        moved[size] = np.asarray(to_dense(optax.apply_updates(lora, updates)) - before)
        assert int(state.skipped) == (size == 1e30)
    for size in (1e-15, 1e16):  # float32, condition numbers of some 1e2
        np.testing.assert_allclose(moved[size], moved[1.0], rtol=0, atol=1e-4 * np.abs(moved[1.0]).max())
    for size in (1e-30, 1e-20, 1e30):
        np.testing.assert_allclose(moved[size], 0, atol=1e-5)  # rounding of new factors
