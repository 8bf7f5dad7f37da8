"""Parts of a LoRA parameter, and parameters made anew in the loss: the gradient of the whole, or an error."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oplora_jax
from oplora_jax import LowRank, lora_dot, to_dense
from tests.arrays import normal

LAYERS, TOKENS, N, M, R = 3, 6, 5, 4, 2
ROW = jnp.array([0, 2, 2, 1, 0, 0])  # of each token, the layer it goes through


@pytest.fixture(autouse=True)
def _double(x64):
    """Gradients of two programs are compared: in float64 only a wrong formula makes them differ."""


X = lambda: normal(3, TOKENS, N)
W = lambda: normal(2, LAYERS, N, M)
params = lambda: LowRank(normal(0, LAYERS, N, R), normal(1, LAYERS, R, M), 2.0)
summed = lambda y: jnp.sum(jnp.sin(y))
by_hand = lambda p, i: LowRank(p.a[i], p.b[i], p.scale)


def check(loss, dense_loss, kinds=("dense", "auto"), lora=None):
    """`loss(lora)` captures what JAX derives from `dense_loss(matrix)`, compiled and not."""
    lora = lora or params()
    value, expected = jax.value_and_grad(dense_loss)(to_dense(lora))
    for kind in kinds:
        function = oplora_jax.value_and_grad(loss, kind)
        for got, gradient in (function(lora), jax.jit(function)(lora)):
            # float64 rounding through a few layers of sin and tanh
            chex.assert_trees_all_close((got, to_dense(gradient)), (value, expected), rtol=1e-10, atol=1e-10)


def in_turn(part):
    """The layers one after the other, each a part that Python takes."""
    return lambda p: sum(summed(lora_dot(X(), W()[i], part(p, i))) for i in range(LAYERS))


def dense_in_turn(d):
    return sum(summed(X() @ (W()[i] + d[i])) for i in range(LAYERS))


def deep(apply, xs, reverse=False):
    """The layers one in the other; a layer's inputs depend on the one before."""
    step = lambda h, at: (jnp.tanh(apply(X() + 0.1 * h @ at[0].T, *at)), None)
    return summed(jax.lax.scan(step, jnp.zeros((TOKENS, M)), xs, reverse=reverse)[0])


merged = lambda h, w, d: h @ (w + d)


def by_scan_of(pick):
    """A scan over numbers: what is used is picked inside."""
    return lambda p: deep(lambda h, w, i: lora_dot(h, w, pick(p, i)), (W(), jnp.arange(LAYERS)))


def carried(p):
    def step(i, carry):
        h, q = carry
        return jnp.tanh(lora_dot(X() + 0.1 * h @ W()[i].T, W()[i], q[i])), q

    return summed(jax.lax.fori_loop(0, LAYERS, step, (jnp.zeros((TOKENS, M)), p))[0])


