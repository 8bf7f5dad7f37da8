"""Programs drawn at random, of everything that JAX can do around a layer: the exact gradient, or an error.

A program is written once, for parameters of two kinds: a `LowRank`, and the matrix it stands for, whose
gradient JAX derives. All sizes are equal, so that anything can follow anything.
"""

import functools
import random
import types

import chex
import jax
import jax.numpy as jnp
import pytest

import oplora_jax
from oplora_jax import LowRank, lora_dot, to_dense
from tests.arrays import normal

SIZE, LAYERS, RANK, PROGRAMS, PER_TEST = 3, 2, 2, 160, 16
swap = lambda z: jnp.swapaxes(z, -1, -2)

# What a program does with a parameter p of one layer, or of a stack.
LORA = types.SimpleNamespace(
    times=lora_dot,
    formed=lambda h, w, p: h @ (w + to_dense(p)),
    transposed=lambda p: p.T,
    transposed_by_hand=lambda p: LowRank(swap(p.b), swap(p.a), p.scale),
    layer=lambda p, i: p[i],
    layer_by_hand=lambda p, i: LowRank(p.a[i], p.b[i], p.scale),
    anew=lambda p: LowRank(p.a, p.b, p.scale),
    doubled=lambda p: LowRank(p.a, p.b, 2 * p.scale),
    cast=lambda p: p.astype(jnp.float64),
)
DENSE = types.SimpleNamespace(
    times=lambda h, w, d: h @ (w + d),
    formed=lambda h, w, d: h @ (w + d),
    transposed=swap,
    transposed_by_hand=swap,
    layer=lambda d, i: d[i],
    layer_by_hand=lambda d, i: d[i],
    anew=lambda d: d,
    doubled=lambda d: 2 * d,
    cast=lambda d: d,
)


def draw_layer(rng, depth):
    """A function (ops, h, w, p) -> h of one layer: h is (SIZE,) or (SIZE, SIZE), w and p are matrices."""
    if depth == 0:
        return getattr(Leaves, rng.choice([name for name in vars(Leaves) if name[0] != "_"]))
    inner = draw_layer(rng, depth - 1)
    kind = rng.choice(["jit", "remat", "vmap", "cond", "branches", "twice", "tanh", "scan", "fori", "aside"])
    if kind == "jit":
        return lambda ops, *at: jax.jit(functools.partial(inner, ops))(*at)
    if kind == "remat":
        return lambda ops, *at: jax.checkpoint(functools.partial(inner, ops))(*at)
    if kind == "vmap":
        return lambda ops, h, w, p: (
            jax.vmap(lambda h: inner(ops, h, w, p))(h) if h.ndim == 2 else inner(ops, h, w, p)
        )
    if kind == "cond":
        return lambda ops, h, w, p: jax.lax.cond(
            jnp.sum(h) > 0, functools.partial(inner, ops), lambda h, w, p: jnp.sin(h @ w), h, w, p
        )
    if kind == "branches":
        other = draw_layer(rng, depth - 1)
        parts = lambda ops: [functools.partial(f, ops) for f in (inner, other, inner)]
        return lambda ops, h, w, p: jax.lax.switch(jnp.argmax(jnp.ravel(h)) % 3, parts(ops), h, w, p)
    if kind == "twice":
        other = draw_layer(rng, depth - 1)
        return lambda ops, h, w, p: inner(ops, h, w, p) + other(ops, jnp.cos(h), w, p)
    if kind == "tanh":
        return lambda ops, h, w, p: jnp.tanh(inner(ops, h, w, p))
    if kind == "scan":  # the same layer in every round
        return lambda ops, h, w, p: jax.lax.scan(
            lambda h, t: (jnp.tanh(inner(ops, h, t * w, p)), None), h, jnp.arange(1.0, 3.0)
        )[0]
    if kind == "fori":
        return lambda ops, h, w, p: jax.lax.fori_loop(
            0, 2, lambda i, c: (jnp.tanh(inner(ops, c[0], w, c[1])), c[1]), (h, p)
        )[0]
    # A statistic of the parameter, and a copy of it that is not differentiated.
    still = lambda p: jax.tree.map(jax.lax.stop_gradient, p)
    return lambda ops, h, w, p: inner(ops, h, w, p) * (1 + jnp.mean(inner(ops, h, w, still(p)) ** 2))


