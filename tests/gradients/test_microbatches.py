"""The gradient gathered over microbatches is that of the whole batch."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import oplora_jax
from oplora_jax import DenseGradient, LowRank, OuterProduct, lora_dot, to_dense
from oplora_jax.metrics import kfac_moments
from oplora_jax.nnx import LoRALinear
from oplora_jax.nnx import value_and_grad as nnx_value_and_grad
from tests.arrays import normal

N, M, R, LAYERS, BATCH = 6, 5, 2, 3, 8


def low_rank(m=M, batch=()):
    return LowRank(normal(0, *batch, N, R), normal(1, *batch, R, m), 2.0)


def one_layer(params, x, y):
    prediction = lora_dot(x, normal(2, N, M), params["lora"]) + params["bias"][None, None]
    return jnp.mean((jnp.tanh(prediction) - y) ** 2)


def used_twice(params, x, y):
    return one_layer(params, x, y) + one_layer(params, x[..., ::-1], y)


def merged(params, x, y):
    return jnp.mean((jnp.tanh(x @ to_dense(params["lora"])) + params["bias"][None, None] - y) ** 2)


def scanned(params, x, y):
    body = lambda h, layer: (jnp.tanh(lora_dot(h, *layer)), None)
    h = jax.lax.scan(jax.checkpoint(body), x, (normal(2, LAYERS, N, N), params["layers"]))[0]
    return jnp.mean((h @ normal(3, N, M) + params["bias"][None, None] - y) ** 2)


ONE = {"lora": low_rank(), "bias": normal(4, M)}
STACK = {"layers": low_rank(N, (LAYERS,)), "bias": normal(4, M)}
LOSSES = {
    "one layer, outer": (one_layer, ONE, {"gradient": "outer"}),
    "one layer, dense": (one_layer, ONE, {"gradient": "dense"}),
    "one layer, diagonal moments": (one_layer, ONE, {"gradient": "dense", "moments": "diagonal"}),
    "one layer, dense moments": (one_layer, ONE, {"gradient": "dense", "moments": "dense"}),
    "used twice": (used_twice, ONE, {}),
    "merged": (merged, ONE, {}),
    "scan of layers, outer": (scanned, STACK, {"gradient": "outer"}),
    "scan of layers, dense": (scanned, STACK, {"gradient": "dense", "moments": "diagonal"}),
}


DATA = lambda: (normal(5, BATCH, 3, N), normal(6, BATCH, 3, M))


def formed(gradients):
    """The tree with its gradients formed, and what K-FAC makes of each."""
    exact = lambda g: isinstance(g, OuterProduct | DenseGradient)
    form = lambda g: (to_dense(g), kfac_moments(g, "diagonal", "mean")) if exact(g) else g
    return jax.tree.map(form, gradients, is_leaf=exact)


@pytest.mark.parametrize("case", LOSSES)
def test_gradients_are_those_of_the_whole_batch(case, x64):
    loss_fn, params, settings = LOSSES[case]
    params, x, y = jax.tree.map(lambda z: z.astype(jnp.float64), (params, *DATA()))
    run = lambda k: jax.jit(oplora_jax.value_and_grad(loss_fn, **settings, microbatches=k))(params, x, y)
    value, expected = run(None)
    for k in (1, 2, 8):
        got_value, got = run(k)
        chex.assert_trees_all_equal_shapes_and_dtypes(got, expected)
        # float64: sums in another order
        actual, wanted = (got_value, formed(got)), (value, formed(expected))
        chex.assert_trees_all_close(actual, wanted, rtol=1e-12, atol=1e-14)


def per_example(loss_fn, params, x, y):
    if loss_fn is scanned:
        body = lambda h, layer: (jnp.tanh(lora_dot(h, *layer)), None)
        h = jax.lax.scan(jax.checkpoint(body), x, (normal(2, LAYERS, N, N), params["layers"]))[0] @ normal(
            3, N, M
        )
    elif loss_fn is merged:
        h = jnp.tanh(x @ to_dense(params["lora"]))
    else:
        h = jnp.tanh(lora_dot(x, normal(2, N, M), params["lora"]))
        h = (
            h + jnp.tanh(lora_dot(x[..., ::-1], normal(2, N, M), params["lora"]))
            if loss_fn is used_twice
            else h
        )
    return jnp.mean((h + params["bias"][None, None] - y) ** 2, axis=(1, 2))


COUNTS = {
    "uneven": [1, 0, 1, 1, 0, 1, 1, 0],
    "some empty": [1, 1, 0, 0.5, 0, 0, 0, 0],
}


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("case", LOSSES)
def test_a_mean_over_what_counts(case, counts, x64):
    """All are those of the whole batch, also where nothing counts in a microbatch."""
    loss_fn, params, settings = LOSSES[case]
    params, x, y, counts = jax.tree.map(jnp.float64, (params, *DATA(), jnp.asarray(COUNTS[counts])))

    def mean(params, x, y, counts):
        losses = per_example(loss_fn, params, x, y)
        return jnp.sum(losses * counts) / jnp.sum(counts), jnp.sum(counts)

    weight = lambda x, y, counts: jnp.sum(counts)
    run = lambda k: jax.jit(
        oplora_jax.value_and_grad(mean, **settings, has_aux=True, microbatches=k, weight=weight)
    )(params, x, y, counts)
    (value, _), expected = run(None)
    for k in (4, 8) if case == "one layer, outer" else (4,):
        (got_value, aux), got = run(k)
        chex.assert_trees_all_equal_shapes_and_dtypes(got, expected)
        # float64: sums in another order
        actual, wanted = (got_value, formed(got)), (value, formed(expected))
        chex.assert_trees_all_close(actual, wanted, rtol=1e-12, atol=1e-14)
        np.testing.assert_array_equal(aux, counts.reshape(-1, k).sum(0))


def test_a_count_by_keyword_and_of_integers():
    """Counts may be of any type, and the batch's weight may come with keyword arguments."""
    mean = lambda p, x, mask, *, w: (
        jnp.sum(jnp.sum(lora_dot(x, w, p) ** 2, -1) * mask) / jnp.sum(mask * w[0, 0])
    )
    x, mask, w = normal(5, BATCH, N), jnp.arange(BATCH) < 3, jnp.ones((N, M))
    settings = {"microbatches": 4, "weight": lambda x, mask, w: mask.sum() * w[0, 0]}
    for count in (mask, mask.astype(jnp.int32), mask.astype(jnp.bfloat16)):
        got = oplora_jax.grad(mean, **settings)(low_rank(), x, count, w=w)
        expected = oplora_jax.grad(mean)(low_rank(), x, count, w=w)
        chex.assert_trees_all_close(to_dense(got), to_dense(expected), rtol=1e-5)  # float32 sums of 8 rows
    with pytest.raises(
        ValueError, match=r"weight returns an array \(2,\) for a microbatch; expected a scalar"
    ):
        oplora_jax.grad(mean, microbatches=4, weight=lambda x, mask, w: mask)(low_rank(), x, mask, w=w)