deep_dense = lambda d: deep(merged, (W(), d))
of_row = lambda d: summed(jnp.einsum("ti,tij->tj", X(), W()[0][None] + d[ROW]))
ONCE = ("outer", "dense", "auto")
SUMMED = ("dense", "auto")
CASES = {
    "p[i]": (in_turn(lambda p, i: p[i]), dense_in_turn, SUMMED),
    "p[-i]": (in_turn(lambda p, i: p[i - LAYERS]), dense_in_turn, SUMMED),
    "p[numpy's i]": (in_turn(lambda p, i: p[np.int64(i)]), dense_in_turn, SUMMED),
    "p[i:][0]": (in_turn(lambda p, i: p[i:][0]), dense_in_turn, SUMMED),
    "p[..., i]": (in_turn(lambda p, i: p[..., i]), dense_in_turn, SUMMED),
    "p[None, i][0]": (in_turn(lambda p, i: p[None, i][0]), dense_in_turn, SUMMED),
    "p[an array]": (in_turn(lambda p, i: p[jnp.asarray(i)]), dense_in_turn, SUMMED),
    "of the factors, by hand": (in_turn(by_hand), dense_in_turn, SUMMED),
    "of the factors, by jnp.take": (
        in_turn(lambda p, i: jax.tree.map(lambda z: jnp.take(z, jnp.asarray(i), axis=0), p)),
        dense_in_turn,
        SUMMED,
    ),
    "in a tree of one": (
        in_turn(lambda p, i: jax.tree.map(lambda z: jax.jit(lambda z: z[i])(z), p)),
        dense_in_turn,
        SUMMED,
    ),
    "for layer in p": (
        lambda p: sum(summed(lora_dot(X(), w, q)) for w, q in zip(W(), p, strict=True)),
        dense_in_turn,
        SUMMED,
    ),
    "one layer alone": (
        lambda p: summed(lora_dot(X(), W()[1], p[1])),
        lambda d: summed(X() @ (W()[1] + d[1])),
        SUMMED,
    ),
    "out of bounds, filled": (  # such rows go through no layer
        lambda p: summed(
            jax.vmap(lora_dot, (0, None, 0))(
                X(),
                W()[0],
                jax.tree.map(lambda z: jnp.take(z, 2 * ROW, axis=0, mode="fill", fill_value=0), p),
            )
        ),
        lambda d: summed(
            jnp.einsum(
                "ti,tij->tj",
                X(),
                W()[0][None] + jnp.take(d, 2 * ROW, axis=0, mode="fill", fill_value=0),
            )
        ),
        SUMMED,
    ),
    "a cast layer": (
        lambda p: summed(lora_dot(X(), W()[1], p[1].astype(jnp.float64).astype(p.dtype))),
        lambda d: summed(X() @ (W()[1] + d[1])),
        SUMMED,
    ),
    "another scale": (
        lambda p: (
            summed(lora_dot(X(), W()[1], LowRank(p.a[1], p.b[1], 0.5))) + summed(to_dense(by_hand(p, 0)))
        ),
        lambda d: summed(X() @ (W()[1] + d[1] / 4)) + summed(d[0]),
        SUMMED,
    ),
    "another scale, once": (
        lambda p: deep(lambda h, w, q: lora_dot(h, w, LowRank(q.a, q.b, 3.0)), (W(), p)),
        lambda d: deep(lambda h, w, d: h @ (w + 1.5 * d), (W(), d)),
        ONCE,
    ),
    "scan over the factors": (
        lambda p: deep(lambda h, w, ab: lora_dot(h, w, LowRank(*ab, p.scale)), (W(), (p.a, p.b))),
        deep_dense,
        ONCE,
    ),
    "scan backwards over the factors": (
        lambda p: deep(lambda h, w, ab: lora_dot(h, w, LowRank(*ab, p.scale)), (W(), (p.a, p.b)), True),
        lambda d: deep(merged, (W(), d), True),
        ONCE,
    ),
    "scan over numbers": (by_scan_of(lambda p, i: p[i]), deep_dense, SUMMED),
    "scan over numbers, by hand": (by_scan_of(by_hand), deep_dense, SUMMED),
    "in a loop's carry": (carried, deep_dense, SUMMED),
    "a bank, by index": (
        lambda p: summed(jax.vmap(lora_dot, (0, None, 0))(X(), W()[0], p[ROW])),
        of_row,
        SUMMED,
    ),
    "a bank, by index in vmap": (
        lambda p: summed(jax.vmap(lambda x, i: lora_dot(x, W()[0], p[i]))(X(), ROW)),
        of_row,
        SUMMED,
    ),
    "a bank, by numbers that are not there": (
        lambda p: summed(to_dense(jax.tree.map(lambda z: z.at[ROW + 1].get(mode="fill", fill_value=0), p))),
        lambda d: summed(d.at[ROW + 1].get(mode="fill", fill_value=0)),
        SUMMED,
    ),
    "axes moved to and fro": (
        lambda p: deep(lora_dot, (W(), jax.tree.map(lambda z: jnp.moveaxis(jnp.moveaxis(z, 0, 1), 1, 0), p))),
        deep_dense,
        ONCE,
    ),
    "scan over an axis that is not the first": (
        lambda p: deep(
            lambda h, w, q: lora_dot(h, w, q[0]),
            (W(), jax.tree.map(lambda z: jnp.moveaxis(z[None], 1, 0), p)),
        ),
        deep_dense,
        SUMMED,
    ),
    "transposed": (
        lambda p: summed(lora_dot(X() @ W(), jnp.swapaxes(W(), 1, 2), p.T)),
        lambda d: summed((X() @ W()) @ jnp.swapaxes(W() + d, 1, 2)),
        ONCE,
    ),
    "transposed and not": (
        lambda p: summed(lora_dot(lora_dot(X(), W()[0], p[0]), W()[0].T, p[0].T)),
        lambda d: summed(X() @ (W()[0] + d[0]) @ (W()[0] + d[0]).T),
        SUMMED,
    ),
    "transposed, by hand, formed": (
        lambda p: summed(to_dense(LowRank(p.b[2].T, p.a[2].T, p.scale))),
        lambda d: summed(d[2].T),
        SUMMED,
    ),
    "vmap over axes given as a LowRank": (
        lambda p: summed(jax.vmap(lambda w, q: lora_dot(X(), w, q), (0, LowRank(0, 0, p.scale)))(W(), p)),
        lambda d: summed(X() @ (W() + d)),
        ONCE,
    ),
    "a branch for each example": (
        lambda p: summed(
            jax.vmap(
                lambda x: jax.lax.cond(
                    x[0] > 0, lambda x: lora_dot(x, W()[0], p[0]), lambda x: lora_dot(x, W()[1], p[1]), x
                )
            )(X())
        ),
        lambda d: summed(jnp.where(X()[:, :1] > 0, X() @ (W()[0] + d[0]), X() @ (W()[1] + d[1]))),
        SUMMED,
    ),
    "one of three branches for each example": (
        lambda p: summed(
            jax.vmap(
                lambda x, i, p: jax.lax.switch(
                    i,
                    [lambda x, p, k=k: lora_dot(x, (k + 1) * W()[k], p[k]) for k in range(3)],
                    x,
                    p,
                ),
                (0, 0, None),
            )(X(), ROW, p)
        ),
        lambda d: summed(
            jnp.einsum("ti,tij->tj", X(), (jnp.arange(3.0)[:, None, None] + 1)[ROW] * W()[ROW] + d[ROW])
        ),
        SUMMED,
    ),
    "with another tree of LowRank": (
        lambda p: jnp.sum(
            (
                lora_dot(X() @ W(), jnp.swapaxes(W(), 1, 2), p.T)
                - lora_dot(X() @ W(), jnp.swapaxes(W(), 1, 2), teacher(p).T)
            )
            ** 2
        ),
        lambda d: jnp.sum(((X() @ W()) @ jnp.swapaxes(d - to_dense(teacher(params())), 1, 2)) ** 2),
        ONCE,
    ),
    "beside a while loop without a derivative": (
        lambda p: summed(lora_dot(X(), W()[0], p[0])) * jax.lax.stop_gradient(sampled(p)),
        lambda d: summed(X() @ (W()[0] + d[0])) * sampled(params()),
        SUMMED,
    ),
}


