import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from oplora_jax import LowRank, lora_rite
from tests.optimizers.cases import problem, run
from tests.optimizers.paths import (
    assert_same_path,
    factors,
    full_gradients,
    low_rank,
    path,
    path_by_hand,
    schedule,
)

B1, B2, EPS = 0.8, 0.9, 1e-3


def corrected(decay, t):
    return decay * (1 - decay ** (t - 1)) / (1 - decay**t)


def moments(u, old_basis, basis, memory, t, escapes):
    """The new first moment of one side; the second moment and the escaped mass go to its memory."""
    bb1, bb2 = corrected(B1, t), corrected(B2, t)
    turn = old_basis.T @ basis
    carried = turn.T @ memory["v"] @ turn
    if escapes:
        drops = np.linalg.eigvalsh(memory["v"]) - np.linalg.eigvalsh(carried)
        mass = min(max(0, drops.max()), max(0, np.trace(memory["v"]) - np.trace(carried)))
        memory["rho"] = bb2 * (memory["rho"] + mass)
    memory["v"] = bb2 * carried + (1 - bb2) * u.T @ u / len(u)
    values, vectors = np.linalg.eigh(memory["v"])
    whitened = u @ vectors @ np.diag(1 / (np.sqrt(np.abs(values) + memory["rho"]) + EPS)) @ vectors.T
    memory["m"] = bb1 * memory["m"] @ turn + (1 - bb1) * whitened
    return memory["m"]


def inverses(ra, rb, rate, m, n):
    """Those of R that a and b step with: of one of them without the short directions of the product."""
    a_waits = np.linalg.matrix_rank(ra, rtol=2**-8) >= np.linalg.matrix_rank(rb, rtol=2**-8)
    u, values, vt = np.linalg.svd(ra @ rb.T)
    short = values <= rate * np.sqrt(m if a_waits else n) / 2
    waits = vt.T @ np.diag(np.where(short, 0, 1 / np.where(short, 1, values))) @ u.T  # (ra rb^T)^+
    moves = np.linalg.pinv(ra if a_waits else rb, rtol=1e-13)
    return (ra.T @ waits.T, moves) if a_waits else (moves, rb.T @ waits)


def by_hand(a, b, skip_threshold, max_norm, decay, escapes):
    square = np.zeros((a.shape[1],) * 2)
    of_a, of_b = {"m": 0 * a, "v": square, "rho": 0.0}, {"m": 0 * b.T, "v": square, "rho": 0.0}
    bases = {"a": 0 * a, "b": 0 * b.T}

    def step(t, a, b, da, db):
        rate = float(schedule(t - 1))
        (qa, ra), (qb, rb) = np.linalg.qr(a), np.linalg.qr(b.T)
        inverse_b, inverse_a = inverses(ra, rb, rate, len(b.T), len(a))
        us = [da @ inverse_b, (inverse_a.T @ db).T]
        if skip_threshold is not None:
            us = [0 * u if np.sqrt(np.mean(u**2)) > skip_threshold else u for u in us]
        norm = np.sqrt(sum(np.sum(u**2) for u in us))
        if max_norm is not None and norm > max_norm:
            us = [u / norm * max_norm for u in us]
        ma = moments(us[0], bases["b"], qb, of_a, t, escapes)
        mb = moments(us[1], bases["a"], qa, of_b, t, escapes)
        bases.update(a=qa, b=qb)
        new_a = a - rate * (ma @ inverse_b.T + decay * a)
        return new_a, b - rate * ((mb @ inverse_a.T).T + decay * b)

    return step


def one_direction_at_first():
    """Targets whose gradients have rank 1 in the first step; other directions come up slowly."""
    rng = np.random.default_rng(2)
    one = np.outer(rng.standard_normal(6), rng.standard_normal(5)) * (
        1 + 0.1 * rng.standard_normal((20, 1, 1))
    )
    return one + 3e-3 * np.arange(20)[:, None, None] * full_gradients()


