"""The captured gradient is that of the dense weight, in every program that uses a LoRA parameter."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import oplora_jax
from oplora_jax import LowRank, OuterProduct, lora_dot, to_dense
from tests.arrays import normal

N, M, R, LAYERS, TOKENS = 6, 5, 2, 3, 4


@pytest.fixture(autouse=True)
def _double(x64):
    """Gradients of two programs are compared: in float64 only a wrong formula makes them differ."""


def low_rank(n=N, m=M, batch=(), scale=2.0):
    return LowRank(normal(0, *batch, n, R), normal(1, *batch, R, m), scale)


def kernel(n=N, m=M, batch=()):
    return normal(2, *batch, n, m)


def check(loss, dense_loss, lora, kinds):
    """`loss(lora)` captures what JAX derives from `dense_loss(matrix)`."""
    value, expected = jax.jit(jax.value_and_grad(dense_loss))(to_dense(lora))
    for kind in kinds:
        got, gradient = jax.jit(oplora_jax.value_and_grad(loss, kind))(lora)
        if kind != "auto":
            assert isinstance(gradient, OuterProduct) == (kind == "outer")
        # float64 rounding through a few layers of sin and tanh
        chex.assert_trees_all_close((got, to_dense(gradient)), (value, expected), rtol=1e-10, atol=1e-10)


def summed(y):
    return jnp.sum(jnp.sin(y))


def layer(x):
    return (
        lambda p: summed(lora_dot(x, kernel(), p)),
        lambda d: summed(x @ (kernel() + d)),
    )


X = lambda: normal(3, TOKENS, 3, N)
ONCE = ("outer", "dense", "auto")
SUMMED = ("dense", "auto")


def once_per_example(wrap):
    x = X()
    example = wrap(lambda p, x: summed(lora_dot(x, kernel(), p)))
    return lambda p: jnp.sum(jax.vmap(example, in_axes=(None, 0))(p, x)), layer(x)[1]


def scanned_constant():
    x = X()
    body = lambda p, x: summed(lora_dot(x, kernel(), p))
    loss = lambda p: jax.lax.scan(lambda c, x: (c + body(p, x), None), 0.0, x)[0]
    return loss, layer(x)[1]


def looped():
    x = normal(3, TOKENS, N)
    w = kernel(N, N)
    apply = lambda weight: lambda _, h: jnp.tanh(weight(h))
    loop = lambda weight: summed(jax.lax.fori_loop(0, 3, apply(weight), x))
    return (
        lambda p: loop(lambda h: lora_dot(h, w, p)),
        lambda d: loop(lambda h: h @ (w + d)),
    )


def two_branches(other_tokens):
    x = X()
    w = kernel()
    small = x[:other_tokens]
    yes = x.sum() < 1e9
    return (
        lambda p: jax.lax.cond(
            yes, lambda p: summed(lora_dot(x, w, p)), lambda p: lora_dot(small, w, p).sum(), p
        ),
        layer(x)[1],
    )


SINGLE = {
    "one matrix of inputs": (lambda: layer(X()), ONCE),
    "no leading axis": (lambda: layer(normal(3, N)), ONCE),
    "four leading axes": (lambda: layer(normal(3, 2, 1, 2, 3, N)), ONCE),
    "remat": (lambda: (jax.checkpoint(layer(X())[0]), layer(X())[1]), ONCE),
    "vmap over x": (lambda: once_per_example(lambda f: f), ONCE),
    "vmap of jit": (lambda: once_per_example(jax.jit), ONCE),
    "vmap of remat": (lambda: once_per_example(jax.checkpoint), ONCE),
    "vmap of vmap": (
        lambda: once_per_example(lambda f: lambda p, x: jax.vmap(f, (None, 0))(p, x).sum()),
        ONCE,
    ),
    "branches of equal size": (lambda: two_branches(TOKENS), ONCE),
    "branches of other sizes": (lambda: two_branches(2), SUMMED),
    "statistics of the factors": (
        lambda: (
            lambda p: layer(X())[0](p) + jax.lax.stop_gradient(jnp.sum(p.a**2)),
            lambda d: layer(X())[1](d) + jnp.sum(low_rank().a ** 2),
        ),
        ONCE,
    ),
    "integers from the factors": (
        lambda: (
            lambda p: layer(X())[0](p) * jnp.sum(p.a > 0),
            lambda d: layer(X())[1](d) * jnp.sum(low_rank().a > 0),
        ),
        ONCE,
    ),
    "used twice": (lambda: tuple(lambda z, f=f: f(z) + f(z) ** 2 for f in layer(X())), SUMMED),
    "in every step of a scan": (scanned_constant, SUMMED),
    "to_dense": (
        lambda: (lambda p: summed(X() @ (kernel() + to_dense(p))), layer(X())[1]),
        SUMMED,
    ),
    "to_dense and lora_dot": (
        lambda: (
            lambda p: layer(X())[0](p) + summed(to_dense(p)),
            lambda d: layer(X())[1](d) + summed(d),
        ),
        SUMMED,
    ),
    "copies in a scan": (
        lambda: (
            lambda p: jax.lax.scan(
                lambda c, z: (c + summed(lora_dot(z[0], kernel(), z[1])), None),
                0.0,
                (X(), jax.tree.map(lambda t: jnp.broadcast_to(t, (TOKENS, *t.shape)), p)),
            )[0],
            layer(X())[1],
        ),
        SUMMED,
    ),
    "copies by indexing": (
        lambda: (
            lambda p: summed(
                jax.vmap(lora_dot, (0, None, 0))(
                    X(), kernel(), jax.tree.map(lambda t: t[None][jnp.zeros(TOKENS, int)], p)
                )
            ),
            layer(X())[1],
        ),
        SUMMED,
    ),
}


@pytest.mark.parametrize("case", SINGLE)
def test_one_parameter(case):
    build, kinds = SINGLE[case]
    loss, dense_loss = build()
    check(loss, dense_loss, low_rank(), kinds)
    if "outer" not in kinds:
        with pytest.raises(ValueError, match=r"used \d+ times|merged into a weight"):
            oplora_jax.value_and_grad(loss, "outer")(low_rank())


def deep(apply, stack, x, wrap=lambda f: f):
    step = wrap(lambda h, z: (jnp.tanh(apply(h, *z)), None))
    return jnp.sum(jax.lax.scan(step, x, (kernel(N, N, (LAYERS,)), stack))[0] ** 2)


def merged(h, w, d):
    return h @ (w + d)


def unrolled(apply):
    def loss(stack):
        h = X()
        for i in range(LAYERS):
            h = jnp.tanh(apply(h, kernel(N, N, (LAYERS,))[i], jax.tree.map(lambda t, i=i: t[i], stack)))
        return jnp.sum(h**2)

    return loss


def experts(apply):
    x = normal(3, LAYERS, TOKENS, N)
    return lambda stack: summed(apply(x, kernel(N, N, (LAYERS,)), stack))


STACKED = {
    "scan": (lambda p: deep(lora_dot, p, X()), lambda d: deep(merged, d, X()), ONCE),
    "scan of remat": (
        lambda p: deep(lora_dot, p, X(), jax.checkpoint),
        lambda d: deep(merged, d, X()),
        ONCE,
    ),
    "vmap of scan of remat": (
        lambda p: jnp.sum(jax.vmap(lambda x: deep(lora_dot, p, x, jax.checkpoint))(X())),
        lambda d: deep(merged, d, X()),
        ONCE,
    ),
    "unrolled": (unrolled(lora_dot), unrolled(merged), SUMMED),
    "experts under vmap": (experts(jax.vmap(lora_dot)), experts(jax.vmap(merged)), ONCE),
    "experts as batch axes": (experts(lora_dot), experts(merged), ONCE),
    "experts on the same x": (
        lambda p: summed(jax.vmap(lora_dot, (None, 0, 0))(X(), kernel(N, N, (LAYERS,)), p)),
        lambda d: summed(jax.vmap(merged, (None, 0, 0))(X(), kernel(N, N, (LAYERS,)), d)),
        ONCE,
    ),
}


@pytest.mark.parametrize("case", STACKED)
def test_stacked_parameters(case):
    loss, dense_loss, kinds = STACKED[case]
    check(loss, dense_loss, low_rank(N, N, (LAYERS,)), kinds)


def test_a_scan_body_that_is_traced_twice_counts_once():
    """The carry's type changes in the first trace, so JAX traces the body again."""
    traces = []

    def loss(p):
        def body(carry, z):
            traces.append(None)
            return carry + summed(lora_dot(X(), *z)), None

        return jax.lax.scan(body, 0, (kernel(N, N, (LAYERS,)), p))[0]

    p = low_rank(N, N, (LAYERS,))
    jax.make_jaxpr(loss)(p)
    assert len(traces) > 1
    gradient = oplora_jax.grad(loss, "outer")(p)
    assert gradient.x.shape == (LAYERS, TOKENS * 3, N)