def teacher(p):
    """A moving average: a tree of the parameters, and one that is not differentiated."""
    mean = lambda z, old: jax.lax.stop_gradient(0.9 * old + 0.1 * z)
    return jax.tree.map(mean, p, jax.tree.map(lambda z: z + 1, params()))


def sampled(p):
    step = lambda carry: (carry[0] + 1, carry[1] + summed(lora_dot(X(), W()[0], p[0])))
    return jax.lax.while_loop(lambda carry: carry[0] < 3, step, (0, 0.0))[1]


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_that_of_the_whole_weight(case):
    check(*CASES[case])


def test_two_batch_axes():
    lora = LowRank(normal(0, 2, LAYERS, N, R), normal(1, 2, LAYERS, R, M))
    kinds = ("dense", "auto")
    for index in ((1, 2), (slice(None), 1), (0,), (..., 2), (np.array([1, 0]), np.array([2, 0]))):
        of_dense = (slice(None), 2) if index[0] is Ellipsis else index
        check(
            lambda p, index=index: summed(to_dense(p[index])),
            lambda d, index=of_dense: summed(d[index]),
            kinds,
            lora,
        )
    flat = lambda p: LowRank(p.a.reshape(-1, N, R), p.b.reshape(-1, R, M))
    check(lambda p: summed(to_dense(flat(p)[4])), lambda d: summed(d.reshape(-1, N, M)[4]), kinds, lora)