@pytest.mark.parametrize(
    "scale, zero, targets, skip_threshold, max_norm, decay, escapes",
    [
        (1.0, "", full_gradients, 2.1, 1.0, 0.0, False),  # some of b's gradients are skipped
        (2.0, "", full_gradients, 3.6, None, 0.3, True),
        (2.0, "b", full_gradients, None, 2.0, 0.0, False),
        (1.0, "b", full_gradients, None, None, 0.3, True),
        (2.0, "b", one_direction_at_first, None, 1.0, 0.0, False),
        (1.0, "b", one_direction_at_first, None, None, 0.0, True),
        (2.0, "a", one_direction_at_first, None, None, 0.0, False),
    ],
)
def test_by_hand(scale, zero, targets, skip_threshold, max_norm, decay, escapes, x64):
    thresholds = {"skip_threshold": skip_threshold, "max_norm": max_norm}
    settings = {"b1": B1, "b2": B2, "eps": EPS, "weight_decay": decay}
    tx = lora_rite(schedule, escaped_mass=escapes, **thresholds, **settings)
    a, b = factors(scale)
    a, b, targets = a * (zero != "a"), b * (zero != "b"), targets()
    step = by_hand(a, b, skip_threshold, max_norm, decay, escapes)
    # float64; factors that were just zero have condition numbers of 1e3, second moments of 1e4.
    assert_same_path(path(tx, targets)(low_rank(a, b, scale)), path_by_hand(step, a, b, scale, targets), 1e-8)


@pytest.mark.parametrize("turned", [False, True])
def test_a_waits_where_the_product_is_shorter_than_half_a_step_of_b(turned, x64):
    """lr sqrt(m) / 2 = 0.1; or b does, below lr sqrt(n) / 2 = 0.4, where it has the more directions."""
    rng = np.random.default_rng(0)
    a, b = np.linalg.qr(rng.standard_normal((64, 3)))[0], np.diag([0.11, 0.09, 0.0]) @ np.eye(3, 4)
    if turned:
        a, b = a @ np.diag([0.41, 0.39, 0.0]), np.eye(3, 4)
    updates, _ = one_step(lora_rite(0.1), low_rank(a, b), jnp.asarray(rng.standard_normal((64, 4))))
    waits, moves = (updates.b, updates.a.T) if turned else (updates.a.T, updates.b)
    sizes = np.linalg.norm(waits, axis=-1)
    assert sizes[0] > 0.1 and sizes[1:].max() < 1e-10 and np.linalg.norm(moves, axis=-1).min() > 0.1


def one_step(tx, params, gradients):
    return jax.jit(lambda params, gradients: tx.update(gradients, tx.init(params), params))(params, gradients)


