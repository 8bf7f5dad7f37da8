"""Arithmetic leaf by leaf on an outer product: multiplying by a number is right, anything else is refused."""

import functools
import gc

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import oplora_jax
from benchmarks.counts import instructions
from oplora_jax import LowRank, OuterProduct, seal, to_dense
from oplora_jax.matrix import left_product, right_product, thin_factors, transposed
from tests.arrays import f64, normal

TOKENS, N, M = 7, 6, 5
BROKEN = "added to others, averaged, or changed"


def outer(seed=0, batch=(), tokens=TOKENS, dtype=None):
    return OuterProduct(
        normal(seed, *batch, tokens, N, dtype=dtype), normal(seed + 1, *batch, tokens, M, dtype=dtype)
    )


def times(c, gradient):
    return jax.tree.map(lambda z: (c * z).astype(z.dtype), gradient)


def plus(*gradients):
    return jax.tree.map(lambda *z: sum(z), *gradients)


def dense(gradient):
    """Of an unscaled one, by NumPy in float64."""
    return np.swapaxes(f64(gradient.x), -1, -2) @ f64(gradient.dy)


@given(
    c=st.sampled_from([1024.0, 1 / 1024, -0.3, 1e-12, 1e12, 0.0, 1.0]),
    batch=st.sampled_from([(), (3,), (2, 2)]),
    tokens=st.sampled_from([1, 7, 100]),
)
def test_scaling_is_right(c, batch, tokens):
    """In everything that reads an outer product."""
    gradient = outer(batch=batch, tokens=tokens)
    expected, scaled = c * dense(gradient), times(c, gradient)
    left, right = normal(5, *batch, 2, N), normal(6, *batch, M, 2)
    found = {
        "to_dense": to_dense(scaled),
        "transposed": jnp.swapaxes(to_dense(transposed(scaled)), -1, -2),
        "thin_factors": jnp.einsum("...kn,...km->...nm", *thin_factors(scaled)),
        "norm": oplora_jax.frobenius_norm(scaled),
        "left": left_product(left, scaled),
        "right": right_product(scaled, right),
        "twice": to_dense(times(0.5, times(2.0, scaled))),
        "clipped": to_dense(oplora_jax.clip_by_global_norm(jnp.inf).update(scaled, optax.EmptyState())[0]),
    }
    wanted = dict.fromkeys(found, expected) | {
        "norm": np.linalg.norm(expected, axis=(-2, -1)),
        "left": f64(left) @ expected,
        "right": expected @ f64(right),
    }
    for name, got in found.items():
        # float32: sums of up to 100 products, each factor scaled and rounded once more than without
        bound = 1e-5 * abs(c) * np.sqrt(tokens) * 10
        np.testing.assert_allclose(got, wanted[name], rtol=1e-4, atol=bound, err_msg=name)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("c", [1 / 3, 100.0])
def test_scaling_in_less_than_float32(dtype, c):
    gradient = outer(dtype=dtype)
    got = f64(to_dense(times(c, gradient)))
    # The scaled entries of both factors are rounded, to 8 bits in bfloat16
    assert np.linalg.norm(got - c * dense(gradient)) < 1e-2 * np.linalg.norm(c * dense(gradient))


def test_a_loss_scale_is_undone_by_optax():
    loss = lambda p, x: 1024 * jnp.sum(jnp.sin(oplora_jax.lora_dot(x, normal(3, N, M), p)))
    p, x = LowRank(normal(1, N, 2), normal(2, 2, M)), normal(4, 2, N)
    gradient = oplora_jax.grad(loss, "outer")(p, x)
    tx = optax.chain(optax.scale(1 / 1024), oplora_jax.oplora(0.1))
    plain = oplora_jax.grad(lambda p, x: loss(p, x) / 1024, "dense")(p, x)
    got, _ = tx.update(gradient, tx.init(p), p)
    want, _ = oplora_jax.oplora(0.1).update(plain, oplora_jax.oplora(0.1).init(p), p)
    chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-6)  # float32, through a solve