def test_loop_with_a_known_number_of_rounds():
    loss, dense_loss = looped()
    check(loss, dense_loss, low_rank(N, N), SUMMED)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint, jax.jit])
def test_gradients_of_single_examples(wrap):
    """vmap outside: one outer product an example."""
    loss = wrap(lambda p, x: summed(lora_dot(x, kernel(), p)))
    gradients = jax.vmap(oplora_jax.grad(loss, "outer"), (None, 0))(low_rank(), X())
    assert gradients.x.shape == (TOKENS, 3, N)
    expected = jax.grad(layer(X())[1])(to_dense(low_rank()))
    chex.assert_trees_all_close(to_dense(gradients).sum(0), expected, rtol=1e-10, atol=1e-10)


@settings(max_examples=12)
@given(
    lead=st.lists(st.integers(1, 3), max_size=3),
    n=st.sampled_from([3, 7]),
    m=st.sampled_from([4, 5]),
    scale=st.sampled_from([0.5, 1.0, 4.0]),
    kind=st.sampled_from(ONCE),
)
def test_any_shape_and_scale(lead, n, m, scale, kind):
    x, w, p = normal(3, *lead, n), kernel(n, m), low_rank(n, m, scale=scale)
    check(lambda p: summed(lora_dot(x, w, p)), lambda d: summed(x @ (w + d)), p, [kind])