def test_nothing_counts():
    """In a microbatch: a warning, and NaN that shows. In the whole batch: NaN as without microbatches."""
    mean = lambda p, x, mask: jnp.sum(jnp.mean(lora_dot(x, jnp.ones((N, M)), p), -1) * mask) / jnp.sum(mask)
    x, mask = normal(5, BATCH, N), (jnp.arange(BATCH) < 3) * 1.0
    with pytest.warns(UserWarning, match=r"NaN in microbatches \[3\], .*weight="):
        value, gradient = oplora_jax.value_and_grad(mean, microbatches=4)(low_rank(), x, mask)
    assert jnp.isnan(value) and jnp.isnan(to_dense(gradient)).all()
    value, gradient = jax.jit(oplora_jax.value_and_grad(mean, microbatches=4))(low_rank(), x, mask)
    assert jnp.isnan(value) and jnp.isnan(to_dense(gradient)).all()
    run = jax.jit(oplora_jax.value_and_grad(mean, microbatches=4, weight=lambda x, mask: mask.sum()))
    value, gradient = run(low_rank(), x, 0 * mask)
    assert jnp.isnan(value) and jnp.isnan(to_dense(gradient)).all()
    # What is NaN itself, in a microbatch that counts, stays one.
    value, gradient = run(low_rank(), x.at[0].set(jnp.nan), mask)
    assert jnp.isnan(value) and jnp.isnan(to_dense(gradient)).any()