CHANGED = {
    "a sum": lambda g: plus(g, outer(2)),
    "a mean": lambda g: times(0.5, plus(g, outer(2))),
    "a difference": lambda g: plus(g, times(-1.0, outer(2))),
    "a moving average": lambda g: plus(times(0.99, outer(2)), times(0.01, g)),
    "itself, of another step's scale": lambda g: plus(g, times(3.0, outer(2))),
    "a sum of five": lambda g: plus(g, *map(outer, (2, 4, 6, 8))),
    "clipped": lambda g: optax.clip(0.5).update(g, optax.EmptyState())[0],
    "its signs": lambda g: jax.tree.map(jnp.sign, g),
    "Adam's": lambda g: optax.scale_by_adam().update(g, optax.scale_by_adam().init(g))[0],
}


@pytest.mark.parametrize("case", CHANGED)
def test_anything_else_is_refused(case):
    """Outside of compiled programs by an error; nothing in them is taken for a number."""
    changed = CHANGED[case](outer())
    uses = [
        to_dense,
        oplora_jax.frobenius_norm,
        oplora_jax.global_norm,
        functools.partial(left_product, normal(5, 2, N)),
    ]
    for use in uses:
        with pytest.raises(ValueError, match=BROKEN):
            use(changed)
        assert jnp.isnan(jax.jit(use)(changed)).all()
    with pytest.raises(ValueError, match=BROKEN):
        to_dense(transposed(changed))


def test_one_of_a_stack_is_refused():
    """The others are right."""
    stack = outer(batch=(3,))
    changed = jax.tree.map(lambda z, w: z.at[1].add(w[1]), stack, outer(2, batch=(3,)))
    got = jax.jit(to_dense)(changed)
    assert jnp.isnan(got[1]).all()
    np.testing.assert_allclose(got[::2], dense(stack)[::2], rtol=1e-4, atol=1e-5)  # float32


