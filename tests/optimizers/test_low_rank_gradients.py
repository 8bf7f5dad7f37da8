"""Every optimizer along gradients whose rank is below the LoRA's, that vanish, or that are of unusual size.

Directions of a factor, of a momentum or of a second moment are then nothing but rounding, whose inverses are
large. Steps stay bounded all the same, and training goes on when a gradient comes back.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from oplora_jax import LowRank, lora_dot, to_dense
from tests.optimizers.cases import CASES, OURS, gradient_of, make

N, M, R, TOKENS, STEPS = 8, 6, 4, 4, 40
RNG = np.random.default_rng(0)
KERNEL, TARGET, FACTOR = (RNG.standard_normal(shape) for shape in ((N, M), (N, M), (N, R)))


def inputs():
    """(inputs of each step, the size of its loss, which are all of its tokens) by name."""
    unit = lambda z: z / np.linalg.norm(z, axis=-1, keepdims=True)
    tokens, fresh = (unit(RNG.standard_normal((*some, TOKENS, N))) for some in ((), (STEPS,)))
    always = lambda z: np.broadcast_to(z, (STEPS, TOKENS, N))
    first = lambda z, count: np.where(np.arange(TOKENS)[:, None] < count, z, 0)
    step, ones = np.arange(STEPS), np.ones(STEPS)
    return {
        "one token": (always(first(tokens, 1)), ones),
        "two tokens": (always(first(tokens, 2)), ones),
        "identical tokens": (always(tokens[:1]), ones),
        "another token in each step": (first(fresh, 1), ones),
        "flat at first": (always(tokens), 1.0 * (step > 2)),
        "flat in the middle": (always(tokens), 1.0 * ((step < 5) | (step > 12))),
        "one token, flat in the middle": (always(first(tokens, 1)), 1.0 * ((step < 5) | (step > 12))),
        "flat": (always(tokens), 0 * ones),
        "tiny": (always(tokens), 1e-8 * ones),
        "huge": (always(tokens), 1e4 * ones),
    }


INPUTS = inputs()


def program(name, dtype):
    """A compiled function of inputs and sizes: ((parameter, state), (losses, increments) of the steps)."""
    tx, kernel = make(name), jnp.asarray(KERNEL, dtype)
    param = LowRank(jnp.asarray(0.3 * FACTOR, dtype), jnp.zeros((R, M), dtype), scale=2.0)

    def loss_fn(param, x, size=1.0):  # the Hessian by an increment is 1 at most
        y = x @ (kernel + jnp.asarray(0.5 * TARGET, dtype))
        return size * jnp.sum((lora_dot(x, kernel, param) - y) ** 2) / (2 * TOKENS)

    gradient = gradient_of(loss_fn, CASES[name].kinds[0])

    def step(carry, batch):
        param, state = carry
        updates, state = tx.update(gradient(param, *batch), state, param)
        new = optax.apply_updates(param, updates)
        return (new, state), (loss_fn(new, batch[0]), to_dense(new).astype(jnp.float32))

    return jax.jit(lambda *batches: jax.lax.scan(step, (param, tx.init(param)), batches))


# bfloat16 where nothing but a pseudo-inverse keeps from the directions that its rounding makes.
UNDAMPED = ("lora_rite", "lora_pro", "lora_pro_sgd", "mofasgd")
ALL = [(name, jnp.float32) for name in OURS] + [(name, jnp.bfloat16) for name in UNDAMPED]


@pytest.mark.parametrize("name, dtype", ALL)
def test_steps_are_bounded_and_training_goes_on(name, dtype):
    compiled = program(name, dtype)
    for case, batches in INPUTS.items():
        final, (losses, increments) = compiled(*(jnp.asarray(z, dtype) for z in batches))
        assert all(np.all(np.isfinite(z)) for z in jax.tree.leaves(final)), case
        if case == "huge":  # steepest descent diverges, until its steps are left out and counted
            continue
        assert int(final[1].skipped) == 0, case
        steps = np.linalg.norm(np.diff(increments, axis=0), axis=(1, 2))
        if case == "flat":
            assert not np.any(increments)
        elif case == "tiny":
            assert np.any(steps)
        else:  # altlora_plus, whose first steps are ten times Adam's, goes nearly all of the way at once
            assert steps.max() < np.linalg.norm(0.5 * TARGET), case
        if case not in ("flat", "tiny", "another token in each step"):
            assert losses[-1] < 0.3 * losses[0], case
