import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from oplora_jax import LowRank, oplora, scaled_adamw, scaled_gd, to_dense
from tests.arrays import f64, normals
from tests.optimizers.cases import KINDS, gradient_of, problem


def two_steps(tx, params, gradients):
    state, update = tx.init(params), jax.jit(tx.update)
    for g in gradients:
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
    return params


def start(scale=1.0, seed=0):
    draw = normals(seed)
    root = np.sqrt(scale)
    return LowRank(draw(7, 2) / root, draw(2, 5) / root, scale), [draw(7, 5), draw(7, 5)]


def preconditioned(a, b, g, ridge):
    eye = ridge * np.eye(a.shape[1])
    return g @ b.T @ np.linalg.inv(b @ b.T + eye), np.linalg.inv(a.T @ a + eye) @ a.T @ g


def test_scaled_gd_by_hand(x64):
    params, gradients = start()
    tx = scaled_gd(0.1, momentum=0.5, regularization=0.02, weight_decay=0.3)
    new = two_steps(tx, params, gradients)
    factors, velocity = [f64(params.a), f64(params.b)], [0.0, 0.0]
    for g in gradients:
        steps = preconditioned(*factors, f64(g), 0.02)
        velocity = [0.5 * v + s for v, s in zip(velocity, steps, strict=True)]
        factors = [z - 0.1 * (v + 0.3 * z) for z, v in zip(factors, velocity, strict=True)]
    np.testing.assert_allclose(new.a, factors[0], rtol=1e-10)  # float64 solves
    np.testing.assert_allclose(new.b, factors[1], rtol=1e-10)


def test_scaled_adamw_by_hand(x64):
    params, gradients = start()
    tx = scaled_adamw(0.1, b1=0.8, b2=0.9, eps=1e-3, regularization=0.02, weight_decay=0.3)
    new = two_steps(tx, params, gradients)
    factors, m, v = [f64(params.a), f64(params.b)], [0.0, 0.0], [0.0, 0.0]
    for t, g in enumerate(gradients, start=1):
        steps = preconditioned(*factors, f64(g), 0.02)
        m = [0.8 * x + 0.2 * s for x, s in zip(m, steps, strict=True)]
        v = [0.9 * x + 0.1 * s**2 for x, s in zip(v, steps, strict=True)]
        direction = [x / (1 - 0.8**t) / (np.sqrt(y / (1 - 0.9**t)) + 1e-3) for x, y in zip(m, v, strict=True)]
        factors = [z - 0.1 * (d + 0.3 * z) for z, d in zip(factors, direction, strict=True)]
    np.testing.assert_allclose(new.a, factors[0], rtol=1e-9)  # float64 solves and divisions
    np.testing.assert_allclose(new.b, factors[1], rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [scaled_gd, scaled_adamw])
def test_all_kinds_of_gradient_give_one_step(make, kind, x64):
    params, loss_fn = problem(jnp.float64)
    expected = two_steps(make(0.1), params, [jax.grad(loss_fn)(params)])
    actual = two_steps(make(0.1), params, [gradient_of(loss_fn, kind)(params)])
    chex.assert_trees_all_close(actual, expected, rtol=1e-7)  # float64; Adam divides by small roots


def test_scaled_gd_takes_one_path_for_every_scale(x64):
    ends = [to_dense(two_steps(scaled_gd(0.1, momentum=0.5), *start(scale))) for scale in (1.0, 4.0, 0.3)]
    np.testing.assert_allclose(ends[1], ends[0], rtol=0, atol=1e-11)  # float64
    np.testing.assert_allclose(ends[2], ends[0], rtol=0, atol=1e-11)


@pytest.mark.parametrize("regularization", [0.0, 0.05])
def test_scaled_gd_is_oplora_without_iterations(regularization, x64):
    params, gradients = start(2.0)
    one = two_steps(scaled_gd(0.1, regularization=0.1 * regularization), params, gradients)
    other = two_steps(oplora(0.1, momentum=0, num_iters=0, regularization=regularization), params, gradients)
    chex.assert_trees_all_close(one, other, rtol=1e-10)  # float64; oplora multiplies its own by the step size


def test_scaled_gd_is_gauge_invariant(x64):
    params, gradients = start()
    change = jnp.array([[2.0, 1.0], [0.5, 1.5]])
    turned = LowRank(params.a @ change, jnp.linalg.inv(change) @ params.b)
    ends = [to_dense(two_steps(scaled_gd(0.1, regularization=0.0), p, gradients)) for p in (params, turned)]
    np.testing.assert_allclose(ends[0], ends[1], rtol=0, atol=1e-11)  # float64, condition number 5