def test_a_sum_of_equal_ones_is_right():
    """As over devices that have the same batch."""
    # float32, sums of 7 products
    np.testing.assert_allclose(to_dense(plus(outer(), outer())), 2 * dense(outer()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("alike", [0.0, 0.9, 0.99, 0.9999, 1.0])
@pytest.mark.parametrize("rows", [1, 64])
def test_sums_of_inputs_that_are_much_alike(dtype, alike, rows):
    """Refused, or right up to what rounding does."""
    draw = lambda seed, *shape: normal(seed, *shape, dtype=jnp.float32)
    mix = lambda seed, *shape: alike**0.5 * draw(0, *shape) + (1 - alike) ** 0.5 * draw(seed, *shape)
    terms = [
        OuterProduct(mix(k, rows, 256).astype(dtype), mix(k + 1, rows, 128).astype(dtype)) for k in (1, 3)
    ]
    expected = sum(map(dense, terms)) / 2
    got = f64(jax.jit(to_dense)(times(0.5, plus(*terms))))
    error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
    # Twice the 2^-8 of bfloat16 and a little
    assert np.isnan(got).all() or error < (2e-2 if jnp.finfo(dtype).bits < 32 else 1e-3)
    assert alike > 0.9 or np.isnan(got).all()


def test_one_row_that_differs_is_seen():
    one = outer(tokens=96)
    other = OuterProduct(one.x.at[1].set(0.5), one.dy.at[1].add(1.0))
    with pytest.raises(ValueError, match=BROKEN):
        to_dense(plus(one, other))


def test_the_mean_over_devices_is_refused():
    x, dy = normal(0, 4, TOKENS, N), normal(1, 4, TOKENS, M)
    mean = jax.vmap(lambda x, dy: jax.lax.pmean(OuterProduct(x, dy), "devices"), axis_name="devices")
    with pytest.raises(ValueError, match=BROKEN):
        to_dense(mean(x, dy))
    mesh = jax.make_mesh((4,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    local = lambda x, dy: jax.lax.pmean(OuterProduct(x[0], dy[0]), "devices")
    mapped = jax.shard_map(local, mesh=mesh, in_specs=(spec("devices"), spec("devices")), out_specs=spec())
    assert jnp.isnan(jax.jit(lambda *at: to_dense(mapped(*at)))(x, dy)).all()


def test_what_is_not_finite_is_not_taken_for_a_sum():
    """A step is then skipped for what it is."""
    for bad in (jnp.inf, jnp.nan):
        gradient = OuterProduct(normal(0, TOKENS, N).at[0, 0].set(bad), normal(1, TOKENS, M))
        assert not jnp.isfinite(to_dense(gradient)).all()


def test_next_to_nothing_may_be_scaled_up():
    gradient = times(1e25, OuterProduct(normal(0, TOKENS, N), 1e-30 * normal(1, TOKENS, M)))
    expected = 1e-5 * dense(outer())
    # float32: 1e-30 * dy is rounded, then scaled
    np.testing.assert_allclose(to_dense(gradient), expected, rtol=1e-3, atol=1e-9)


def test_the_moments_of_scaled_tokens():
    """Of c times the loss: x as it was, dy times c."""
    gradient, c = outer(), 0.2
    by_loss = OuterProduct(gradient.x, c * gradient.dy)
    for structure in ("diagonal", "dense"):
        of = functools.partial(oplora_jax.metrics.kfac_moments, structure=structure, loss_reduction="mean")
        chex.assert_trees_all_close(of(times(c, gradient)), of(by_loss), rtol=1e-5)  # float32
        of = functools.partial(oplora_jax.metrics.shampoo_moments, structure=structure, loss_reduction="mean")
        chex.assert_trees_all_close(of(times(c, gradient)), of(by_loss), rtol=1e-4, atol=1e-5)  # float32


def test_moments_of_dense_gradients_add_up():
    """A DenseGradient is right under sums and means, leaf by leaf, as well."""
    loss = lambda p, x: jnp.mean(jnp.sin(oplora_jax.lora_dot(x, normal(3, N, M), p)))
    p, x = LowRank(normal(1, N, 2), normal(2, 2, M)), normal(4, 8, N)
    gradient = oplora_jax.grad(loss, "dense", moments="diagonal")
    of = functools.partial(oplora_jax.metrics.kfac_moments, structure="diagonal", loss_reduction="mean")
    mean = times(0.5, plus(gradient(p, x[:4]), gradient(p, x[4:])))
    for c in (1.0, 1024.0):
        whole = oplora_jax.grad(lambda *at, c=c: c * loss(*at), "dense", moments="diagonal")(p, x)
        # float32, sums over 8 tokens
        chex.assert_trees_all_close(to_dense(times(c, mean)), to_dense(whole), rtol=1e-4, atol=1e-4)
        chex.assert_trees_all_close(of(times(c, mean)), of(whole), rtol=1e-4, atol=1e-6)


def test_leaves_for_a_moment_cost_nothing():
    """As `nnx.Optimizer` makes them: the compiled program is that of the gradient without a detour."""
    x, dy = normal(0, 5, 3), normal(1, 5, 4)
    straight = jax.jit(lambda x, dy: to_dense(OuterProduct(x, dy)))
    detour = jax.jit(lambda x, dy: to_dense(jax.tree.map(lambda z: z, OuterProduct(x, dy))))
    counts = [instructions(f.lower(x, dy).compile()) for f in (straight, detour)]
    assert counts[0] == counts[1]
    scaled = jax.jit(lambda x, dy: to_dense(jax.tree.map(lambda z: 2 * z, OuterProduct(x, dy))))
    np.testing.assert_allclose(scaled(x, dy), 2 * x.T @ dy, rtol=1e-6)  # float32


def test_what_is_known_of_a_seal_goes_with_it():
    before = len(seal._made)
    leaves = jax.tree.leaves(OuterProduct(normal(0, 5, 3), normal(1, 5, 4)))
    assert len(seal._made) == before + 1
    del leaves
    gc.collect()
    assert len(seal._made) == before