REFUSED = {
    "factors of two layers": lambda p: to_dense(LowRank(p.a[0], p.b[1], p.scale)),
    "factors of two layers, by traced numbers": lambda p: to_dense(
        LowRank(p.a[ROW[0]], p.b[ROW[1]], p.scale)
    ),
    "a layer of twice the size": lambda p: to_dense(LowRank(2 * p.a[0], p.b[0], p.scale)),
    "half of the rank": lambda p: to_dense(LowRank(p.a[0, :, :1], p.b[0, :1], p.scale)),
    "half of the rows": lambda p: to_dense(LowRank(p.a[0, :2], p.b[0], p.scale)),
    "two parts put together": lambda p: to_dense(jax.tree.map(lambda z: jnp.concatenate([z, z]), p)),
    "a choice of entries": lambda p: to_dense(
        LowRank(jnp.where(p.a > 0, p.a, jax.lax.stop_gradient(p.a)), p.b, p.scale)
    ),
    "one factor without a derivative": lambda p: to_dense(LowRank(jax.lax.stop_gradient(p.a), p.b, p.scale)),
    "a while loop": lambda p: sampled(p),
    "the results of a loop": lambda p: to_dense(jax.lax.map(lambda q: q.astype(jnp.float32), p)),
}


@pytest.mark.parametrize("kind", SUMMED)
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_part_of_the_matrix_is_refused(case, kind):
    with pytest.raises(ValueError, match=r"\['lora'\].*full gradient cannot be taken.*p\[i\]"):
        oplora_jax.grad(lambda params: summed(REFUSED[case](params["lora"])), kind)({"lora": params()})


def test_a_function_with_a_derivative_of_its_own_is_refused():
    function = jax.custom_vjp(lambda p: summed(to_dense(p)))
    function.defvjp(lambda p: (function(p), p), lambda p, ct: (p,))
    with pytest.raises(ValueError, match="derivative of their own"):
        oplora_jax.grad(function)(params())


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_a_loss_that_is_a_number(wrap):
    value, gradient = wrap(oplora_jax.value_and_grad(lambda p: 3.0))(params())
    assert value == 3 and not to_dense(gradient).any()


def test_what_comes_back_is_a_low_rank():
    loss = lambda p: (summed(to_dense(p)), {"p": p, "note": "as it was", "layer": p[0]})
    _, aux = oplora_jax.grad(loss, has_aux=True)(params())
    assert type(aux["p"]) is LowRank and aux["note"] == "as it was"
    chex.assert_trees_all_equal(aux["p"], params())
    chex.assert_trees_all_equal(aux["layer"], params()[0])


def test_an_index_that_is_not_there():
    with pytest.raises(IndexError, match="out of bounds"):
        params()[LAYERS]
    with pytest.raises(IndexError, match="too many indices"):
        params()[0, 0]
    with pytest.raises(TypeError, match=r"shape \(5, 4\) has no batch axes"):
        params()[0][0]


@pytest.mark.parametrize("index", [1, slice(1, 3), [2, 0], None, jnp.array([[1, 2], [0, 0]])])
def test_parts_are_those_of_the_matrix(index):
    np.testing.assert_array_equal(
        to_dense(params()[index]),
        to_dense(params())[jnp.asarray(index) if isinstance(index, list) else index],
    )
    np.testing.assert_array_equal(to_dense(params().T), jnp.swapaxes(to_dense(params()), 1, 2))
    assert params().astype(jnp.bfloat16).dtype == jnp.bfloat16


def test_a_transposed_kernel_keeps_the_roles_of_its_axes():
    lora = LowRank(normal(0, 4, 2), normal(1, 2, 6), roles="oio")
    assert lora.T.roles == "ioi" and lora.T.T.roles == "oio" and params().T.roles is None


@pytest.mark.parametrize("kind", ["outer", "dense", "auto"])
def test_a_factor_with_another_without_a_derivative(kind):
    """Statistics of what is no part of the parameter, of another size."""
    other = normal(7, R, M + 3)
    still = lambda p: jax.lax.stop_gradient(jnp.sum(to_dense(LowRank(p.a, other)) ** 2))
    loss = lambda p: summed(lora_dot(X(), W()[0], p)) * still(p)
    lora = params()[0]
    check(loss, lambda d: summed(X() @ (W()[0] + d)) * still(lora), [kind], lora)
