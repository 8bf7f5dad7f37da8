import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from oplora_jax import LowRank, lora_plus
from tests.arrays import f64
from tests.optimizers.cases import KINDS, gradient_of, problem, run
from tests.optimizers.paths import draw, follow

BASES = {
    "adam": None,
    "adamw": functools.partial(optax.adamw, weight_decay=0.1),
    "sgd": functools.partial(optax.sgd, momentum=0.9, nesterov=True),
}


@pytest.mark.parametrize("base", BASES.values(), ids=BASES.keys())
@pytest.mark.parametrize("rate", [0.1, optax.linear_schedule(0.1, 0.0, 5)], ids=["constant", "schedule"])
def test_with_ratio_one_it_is_the_base_optimizer(base, rate):
    params, loss_fn = problem()
    plain = (base or optax.adam)(rate)
    ours = lora_plus(rate, ratio=1, base=base)
    pairs = [(params, ours.init(params), ours), (params, plain.init(params), plain)]
    for _ in range(3):
        gradient = jax.grad(loss_fn)(pairs[0][0])
        after = []
        for p, state, tx in pairs:
            updates, state = tx.update(gradient, state, p)
            after.append((optax.apply_updates(p, updates), state, tx))
        pairs = after
        if base is BASES["sgd"]:  # not compiled: the same operations one by one
            chex.assert_trees_all_equal(pairs[0][0], pairs[1][0])
        else:  # Adam compiles its bias correction for a whole tree at once: last bits of numbers up to 1
            chex.assert_trees_all_close(pairs[0][0], pairs[1][0], rtol=0, atol=1.2e-7)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_twenty_steps_by_hand(scale, x64):
    params, gradients = draw(scale)
    schedule = lambda count: 0.02 / (1 + 0.125 * count)
    base = functools.partial(optax.adamw, b1=0.8, b2=0.9, eps=1e-3, weight_decay=0.3)
    new = follow(lora_plus(schedule, ratio=16, base=base), params, gradients)
    factors = [f64(params.a), f64(params.b)]
    m, v = ([np.zeros_like(z) for z in factors] for _ in range(2))
    for t, g in enumerate(f64(gradients), start=1):
        plain = scale * g @ factors[1].T, scale * factors[0].T @ g
        for i, (gradient, ratio) in enumerate(zip(plain, (1, 16), strict=True)):
            m[i], v[i] = 0.8 * m[i] + 0.2 * gradient, 0.9 * v[i] + 0.1 * gradient**2
            direction = m[i] / (1 - 0.8**t) / (np.sqrt(v[i] / (1 - 0.9**t)) + 1e-3)
            rate = ratio * schedule(t - 1)
            factors[i] = factors[i] - rate * (direction + 0.3 * factors[i])  # the decay is times the rate
    np.testing.assert_allclose(new.a, factors[0], rtol=0, atol=1e-10)  # float64; 20 steps of size 0.3
    np.testing.assert_allclose(new.b, factors[1], rtol=0, atol=1e-10)


def test_a_decay_that_knows_no_learning_rate_is_not_multiplied(x64):
    params, gradients = draw()
    base = lambda rate: optax.chain(optax.sgd(rate), optax.add_decayed_weights(-0.1))
    new = follow(lora_plus(0.01, ratio=4, base=base), params, gradients[:1])
    a, b, g = f64(params.a), f64(params.b), f64(gradients[0])
    np.testing.assert_allclose(new.a, 0.9 * a - 0.01 * g @ b.T, rtol=0, atol=1e-13)  # float64
    np.testing.assert_allclose(new.b, 0.9 * b - 0.04 * a.T @ g, rtol=0, atol=1e-13)


def test_other_leaves_learn_at_the_rate_of_a():
    params, loss_fn = problem()
    gradient = jax.grad(loss_fn)(params)
    tx = lora_plus(0.01, ratio=16)
    updates, state = tx.update(gradient, tx.init(params), params)
    # The first step of Adam is as large as the learning rate, to eps by the gradient.
    for part, rate in ((updates["first"].a, 0.01), (updates["first"].b, 0.16), (updates["bias"], 0.01)):
        np.testing.assert_allclose(np.abs(part), rate, rtol=1e-3)
    size = sum(z.size for z in jax.tree.leaves(params["first"]))
    assert sum(z.size for z in jax.tree.leaves(state.lora) if z.ndim) == 2 * size  # one Adam, not two


def test_all_kinds_of_gradient_give_one_step(x64):
    params, loss_fn = problem(jnp.float64)
    ends = [run(lora_plus(0.01), params, gradient_of(loss_fn, kind), 3)[0] for kind in KINDS]
    chex.assert_trees_all_close(*ends, rtol=1e-7)  # float64; Adam divides by small roots


def test_an_injected_learning_rate_with_another_base():
    params, gradients = draw()
    gradients = gradients.astype(params.a.dtype)
    make = functools.partial(lora_plus, base=BASES["sgd"])
    injected = optax.inject_hyperparams(make, static_args="base")(0.01, ratio=4.0)
    chex.assert_trees_all_close(
        follow(injected, params, gradients[:3]),
        follow(make(0.01, ratio=4.0), params, gradients[:3]),
        rtol=1e-5,  # float32 rounding of 3 steps, the rates multiplied at run time
    )


@pytest.mark.parametrize("ratio", [0.5, 0, -1.0, float("nan")])
def test_a_ratio_below_one_is_refused(ratio):
    with pytest.raises(ValueError, match=r"ratio is .*; expected 1 or more"):
        lora_plus(0.1, ratio=ratio)


def test_zero_gradients():
    params = LowRank(jnp.ones((7, 2)), jnp.zeros((2, 5)), 2.0)
    tx = lora_plus(0.1)
    updates, _ = tx.update(jnp.zeros((7, 5)), tx.init(params), params)
    assert not np.any(updates.a) and not np.any(updates.b)