def test_the_other_leaves_and_the_inputs_are_differentiated_as_usual():
    params = {"lora": low_rank(), "kernel": kernel(), "bias": normal(4, M)}
    loss = lambda p, x: summed(lora_dot(x, p["kernel"], p["lora"]) + p["bias"][None])
    x = normal(3, TOKENS, N)
    expected = jax.grad(loss)(params, x)
    got = oplora_jax.grad(loss)(params, x)
    chex.assert_trees_all_close(got["kernel"], expected["kernel"], rtol=1e-12)
    chex.assert_trees_all_close(got["bias"], expected["bias"], rtol=1e-12)
    # Factor gradients, from plain jax.grad, are those of the merged weight.
    merged_loss = lambda p: loss(
        {**params, "kernel": kernel() + p.scale * p.a @ p.b, "lora": low_rank(scale=1e-9)}, x
    )
    chex.assert_trees_all_close(expected["lora"], jax.grad(merged_loss)(low_rank()), rtol=1e-6, atol=1e-6)
    by_x = jax.grad(lambda x: loss(params, x))(x)
    chex.assert_trees_all_close(
        by_x,
        jax.grad(lambda x: summed(x @ (kernel() + to_dense(low_rank())) + params["bias"][None]))(x),
        rtol=1e-10,
    )


def test_aux_extra_arguments_and_trees_without_lora():
    loss = lambda p, x, *, power: (summed(lora_dot(x, kernel(), p)) ** power, {"size": x.size})
    x = normal(3, TOKENS, N)
    (value, aux), gradient = oplora_jax.value_and_grad(loss, has_aux=True)(low_rank(), x, power=2)
    same, same_aux = oplora_jax.grad(loss, has_aux=True)(low_rank(), x, power=2)
    assert aux == same_aux == {"size": x.size}
    chex.assert_trees_all_equal(gradient, same)
    chex.assert_trees_all_close(value, loss(low_rank(), x, power=2)[0])
    plain = lambda p: jnp.sum(p["w"] ** 2)
    chex.assert_trees_all_equal(oplora_jax.grad(plain)({"w": x}), jax.grad(plain)({"w": x}))