def test_a_mean_over_what_counts_in_nnx():
    model, (x, y), counts = LoRALinear(N, M, R, rngs=nnx.Rngs(0)), DATA(), jnp.asarray(COUNTS["some empty"])
    mean = lambda model, x, y, counts: jnp.sum(jnp.mean((model(x) - y) ** 2, (1, 2)) * counts) / counts.sum()
    value, expected = nnx_value_and_grad(mean)(model, x, y, counts)
    for transform in (lambda f: f, nnx.jit):
        step = nnx_value_and_grad(mean, microbatches=4, weight=lambda x, y, counts: counts.sum())
        got_value, got = transform(step)(model, x, y, counts)
        # float32 sums of 24 rows
        actual, wanted = (
            (got_value, to_dense(got["lora"].get_value())),
            (value, to_dense(expected["lora"].get_value())),
        )
        chex.assert_trees_all_close(actual, wanted, rtol=1e-4, atol=1e-6)


def test_what_is_split_and_what_is_not():
    """Nested arrays and NumPy's are split, every k-th row; other leaves and keyword arguments are not."""
    seen = []

    def loss_fn(p, batch, flag, none, *, weights):
        seen.append((batch["x"].shape, batch["y"][0].shape, flag, none, weights.shape))
        loss = jnp.mean(lora_dot(batch["x"], weights, p)) * flag + jnp.mean(batch["y"][0])
        return loss, {"rows": batch["y"][0], "mean": loss}

    batch = {"x": normal(5, BATCH, N), "y": (np.arange(BATCH, dtype=np.float32),)}
    differentiate = oplora_jax.grad(loss_fn, has_aux=True, microbatches=4)
    gradient, aux = differentiate(low_rank(), batch, 2.0, None, weights=normal(2, N, M))
    assert set(seen) == {((2, N), (2,), 2.0, None, (N, M))}
    np.testing.assert_array_equal(aux["rows"], [[0, 4], [1, 5], [2, 6], [3, 7]])
    assert aux["mean"].shape == (4,)
    whole, _ = oplora_jax.grad(loss_fn, has_aux=True)(low_rank(), batch, 2.0, None, weights=normal(2, N, M))
    chex.assert_trees_all_close(to_dense(gradient), to_dense(whole), rtol=1e-5)  # float32 sums of 8 rows


def test_auto_counts_the_tokens_of_the_whole_batch():
    """Few tokens are cheaper as an outer product; k times as many are not."""
    loss_fn = lambda p, x: jnp.sum(lora_dot(x, jnp.ones((8, 8)), p))
    p, x = LowRank(jnp.ones((8, 4)), jnp.ones((4, 8))), jnp.ones((16, 8))
    for tokens, k, outer in [(4, None, True), (16, None, False), (16, 4, False), (4, 2, True)]:
        kind = jax.eval_shape(oplora_jax.grad(loss_fn, microbatches=k), p, x[:tokens])
        assert isinstance(kind, OuterProduct) == outer


def test_sums_are_taken_in_float32():
    """512 gradients of 1 / 512 each add up to less than 1 in bfloat16."""
    ones = lambda *shape: jnp.ones(shape, jnp.bfloat16)
    params = {"lora": LowRank(ones(2, 1), ones(1, 2)), "bias": ones()}

    def loss_fn(p, x):
        y = lora_dot(x, jnp.zeros((2, 2), jnp.bfloat16), p["lora"])
        return jnp.mean(jnp.sum(y, axis=-1)) + p["bias"] * jnp.mean(x)

    differentiate = oplora_jax.value_and_grad(loss_fn, "dense", microbatches=512)
    value, gradient = jax.jit(differentiate)(params, ones(512, 2))
    chex.assert_trees_all_equal(gradient, {"lora": ones(2, 2), "bias": ones()})
    assert value.dtype == jnp.bfloat16 and value == 5


def test_activations_of_one_microbatch_alone_are_kept():
    """By XLA's own count."""
    layers, width, tokens = 4, 128, 2048
    params = [LowRank(jnp.ones((width, 2)), jnp.ones((2, width))) for _ in range(layers)]

    def loss_fn(params, x):
        for p in params:
            x = jnp.tanh(lora_dot(x, jnp.ones((width, width)), p))
        return jnp.mean(x**2)

    def temporary(k):
        differentiate = oplora_jax.grad(loss_fn, "dense", microbatches=k)
        compiled = jax.jit(differentiate).lower(params, jnp.ones((tokens, width))).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    whole, parts = temporary(None), temporary(4)
    print(f"\ntemporary memory: {whole} bytes, in 4 microbatches {parts}")
    assert parts < 0.6 * whole


