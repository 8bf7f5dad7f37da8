"""What the taps capture, of every kind and in every transformed program, and what is refused."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oplora_jax
from oplora_jax import LowRank, lora_dot, to_dense
from oplora_jax.gradients.value_and_grad import TracedLoss
from tests.arrays import normal

# X[i] are the inputs of one example, or of one of the stacked layers.
BATCH, ROWS, N, M, R = 3, 4, 5, 6, 2


@pytest.fixture(autouse=True)
def _double(x64):
    """Gradients of two programs are compared: in float64 only a wrong formula makes them differ."""


def layer(x, kernel, lora):
    return jnp.sum(jnp.sin(lora_dot(x, kernel, lora)))


def per_example(wrap):
    """The layer on each x of X, with the same parameter."""
    return lambda x, kernel, lora: jnp.sum(jax.vmap(wrap(layer), (0, None, None))(x, kernel, lora))


def per_layer(wrap):
    """A scan over the layers, each with its own x."""

    def scanned(x, kernel, lora):
        body = wrap(lambda total, at: (total + layer(*at), None))
        return jax.lax.scan(body, jnp.zeros(()), (x, kernel, lora))[0]

    return scanned


rows = lambda f: lambda x, kernel, lora: jnp.sum(jax.vmap(f, (0, None, None))(x, kernel, lora))
SHARED = {
    "plain": layer,
    "jit": jax.jit(layer),
    "remat": jax.checkpoint(layer),
    "vmap": per_example(lambda f: f),
    "vmap of vmap": per_example(rows),
    "vmap of jit of remat": per_example(lambda f: jax.jit(jax.checkpoint(f))),
}
STACKED = {
    "batch axes": layer,
    "scan": per_layer(lambda f: f),
    "scan over remat": per_layer(jax.checkpoint),
    "vmap over the parameters": lambda *at: jnp.sum(jax.vmap(layer)(*at)),
    # Axes of tokens behind a batch axis.
    "vmap over x of batch axes": lambda *at: jnp.sum(jax.vmap(layer, (1, None, None))(*at)),
    "vmap over x of vmap over the parameters": lambda *at: jnp.sum(
        jax.vmap(jax.vmap(layer), (1, None, None))(*at)
    ),
    "vmap over the parameters of vmap over x": lambda *at: jnp.sum(
        jax.vmap(lambda *at: jax.vmap(layer, (0, None, None))(*at))(*at)
    ),
    "vmap of scan over remat": lambda x, kernel, lora: jnp.sum(
        jax.vmap(per_layer(jax.checkpoint), (1, None, None))(x, kernel, lora)
    ),
}
PROGRAMS = {name: (loss, ()) for name, loss in SHARED.items()}
PROGRAMS |= {name: (loss, (BATCH,)) for name, loss in STACKED.items()}


def operands(batch):
    lora = LowRank(normal(0, *batch, N, R), normal(1, *batch, R, M), 2.0)
    return normal(2, BATCH, ROWS, N), normal(3, *batch, N, M), lora


def by_kind(kind, **settings):
    return lambda loss, lora: oplora_jax.grad(loss, kind, **settings)(lora)


def by_rule(loss, lora):
    """A rule of its own: the factors' gradients, and what it holds times the number of tokens."""
    batch = lora.shape[:-2]
    held = normal(4, *batch, 2), jnp.ones(batch, int)

    def rule(a, b, held, x, dy):
        gradient = jnp.swapaxes(x, -1, -2) @ dy
        times = x.shape[-2] * held[1][..., None]
        return gradient @ jnp.swapaxes(b, -1, -2), jnp.swapaxes(a, -1, -2) @ gradient, held[0] * times

    program = TracedLoss(lambda nodes: (loss(*nodes), None), [((), lora)])
    taps = jax.tree.map(jnp.zeros_like, (lora.a, lora.b, held[0]))
    return jax.grad(lambda taps: program([taps], {0: (taps, held, rule)})[0])(taps)


CAPTURES = {
    "outer": by_kind("outer"),
    "dense": by_kind("dense"),
    "diagonal moments": by_kind("dense", moments="diagonal"),
    "dense moments": by_kind("dense", moments="dense"),
    "rule": by_rule,
}