def test_keyword_arguments_of_any_name():
    """Those of the function's own arguments too."""
    loss = lambda lora, *, params, state: summed(lora_dot(params, kernel(), lora)) * state
    x = normal(3, TOKENS, N)
    value, _ = oplora_jax.value_and_grad(loss)(low_rank(), params=x, state=2.0)
    np.testing.assert_allclose(value, loss(low_rank(), params=x, state=2.0), rtol=1e-6)
    tx = oplora_jax.oplora(0.1)
    step = oplora_jax.value_and_update(loss, tx)
    value, *_ = step(low_rank(), tx.init(low_rank()), params=x, state=2.0)
    np.testing.assert_allclose(value, loss(low_rank(), params=x, state=2.0), rtol=1e-6)


def test_an_unused_parameter_has_a_zero_gradient():
    params = {"used": low_rank(), "unused": low_rank()}
    for kind in ONCE:
        gradient = oplora_jax.grad(lambda p: layer(X())[0](p["used"]), kind)(params)["unused"]
        np.testing.assert_array_equal(to_dense(gradient), np.zeros((N, M)))


def test_auto_takes_the_kind_with_less_arithmetic():
    """8 N r (n + m) against 2 N n m + 8 n m r, for tall and for wide batches."""
    for n, m, tokens in [(64, 64, 2), (64, 64, 512), (8, 8, 4), (512, 8, 64), (256, 256, 256)]:
        p = LowRank(jnp.ones((n, 4)), jnp.zeros((4, m)))
        loss = lambda p, x: lora_dot(x, jnp.ones((p.a.shape[0], p.b.shape[1])), p).sum()
        gradient = oplora_jax.grad(loss)(p, jnp.ones((tokens, n)))
        cheaper = 8 * tokens * 4 * (n + m) <= 2 * tokens * n * m + 8 * n * m * 4
        assert isinstance(gradient, OuterProduct) == cheaper


REFUSED = {
    "x a b written out": lambda p: summed(X() @ p.a @ p.b),
    "a penalty on a factor": lambda p: layer(X())[0](p) + jnp.sum(p.b**2),
    "a factor changed before use": lambda p: layer(X())[0](LowRank(2 * p.a, p.b, p.scale)),
    "the gradient of a gradient": lambda p: jnp.sum(
        jax.grad(lambda x: summed(lora_dot(x, kernel(), p)))(X()) ** 2
    ),
    "in a loop's carry": lambda p: jax.lax.fori_loop(0, 2, lambda _, c: c * p.a.sum(), 1.0),
}


@pytest.mark.parametrize("kind", ONCE)
@pytest.mark.parametrize("case", REFUSED)
def test_a_use_that_would_be_missed_is_refused(case, kind):
    loss = lambda params: REFUSED[case](params["dense"]["lora"])
    with pytest.raises(ValueError, match=r"\['dense'\]\['lora'\].*lora_dot"):
        oplora_jax.grad(loss, kind)({"dense": {"lora": low_rank()}})