def loss_of_rows(p, x, y=None, **kwargs):
    return jnp.mean(lora_dot(x, normal(2, N, M), p))


ERRORS = {
    "not divisible": ((normal(5, 6, N),), {}, r"microbatches=4 does not divide .*\(argument 1: 6\)"),
    "sizes that differ": (
        ({"x": normal(5, 8, N)}, normal(6, N, M)),
        {},
        r"must agree; they are argument 1\['x'\]: 8, argument 2: 6; pass .* by keyword",
    ),
    "a scalar": (
        (normal(5, 8, N), jnp.ones(())),
        {},
        r"argument 1: 8, argument 2: no axis; pass .* is not split$",
    ),
    "a random key": ((normal(5, 8, N), jax.random.key(0)), {}, r"argument 2: no axis; pass .*one key a row$"),
    "nothing to split": ((), {"x": normal(5, 8, N)}, "nothing to split: the arrays in the positional"),
    "nothing but numbers": ((1.0, "mean"), {}, "nothing to split"),
}


@pytest.mark.parametrize("args, kwargs, message", ERRORS.values(), ids=ERRORS.keys())
def test_batches_that_cannot_be_split(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        oplora_jax.value_and_grad(loss_of_rows, microbatches=4)(low_rank(), *args, **kwargs)


@pytest.mark.parametrize("k", [0, -1])
def test_a_number_that_is_not_positive(k):
    with pytest.raises(ValueError, match=f"microbatches is {k}; expected a positive number"):
        oplora_jax.value_and_grad(loss_of_rows, microbatches=k)


def test_of_single_examples_and_over_devices():
    """Inside vmap and inside shard_map."""
    x = normal(5, 2, BATCH, N)
    differentiate = oplora_jax.grad(loss_of_rows, "dense", microbatches=2)
    expected = [oplora_jax.grad(loss_of_rows, "dense")(low_rank(), z) for z in x]
    # float32 sums of eight rows
    got = jax.jit(jax.vmap(differentiate, (None, 0)))(low_rank(), x)
    chex.assert_trees_all_close(got, jnp.stack(expected), rtol=1e-5, atol=1e-6)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    on_each = jax.shard_map(
        lambda p, x: differentiate(p, x[0]), mesh=mesh, in_specs=(spec(), spec("data")), out_specs=spec()
    )
    chex.assert_trees_all_close(jax.jit(on_each)(low_rank(), x), sum(expected), rtol=1e-5, atol=1e-6)


class Model(nnx.Module):
    """With everything that changes in a forward pass."""

    def __init__(self, rngs):
        self.first = LoRALinear(N, 8, rank=R, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.second = LoRALinear(8, M, rank=R, rngs=rngs)

    def __call__(self, x):
        return self.second(self.dropout(nnx.tanh(self.norm(self.first(x)))))


def test_nnx_state_goes_from_each_microbatch_to_the_next():
    x, y = normal(5, BATCH, N), normal(6, BATCH, M)
    loss_fn = lambda model, x, y: (jnp.mean((model(x) - y) ** 2), jnp.sum(x))
    settings = {"gradient": "dense", "has_aux": True}
    one, other = Model(nnx.Rngs(0)), Model(nnx.Rngs(0))
    (value, aux), gradients = nnx.jit(nnx_value_and_grad(loss_fn, **settings, microbatches=2))(one, x, y)
    step = nnx.jit(nnx_value_and_grad(loss_fn, **settings))
    results = [step(other, x[i::2], y[i::2]) for i in range(2)]
    # float32 rounding, of sums in another order
    close = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-6)
    close(value, sum(loss for (loss, _), _ in results) / 2)
    close(aux, jnp.stack([aux for (_, aux), _ in results]))
    mean = jax.tree.map(lambda *z: sum(z) / 2, *(nnx.to_pure_dict(g) for _, g in results))
    close(nnx.to_pure_dict(gradients), mean)
    data = lambda model: jax.tree.map(
        lambda z: jax.random.key_data(z) if jnp.issubdtype(z.dtype, jax.dtypes.prng_key) else z,
        nnx.to_pure_dict(nnx.state(model)),
    )
    close(data(one), data(other))
    assert not np.allclose(one.norm.mean[...], 0)