def expected(kind, x, kernel, lora):
    """From the weight's gradient, which JAX derives, and from x and dy written out."""
    batch = lora.shape[:-2]
    gradient = jax.grad(lambda d: jnp.sum(jnp.sin(x @ (kernel + d))))(to_dense(lora))
    dy = jnp.cos(x @ (kernel + to_dense(lora)))
    x, dy = x.reshape(*batch, -1, N), dy.reshape(*batch, -1, M)
    tokens = x.shape[-2]
    if kind == "diagonal moments":
        return gradient, jnp.sum(x**2, -2), jnp.sum(dy**2, -2), jnp.full(batch, tokens, x.dtype)
    if kind == "dense moments":
        squared = [jnp.swapaxes(z, -1, -2) @ z for z in (x, dy)]
        return gradient, *squared, jnp.full(batch, tokens, x.dtype)
    if kind == "rule":
        of_factors = jax.vjp(lambda a, b: a @ b, lora.a, lora.b)[1](gradient)
        return *of_factors, tokens * normal(4, *batch, 2)
    return (gradient,)


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("kind", CAPTURES)
def test_what_is_captured(kind, program):
    loss, batch = PROGRAMS[program]
    x, kernel, lora = operands(batch)
    capture = functools.partial(CAPTURES[kind], functools.partial(loss, x, kernel))
    for got in (capture(lora), jax.jit(capture)(lora)):
        got = (to_dense(got),) if kind == "outer" else jax.tree.leaves(got)
        # float64: sums of at most 12 products of normal numbers
        chex.assert_trees_all_close(tuple(got), expected(kind, x, kernel, lora), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["outer", "dense"])
def test_a_gradient_in_every_example(kind):
    """vmap outside: each example captures its own."""
    x, kernel, lora = operands(())
    one = lambda lora, x: oplora_jax.grad(lambda lora: layer(x, kernel, lora), kind)(lora)
    got = to_dense(jax.vmap(one, (None, 0))(lora, x))
    of_one = jax.grad(lambda d, x: jnp.sum(jnp.sin(x @ (kernel + d))))
    want = jax.vmap(of_one, (None, 0))(to_dense(lora), x)
    chex.assert_trees_all_close(got, want, rtol=1e-12, atol=1e-12)  # float64, sums of 4 products


@pytest.mark.parametrize("use", ["lora_dot", "to_dense"])
@pytest.mark.parametrize("kind", ["auto", "dense"])
def test_an_exact_gradient_can_be_differentiated(kind, use):
    """By the factors: nothing of them is hidden from the outer derivative."""
    x, kernel, lora = operands(())
    of_matrix = lambda d: jnp.sum(jnp.sin(x @ (kernel + d)))
    loss = functools.partial(layer, x, kernel) if use == "lora_dot" else lambda p: of_matrix(to_dense(p))
    square = lambda gradient: jnp.sum(to_dense(gradient) ** 2)
    got = jax.grad(lambda p: square(oplora_jax.grad(loss, kind)(p)))(lora)
    want = jax.grad(lambda p: square(jax.grad(of_matrix)(to_dense(p))))(lora)
    chex.assert_trees_all_close(got, want, rtol=1e-11, atol=1e-11)  # float64, two passes over 12 tokens


def test_uses_through_lora_dot_and_to_dense_add_up():
    x, kernel, lora = operands(())
    loss = lambda p: layer(x, kernel, p) * jnp.sum(jnp.cos(to_dense(p)))
    of_matrix = lambda d: jnp.sum(jnp.sin(x @ (kernel + d))) * jnp.sum(jnp.cos(d))
    got, want = oplora_jax.grad(loss, "dense")(lora), jax.grad(of_matrix)(to_dense(lora))
    chex.assert_trees_all_close(got, want, rtol=1e-12, atol=1e-12)  # float64, a few dozen products


MISSED = {
    "a kernel made of the factors": lambda x, kernel, p: layer(x, kernel + p.a @ p.b, p),
    "inputs made of the factors": lambda x, kernel, p: layer(x + p.a[None, :, 0], kernel, p),
    "one of the factors": lambda x, kernel, p: layer(x, kernel, p.with_factors(p.a, jnp.ones((R, M)))),
    "a derivative by the inputs": lambda x, kernel, p: jnp.sum(
        jax.jvp(lambda x: lora_dot(x, kernel, p), (x,), (x,))[1]
    ),
    "plain factor gradients": lambda x, kernel, p: jnp.sum(jax.grad(lambda p: layer(x, kernel, p))(p).a ** 2),
}


@pytest.mark.parametrize("kind", ["outer", "dense"])
@pytest.mark.parametrize("case", MISSED)
def test_what_the_taps_would_miss_is_refused(case, kind):
    x, kernel, lora = operands(())
    with pytest.raises(ValueError, match=r"\['p'\].*depends on the factors.*lora_dot"):
        oplora_jax.grad(lambda params: MISSED[case](x[0], kernel, params["p"]), kind)({"p": lora})


def test_no_forward_pass_reads_the_taps():
    x, kernel, lora = operands(())
    program = TracedLoss(lambda nodes: (jnp.sum(lora_dot(x, kernel, *nodes)), None), [((), lora)])
    for tap in ((normal(5, N, M),), (normal(5, BATCH * ROWS, N), normal(6, BATCH * ROWS, M))):
        value, _ = program([tap], {0: (tap, (), None)})
        np.testing.assert_array_equal(value, jnp.sum(lora_dot(x, kernel, lora)))