def test_the_joint_norm_is_of_all_parameters_and_all_layers(x64):
    """Scaling by it shows in the second moment, U^T U / n at the first step."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape)
    params = {"one": LowRank(draw(6, 2), draw(2, 5), 2.0), "stack": LowRank(draw(3, 4, 2), draw(3, 2, 7))}
    params, gradients = jax.tree.map(jnp.asarray, (params, {"one": draw(6, 5), "stack": draw(3, 4, 7)}))

    @jax.jit
    def second_moment(max_norm):
        tx = lora_rite(0.1, max_norm=max_norm)
        return tx.update(gradients, tx.init(params), params)[1].lora.second_moment

    free = second_moment(np.inf)
    traces = [np.trace(v[k], axis1=-2, axis2=-1).sum() for v in free for k in ("one", "stack")]
    squares = np.array(traces) * (6, 4, 5, 7)
    us = [2 * gradients["one"] @ np.linalg.qr(params["one"].b.T)[0]]
    us += [2 * np.linalg.qr(params["one"].a)[0].T @ gradients["one"]]
    np.testing.assert_allclose(squares[[0, 2]], [np.sum(u**2) for u in us], rtol=1e-12)  # float64
    norm = np.sqrt(squares.sum())
    for max_norm, factor in ((norm / 3, 1 / 9), (norm * 1.001, 1)):
        expected = jax.tree.map(lambda v, f=factor: f * v, free)
        chex.assert_trees_all_close(second_moment(max_norm), expected, rtol=1e-10)  # float64


def test_a_factor_above_the_threshold_is_skipped_for_that_layer(x64):
    a, b = factors()
    params, gradient = low_rank(np.stack([a, a]), np.stack([b, b])), full_gradients()[0]
    rms = float(np.sqrt(np.mean((gradient @ np.linalg.qr(b.T)[0]) ** 2)))
    above_of_b = [z * np.sqrt(np.mean((np.linalg.qr(a)[0].T @ gradient) ** 2)) > rms for z in (0.99, 1.01)]
    gradients = jnp.asarray([0.99 * gradient, 1.01 * gradient])
    tx = lora_rite(0.1, skip_threshold=rms, max_norm=None)
    updates, state = one_step(tx, params, gradients)
    assert np.any(updates.a[0]) and not np.any(updates.a[1]) and int(state.skipped) == 0
    # Counted for each layer and factor, and in no other step.
    _, state = tx.update(0.1 * gradients, tx.update(gradients, state, params)[1], params)
    of_a, of_b = optax.tree.get(state, "above_threshold")
    assert of_a.ravel().tolist() == [0, 2] and of_b.ravel().tolist() == [2 * z for z in above_of_b]


def test_a_gradient_that_is_not_finite_does_not_stop_the_others():
    params = {"bad": low_rank(*factors()), "good": low_rank(*factors(seed=2))}
    params = jax.tree.map(lambda z: z.astype(jnp.float32), params)
    good = jnp.asarray(full_gradients()[0], jnp.float32)
    tx = lora_rite(0.1)
    expected, _ = one_step(tx, params, {"bad": jnp.zeros_like(good), "good": good})
    for value in (jnp.nan, jnp.inf):
        updates, state = one_step(tx, params, {"bad": good.at[0, 0].set(value), "good": good})
        chex.assert_trees_all_equal(updates["good"], expected["good"])
        assert not np.any(updates["bad"].a) and not np.any(updates["bad"].b)
        assert int(state.skipped) == 1


def test_factors_and_gradients_without_rank():
    """Nothing is divided by zero in float32; where b is zero, a waits. A rank above a side is no matter."""
    ones = LowRank(jnp.ones((6, 3)), jnp.ones((3, 2)), 2.0)
    tx = lora_rite(0.1)
    update = jax.jit(tx.update)
    for param in (ones, LowRank(ones.a, 0 * ones.b, 2.0), jax.tree.map(jnp.zeros_like, ones)):
        state = tx.init(param)
        for gradient in (jnp.ones((6, 2)), 1e30 * jnp.ones((6, 2)), jnp.zeros((6, 2))):
            updates, state = update(gradient, state, param)
            assert all(np.all(np.isfinite(z)) for z in jax.tree.leaves((updates, state)))
            assert int(state.skipped) == 0 and (np.any(param.b) or not np.any(updates.a))
            # A step is lr times an orthonormal matrix times an inverse triangle, never more.
            assert all(np.abs(z).max() < 1 for z in jax.tree.leaves(updates))


def test_the_defaults_train_a_loss_of_any_size():
    """The gradients of a summed loss are a thousand times a mean's."""
    params, loss_fn = problem(b_zero=True)
    for size in (1.0, 1e3):
        gradient = lambda params, size=size: jax.grad(lambda p: size * loss_fn(p))(params)
        after, state = run(lora_rite(0.03), params, gradient, 100)
        assert loss_fn(after) < 0.01 * loss_fn(params) and int(state.skipped) == 0


@pytest.mark.parametrize("escapes, threshold, more", [(False, None, 0), (True, None, 2), (False, 1.0, 2)])
def test_the_size_of_the_state(escapes, threshold, more):
    n, m, r = 64, 48, 4
    tx = lora_rite(0.1, escaped_mass=escapes, skip_threshold=threshold)
    state = tx.init(LowRank(jnp.ones((n, r)), jnp.ones((r, m))))
    sizes = sum(z.size for z in jax.tree.leaves(state.lora))
    assert sizes == 2 * r * (n + m) + 2 * r * r + more
