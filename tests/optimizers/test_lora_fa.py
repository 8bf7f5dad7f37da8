import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from oplora_jax import LowRank, lora_dot, lora_fa, to_dense
from oplora_jax.nnx import LoRALinear, value_and_grad
from tests.arrays import f64
from tests.optimizers.cases import KINDS, gradient_of, problem, run
from tests.optimizers.paths import draw, follow


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_twenty_steps_by_hand(scale, x64):
    params, gradients = draw(scale)
    schedule = lambda count: 0.2 / (1 + 0.125 * count)
    new = follow(lora_fa(schedule, b1=0.8, b2=0.9, eps=1e-3, weight_decay=0.3), params, gradients)
    a, b = f64(params.a), f64(params.b)
    m, v = np.zeros_like(b), np.zeros_like(b)
    for t, g in enumerate(f64(gradients), start=1):
        plain = scale * a.T @ g  # what autodiff gives for b
        gb = np.linalg.inv(a.T @ a) @ plain / scale**2
        m, v = 0.8 * m + 0.2 * gb, 0.9 * v + 0.1 * gb**2
        direction = m / (1 - 0.8**t) / (np.sqrt(v / (1 - 0.9**t)) + 1e-3)
        b = b - schedule(t - 1) * (direction + 0.3 * b)
    np.testing.assert_array_equal(new.a, params.a)
    np.testing.assert_allclose(new.b, b, rtol=0, atol=1e-10)  # float64 solves and divisions


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_it_steps_along_the_gradient_within_the_columns_of_a(scale, x64):
    params, gradients = draw(scale)
    # Without averages, and an eps above every gradient, Adam is gradient descent: a step of 1.
    tx = lora_fa(1e9, b1=0.0, b2=0.0, eps=1e9)
    change = jnp.array([[2.0, 1.0], [0.5, 1.5]])
    turned = LowRank(params.a @ change, jnp.linalg.inv(change) @ params.b, scale)
    a, g = f64(params.a), f64(gradients[0])
    for start in (params, turned):  # whatever the basis of the columns
        step = f64(to_dense(follow(tx, start, gradients[:1]))) - f64(to_dense(start))
        np.testing.assert_allclose(step, -a @ np.linalg.pinv(a) @ g, rtol=0, atol=1e-7)  # gradients by eps


def test_adam_depends_on_the_basis_of_the_columns(x64):
    params, gradients = draw(2.0)
    tx = lora_fa(0.1)
    end = to_dense(follow(tx, params, gradients[:3]))
    turn = lambda r: to_dense(follow(tx, LowRank(params.a @ r, r.T @ params.b, 2.0), gradients[:3]))
    swapped = jnp.array([[0.0, -1.0], [1.0, 0.0]])  # elementwise steps know no signs and no order
    np.testing.assert_allclose(turn(swapped), end, rtol=0, atol=1e-11)  # float64
    rotated = jnp.array([[0.8, -0.6], [0.6, 0.8]])
    assert np.abs(turn(rotated) - end).max() > 0.01


def test_all_kinds_of_gradient_give_one_step(x64):
    params, loss_fn = problem(jnp.float64)
    ends = [run(lora_fa(0.1), params, gradient_of(loss_fn, kind), 3)[0] for kind in KINDS]
    chex.assert_trees_all_close(*ends, rtol=1e-7)  # float64; Adam divides by small roots


def test_the_state_is_that_of_b():
    params, loss_fn = problem()
    tx = lora_fa(0.1)
    params_after, state = run(tx, params, jax.grad(loss_fn), 2)
    b = params["first"].b
    arrays = [z for z in jax.tree.leaves(state.lora) if z.ndim]
    assert [z.shape for z in arrays] == [b.shape] * 2
    mu = optax.tree.get(state.lora, "mu")["first"]
    assert isinstance(mu.a, optax.MaskedNode) and mu.b.shape == b.shape
    chex.assert_trees_all_equal(params_after["first"].a, params["first"].a)


def test_the_backward_pass_keeps_x_a_and_not_x():
    x, kernel = jnp.ones((40, 16)), jnp.ones((16, 12))
    p = LowRank(jnp.ones((16, 2)), jnp.ones((2, 12)))

    def kept(layer):
        """The shapes of what the backward pass of a layer needs."""
        return [z.shape for z in jax.tree.leaves(jax.vjp(layer, x, p)[1])]

    frozen = lambda p: LowRank(jax.lax.stop_gradient(p.a), p.b, p.scale)
    assert x.shape in kept(lambda x, p: lora_dot(x, kernel, p))
    shapes = kept(lambda x, p: lora_dot(x, kernel, frozen(p)))
    assert x.shape not in shapes and (40, 2) in shapes


@pytest.mark.parametrize("kind", ["factors", "outer"])
def test_compiled_with_the_update_the_backward_pass_drops_x(kind):
    jax.config.update("jax_disable_most_optimizations", False)
    depth, tokens, size = 6, 512, 64
    params = [LowRank(jnp.ones((size, 2)), jnp.zeros((2, size))) for _ in range(depth)]
    kernel = jnp.eye(size)

    def loss_fn(params, x):
        for p in params:  # linear: nothing but the gradients needs a layer's inputs
            x = lora_dot(x, kernel, p)
        return jnp.mean(x**2)

    def temporary_memory(tx, gradient):
        step = lambda params, state, x: tx.update(gradient(params, x), state, params)
        compiled = jax.jit(step).lower(params, tx.init(params), jnp.ones((tokens, size))).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    plain = temporary_memory(optax.adam(0.1), jax.grad(loss_fn))
    ours = temporary_memory(lora_fa(0.1), gradient_of(loss_fn, kind))
    # Of the inputs of all layers (depth of the arrays) some two are alive at once.
    assert ours < plain - (depth - 3) * 4 * tokens * size


def test_a_container_that_drops_the_factor_without_state():
    model = LoRALinear(8, 6, rank=2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, lora_fa(0.1), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model, optimizer):
        loss, gradients = value_and_grad(lambda model: jnp.sum((model(jnp.ones((3, 8))) - 1) ** 2))(model)
        optimizer.update(model, gradients)
        return loss

    first, a = step(model, optimizer), model.lora.get_value().a
    assert step(model, optimizer) < first
    chex.assert_trees_all_equal(model.lora.get_value().a, a)


@pytest.mark.parametrize("a", [jnp.zeros((7, 2)), jnp.ones((7, 2)), 1e-20 * jnp.ones((7, 2))])
def test_a_rank_deficient_left_factor(a):
    params = LowRank(a, jnp.zeros((2, 5)), 2.0)
    gradient = jnp.asarray(np.random.default_rng(0).standard_normal((7, 5)), jnp.float32)
    tx = lora_fa(0.1)
    for g in (gradient, 0 * gradient):
        updates, state = tx.update(g, tx.init(params), params)
        chex.assert_tree_all_finite((updates, state))
        assert not np.any(updates.a)
    assert not np.any(updates.b)  # a zero gradient