class Leaves:
    """Layers of their own."""

    times = lambda ops, h, w, p: ops.times(h, w, p)
    formed = lambda ops, h, w, p: ops.formed(h, w, p)
    back = lambda ops, h, w, p: ops.times(ops.times(h, w, p), w.T, ops.transposed(p))
    by_hand = lambda ops, h, w, p: ops.times(h, w.T, ops.transposed_by_hand(p))
    anew = lambda ops, h, w, p: ops.times(h, w, ops.anew(p))
    doubled = lambda ops, h, w, p: ops.times(h, w, ops.doubled(p))
    cast = lambda ops, h, w, p: ops.times(h, w, ops.cast(p))


def draw_stack(rng, depth):
    """A function (ops, h, ws, ps) -> h of a stack of layers."""
    layer = draw_layer(rng, depth)
    kind = rng.choice(
        ["scan", "scan remat", "backwards", "loop", "numbers", "carried", "experts", "bank", "one"]
    )
    pick = rng.choice(["layer", "layer_by_hand"])
    if kind in ("scan", "scan remat", "backwards"):
        wrap = jax.checkpoint if kind == "scan remat" else lambda f: f

        def stack(ops, h, ws, ps):
            step = wrap(lambda h, at: (jnp.tanh(layer(ops, h, *at)), None))
            return jax.lax.scan(step, h, (ws, ps), reverse=kind == "backwards")[0]

    elif kind == "loop":

        def stack(ops, h, ws, ps):
            for i in range(LAYERS):
                h = jnp.tanh(layer(ops, h, ws[i], getattr(ops, pick)(ps, i)))
            return h

    elif kind == "numbers":

        def stack(ops, h, ws, ps):
            step = lambda h, i: (jnp.tanh(layer(ops, h, ws[i], getattr(ops, pick)(ps, i))), None)
            return jax.lax.scan(step, h, jnp.arange(LAYERS))[0]

    elif kind == "carried":

        def stack(ops, h, ws, ps):
            step = lambda i, c: (jnp.tanh(layer(ops, c[0], ws[i], getattr(ops, pick)(c[1], i))), c[1])
            return jax.lax.fori_loop(0, LAYERS, step, (h, ps))[0]

    elif kind == "experts":
        stack = lambda ops, h, ws, ps: jnp.sum(jax.vmap(lambda w, p: layer(ops, h, w, p))(ws, ps), axis=0)
    elif kind == "bank":

        def stack(ops, h, ws, ps):
            one = lambda h, i: layer(ops, h, ws[i], getattr(ops, pick)(ps, i))
            return jax.vmap(one)(h, jnp.arange(SIZE) % LAYERS)

    else:
        stack = lambda ops, h, ws, ps: layer(ops, h, ws[0], getattr(ops, pick)(ps, 0))
    return stack


def draw_program(rng):
    """(kind of gradient, the loss of a LowRank, the loss of the matrix)."""
    stack = draw_stack(rng, rng.randrange(3))
    x, ws = 1 + normal(0, SIZE, SIZE), normal(1, LAYERS, SIZE, SIZE)
    loss = lambda ops: lambda ps: jnp.sum(jnp.sin(stack(ops, x, ws, ps)))
    return rng.choice(["auto", "auto", "dense", "outer"]), loss(LORA), loss(DENSE)


PARAM = lambda: LowRank(normal(2, LAYERS, SIZE, RANK), normal(3, LAYERS, RANK, SIZE), 0.5)
REFUSALS = "full gradient cannot be taken|needs one use per forward pass"


def gradients(kind, loss, dense_loss, param):
    """The exact gradient and JAX's, both as matrices; None for the first if that is refused."""
    expected = jax.value_and_grad(dense_loss)(to_dense(param))
    try:
        value, gradient = oplora_jax.value_and_grad(loss, kind)(param)
    except ValueError as error:
        if not any(words in str(error) for words in REFUSALS.split("|")):
            raise
        return None, expected
    return (value, to_dense(gradient)), expected


@pytest.mark.parametrize("seed", range(PROGRAMS // PER_TEST))
def test_right_or_refused(seed, x64):
    """Several programs are compiled at once."""
    rng, refused = random.Random(seed), 0
    programs = [draw_program(rng) for _ in range(PER_TEST)]
    pairs = jax.jit(lambda param: [gradients(*program, param) for program in programs])(PARAM())
    for number, (got, expected) in enumerate(pairs):
        refused += got is None
        if got is not None:
            # float64 rounding through a dozen layers at most
            chex.assert_trees_all_close(
                got, expected, rtol=1e-9, atol=1e-9, custom_message=f"program {number} of seed {seed}"
            )
    assert refused <= PER_TEST / 3  # most are right
