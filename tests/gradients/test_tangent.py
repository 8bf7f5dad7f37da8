"""The projection of the gradient that factor gradients determine."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oplora_jax import LowRank, OuterProduct, lorsum, oplora, tangent_gradient, to_dense
from oplora_jax.gradients.tangent import factor_gradients, of_full_gradients


def problem(n, m, r, scale, batch=()):
    keys = jax.random.split(jax.random.key(n * m * r), 3)
    p = LowRank(jax.random.normal(keys[0], (*batch, n, r)), jax.random.normal(keys[1], (*batch, r, m)), scale)
    return p, jax.random.normal(keys[2], (*batch, n, m))


@pytest.fixture(autouse=True)
def _double(x64):
    """Projections are compared with NumPy's: float64 leaves rounding times the factors' condition."""


@given(
    n=st.sampled_from([5, 9]),
    m=st.sampled_from([4, 9]),
    r=st.integers(1, 3),
    scale=st.sampled_from([0.5, 1.0, 3.0]),
    batch=st.sampled_from([(), (2,)]),
)
def test_is_the_tangent_projection(n, m, r, scale, batch):
    p, g = problem(n, m, r, scale, batch)
    got = jax.jit(lambda p, g: tangent_gradient(p, factor_gradients(p, g)))(p, g)
    assert got.a.shape == (*batch, n, 2 * r)
    a, b, g = (np.asarray(z) for z in (p.a, p.b, g))
    pa, pb = a @ np.linalg.pinv(a), np.linalg.pinv(b) @ b
    np.testing.assert_allclose(to_dense(got), pa @ g + g @ pb - pa @ g @ pb, rtol=1e-8, atol=1e-8)


def test_factor_gradients_are_those_of_jax():
    p, g = problem(5, 4, 2, scale=3.0)
    expected = jax.grad(lambda p: jnp.sum(g * to_dense(p)))(p)
    x, dy = jnp.linalg.qr(g)
    for gradient in (g, OuterProduct(x.T, dy), expected):
        chex.assert_trees_all_close(factor_gradients(p, gradient), expected, rtol=1e-10)


def test_at_the_usual_start():
    """b = 0: what is known is the projection on the columns of a."""
    p, g = problem(6, 5, 2, scale=2.0)
    p = LowRank(p.a, jnp.zeros_like(p.b), p.scale)
    got = to_dense(tangent_gradient(p, factor_gradients(p, g)))
    np.testing.assert_allclose(got, p.a @ jnp.linalg.pinv(p.a) @ g, rtol=1e-9, atol=1e-9)


def test_lorsum_of_it_agrees_with_that_of_the_gradient_to_second_order():
    """The first half-step exactly; the whole step with an error that falls like eta squared."""
    p, g = problem(8, 7, 2, scale=1.0)
    projected = tangent_gradient(p, factor_gradients(p, g))
    errors = []
    for eta in (1e-2, 1e-3):
        exact, approximate = (lorsum([(1.0, p), (-eta, z)]) for z in (g, projected))
        np.testing.assert_allclose(approximate.a, exact.a, rtol=1e-8, atol=1e-10)
        errors.append(np.linalg.norm(to_dense(exact) - to_dense(approximate)))
    assert 50 < errors[0] / errors[1] < 200  # (1e-2 / 1e-3)^2 = 100, up to the third order


def test_shapes_that_disagree():
    p, _ = problem(5, 4, 2, scale=1.0)
    wrong = LowRank(jnp.ones((5, 3)), jnp.ones((3, 4)))
    with pytest.raises(ValueError, match=r"\(5, 3\).*\(5, 2\)"):
        tangent_gradient(p, wrong)


def test_steps_of_factor_gradients_take_their_parameters_in_stacks():
    """One call for all of a shape, another for all exact gradients; the results are those of each alone."""
    sizes = [(5, 4, 2), (6, 4, 2), (5, 4, 2), (5, 4, 2), (6, 4, 2)]
    problems = [problem(n, m, r, 2.0) for n, m, r in sizes]
    params = [p for p, _ in problems]
    params = [LowRank((i + 1) * p.a, p.b, p.scale) for i, p in enumerate(params)]
    gradients = [factor_gradients(p, g) for p, (_, g) in zip(params, problems, strict=True)]
    gradients[2], gradients[4] = problems[2][1], problems[4][1]  # exact ones
    states = [{"momentum": jnp.full((), float(i)), "none": None} for i in range(5)]
    calls = []

    def step(params, gradients, states, count):
        calls.append([p.shape for p in params])
        new = [
            p.with_factors(p.a + to_dense(g) @ jnp.swapaxes(p.b, -1, -2), p.b)
            for p, g in zip(params, gradients, strict=True)
        ]
        return new, [{"momentum": z["momentum"] + count, "none": None} for z in states]

    new, after = of_full_gradients(step)(params, gradients, states, 10)
    assert sorted(calls) == [[(2, 5, 4)], [(5, 4), (6, 4)], [(6, 4)]]
    for i, (p, (_, g), z, state) in enumerate(zip(params, problems, new, after, strict=True)):
        a, b, g = (np.asarray(z) for z in (p.a, p.b, g))
        pa, pb = a @ np.linalg.pinv(a), np.linalg.pinv(b) @ b
        full = g if i in (2, 4) else pa @ g + g @ pb - pa @ g @ pb
        np.testing.assert_allclose(z.a, a + full @ b.T, rtol=1e-8, atol=1e-8)
        assert float(state["momentum"]) == i + 10 and state["none"] is None


def test_what_is_not_finite_stays_with_its_parameter():
    """In a stack of three."""
    params = [problem(5, 4, 2, 1.0)[0]] * 3
    gradients = [jax.tree.map(jnp.ones_like, p) for p in params]
    bad = LowRank(gradients[1].a.at[0, 0].set(jnp.nan), gradients[1].b)
    tx = oplora(0.1)
    update = jax.jit(lambda g: tx.update(g, tx.init(params), params))
    (expected, _), (updates, state) = update(gradients), update([gradients[0], bad, gradients[2]])
    assert int(state.skipped) == 1 and not np.any(updates[1].a) and np.any(updates[0].a)
    for i in (0, 2):
        chex.assert_trees_all_equal(updates[i], expected[i])