@pytest.mark.parametrize("kind", ONCE)
def test_without_jit(kind):
    loss, dense_loss = layer(X())
    gradient = oplora_jax.grad(loss, kind)(low_rank())
    expected = jax.grad(dense_loss)(to_dense(low_rank()))
    chex.assert_trees_all_close(to_dense(gradient), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("unchecked")
def test_bad_arguments():
    with pytest.raises(ValueError, match="'auto', 'outer' or 'dense'"):
        oplora_jax.value_and_grad(lambda p: 0.0, "exact")
    for loss, words in [
        (lambda p: None, "returns a NoneType; expected a scalar"),
        (lambda p: jnp.ones(3), r"returns an array \(3,\); expected a scalar"),
        (lambda p: (1.0, 2.0), r"a tuple; expected a scalar, or has_aux=True for a pair"),
    ]:
        with pytest.raises(ValueError, match=words):
            oplora_jax.grad(loss)(low_rank())
    with pytest.raises(ValueError, match=r"must return \(loss, auxiliary data\), not 0.0"):
        oplora_jax.grad(lambda p: 0.0, has_aux=True)(low_rank())
    with pytest.raises(ValueError, match=r"\['w'\].*do not fit.*same rank"):
        oplora_jax.grad(lambda p: 0.0)({"w": LowRank(jnp.ones((N, 2)), jnp.ones((3, M)))})
    for x, w, p in [
        (jnp.ones((4, N + 1)), kernel(), low_rank()),
        (jnp.ones((4, N)), kernel(N, M + 1), low_rank()),
        (jnp.ones((2, 4, N)), kernel(N, M, (LAYERS,)), low_rank(batch=(LAYERS,))),
        (jnp.ones((4, N)), kernel(), LowRank(jnp.ones((N, 2)), jnp.ones((2, M)), -1.0)),
    ]:
        with pytest.raises(ValueError, match=r"shape|scale"):
            lora_dot(x, w, p)


def test_shard_map_sums_over_devices():
    """Each device sees the same factors: the dense gradient adds up, the outer product is refused."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x = normal(3, 8, N)
    spec = jax.sharding.PartitionSpec
    local = lambda p, x: jax.lax.psum(summed(lora_dot(x, kernel(), p)), "data")
    loss = lambda p: jax.shard_map(local, mesh=mesh, in_specs=(spec(), spec("data")), out_specs=spec())(p, x)
    check(loss, layer(x)[1], low_rank(), SUMMED)
    with pytest.raises(ValueError, match="used 2 times"):
        oplora_jax.grad(loss, "outer")(low_rank())


def test_shard_map_over_layers():
    """Each device has layers of its own; with other rows too, the gradient adds up over the devices."""
    mesh = jax.make_mesh((2, 2), ("layers", "data"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    x, w, spec = normal(3, 4, 8, N), kernel(N, M, (4,)), jax.sharding.PartitionSpec
    dense = lambda d: summed(x @ (w + d))
    for rows in (spec("layers"), spec("layers", "data")):
        layers = spec("layers")
        apply = jax.shard_map(lora_dot, mesh=mesh, in_specs=(rows, layers, layers), out_specs=rows)
        check(lambda p, f=apply: summed(f(x, w, p)), dense, low_rank(batch=(4,)), SUMMED)


def test_inside_of_shard_map():
    """As `jax.grad`: of parameters that devices share the sum, of their own each one's; never sums of x."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x, p, spec = normal(3, 8, N), low_rank(), jax.sharding.PartitionSpec
    loss = lambda p, x: summed(lora_dot(x, kernel(), p))
    varying = lambda p: jax.tree.map(lambda z: jax.lax.pcast(z, "data", to="varying"), p)

    def gradient(kind, own, loss=loss):
        def local(p, x):
            g = to_dense(oplora_jax.grad(loss, kind)(varying(p) if own else p, x))
            return jax.lax.psum(g, "data") if own else g

        mapped = jax.shard_map(local, mesh=mesh, in_specs=(spec(), spec("data")), out_specs=spec())
        return jax.jit(mapped)(p, x)

    expected = jax.grad(layer(x)[1])(to_dense(p))
    for kind, own in (("dense", False), ("auto", False), ("dense", True), ("outer", True)):
        # float64 rounding of sums in another order
        np.testing.assert_allclose(gradient(kind, own), expected, rtol=1e-10, atol=1e-10)
    for used in (loss, lambda p, x: loss(varying(p), x)):
        with pytest.raises(ValueError, match="used 2 times"):
            gradient("outer", False, used)


def test_no_tokens():
    """An empty batch: an outer product of no rows, in a compiled function too."""
    g = jax.jit(oplora_jax.grad(layer(normal(3, 0, N))[0], "outer"))(low_rank())
    np.testing.assert_array_equal(to_dense(g), jnp.zeros((N, M)))
