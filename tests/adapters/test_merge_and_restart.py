import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import oplora_jax
import oplora_jax.nnx
from oplora_jax import LowRank, is_low_rank, lora_dot, merge_and_restart, merge_and_restart_layers, to_dense
from oplora_jax.linen import LoRADense
from tests.arrays import f64, normals
from tests.optimizers.cases import signature


def model(dtype):
    """(params, lora) of two layers; the increments are as large as the kernels."""
    normal = normals(0, dtype)
    params = {"in": {"kernel": normal(8, 6), "bias": normal(6)}, "out": {"kernel": normal(6, 4)}}
    lora = {
        "in/kernel": LowRank(normal(8, 2), normal(2, 6), 2.0),
        "out/kernel": LowRank(normal(6, 1), normal(1, 4), 0.5),
    }
    return params, lora


def apply(params, lora, x):
    x = jnp.tanh(lora_dot(x, params["in"]["kernel"], lora["in/kernel"]) + params["in"]["bias"].reshape(1, -1))
    return lora_dot(x, params["out"]["kernel"], lora["out/kernel"])


# Kernels with entries of up to 8 are rounded to eps of theirs, and summed over 8 inputs.
@pytest.mark.parametrize("dtype, atol", [(jnp.bfloat16, 0.3), (jnp.float32, 1e-5)])
def test_the_function_does_not_change(dtype, atol):
    params, lora = model(dtype)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((5, 8)), dtype)
    merged, fresh = jax.jit(merge_and_restart)(jax.random.key(0), params, lora)
    assert signature((merged, fresh)) == signature((params, lora))
    before, after = apply(params, lora, x), apply(merged, fresh, x)
    np.testing.assert_allclose(f64(after), f64(before), rtol=0, atol=atol)
    assert np.abs(f64(after) - f64(apply(params, fresh, x))).max() > 1  # the increments do matter
    chex.assert_trees_all_equal(merged["in"]["bias"], params["in"]["bias"])
    for path, one in fresh.items():
        layer = path.split("/")[0]
        moved = f64(merged[layer]["kernel"]) - f64(params[layer]["kernel"])
        np.testing.assert_allclose(moved, f64(to_dense(lora[path])), rtol=0, atol=atol)
        assert not np.any(one.b) and one.scale == lora[path].scale
        assert np.linalg.matrix_rank(f64(one.a)) == one.a.shape[-1]
        # As in He's initialisation, and not what it was.
        assert np.abs(f64(one.a)).max() <= np.sqrt(6 / one.a.shape[0]) * 1.01
        assert np.any(one.a != lora[path].a)


def test_the_function_does_not_change_at_all_from_a_fresh_start():
    params, lora = model(jnp.float32)
    x = jnp.ones((3, 8))
    params, lora = merge_and_restart(jax.random.key(0), params, lora)
    again, fresh = merge_and_restart(jax.random.key(1), params, lora)
    chex.assert_trees_all_equal(again, params)  # to the bit: b was zero
    chex.assert_trees_all_equal(apply(again, fresh, x), apply(params, lora, x))
    assert np.any(fresh["in/kernel"].a != lora["in/kernel"].a)  # another key, other directions
    same = merge_and_restart(jax.random.key(1), params, lora)[1]
    chex.assert_trees_all_equal(same, fresh)


def chained(tx, period, num_steps, keep_state=False):
    """The distance to a target of rank 4, after LoRA of rank 1 that is merged every so many steps."""
    normal = normals(0, jnp.float32)
    target = normal(8, 4) @ normal(4, 8)
    params = {"kernel": jnp.zeros((8, 8))}
    lora = oplora_jax.init_lora(jax.random.key(0), params, 1, "kernel", alpha=2)
    loss = lambda lora, params: jnp.sum((oplora_jax.merge(params, lora)["kernel"] - target) ** 2) / 2

    def restart(key, params, lora, state):
        params, lora = merge_and_restart(key, params, lora)
        return params, lora, state if keep_state else tx.init(lora)

    def step(carry, count):
        params, lora, state = carry
        updates, state = tx.update(oplora_jax.grad(loss)(lora, params), state, lora)
        lora = optax.apply_updates(lora, updates)
        key = jax.random.fold_in(jax.random.key(1), count)
        keep = lambda key, *trees: trees
        return jax.lax.cond((count + 1) % period == 0, restart, keep, key, params, lora, state), None

    start = params, lora, tx.init(lora)
    params, lora, _ = jax.jit(lambda: jax.lax.scan(step, start, jnp.arange(num_steps))[0])()
    error = f64(oplora_jax.merge(params, lora)["kernel"]) - f64(target)
    return np.linalg.norm(error), np.linalg.svd(f64(target), compute_uv=False)


def test_a_chain_fits_what_one_increment_cannot():
    tx = oplora_jax.oplora(0.3, momentum=0.3)
    alone, values = chained(tx, 10**6, 300)
    # One increment of rank one leaves the other singular values, as it must.
    np.testing.assert_allclose(alone, np.linalg.norm(values[1:]), rtol=0.01)
    for keep_state in (False, True):
        distance, _ = chained(tx, 30, 300, keep_state)
        assert distance < 0.01 * alone


class Net(nn.Module):
    """LoRA layers at two depths, beside a plain one."""

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(LoRADense(6, rank=2, alpha=4, name="first")(x))
        return LoRADense(4, rank=1)(nn.Dense(5)(x))


def randomized(tree):
    """Every b as it may be after training."""
    draw = lambda p: p.with_factors(p.a, jax.random.normal(jax.random.key(3), p.b.shape))
    return jax.tree.map(lambda p: draw(p) if is_low_rank(p) else p, tree, is_leaf=is_low_rank)


def test_linen_layers():
    x = jax.random.normal(jax.random.key(2), (5, 8))
    variables = randomized(Net().init(jax.random.key(0), x))
    after = jax.jit(merge_and_restart_layers)(jax.random.key(1), variables)
    assert signature(after) == signature(variables)
    # float32, products near 10
    np.testing.assert_allclose(Net().apply(after, x), Net().apply(variables, x), rtol=0, atol=1e-4)
    params, fresh = variables["params"], after["params"]
    chex.assert_trees_all_equal(fresh["Dense_0"], params["Dense_0"])
    for layer in ("first", "LoRADense_0"):
        assert not np.any(fresh[layer]["lora"].b) and np.any(params[layer]["lora"].b)
        moved = fresh[layer]["kernel"] - params[layer]["kernel"]
        np.testing.assert_allclose(moved, to_dense(params[layer]["lora"]), rtol=0, atol=1e-5)


def test_nnx_layers():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.inner = oplora_jax.nnx.LoRALinear(8, 6, rank=2, alpha=4, rngs=rngs)
            self.head = nnx.Linear(6, 3, rngs=rngs)

        def __call__(self, x):
            return self.head(jnp.tanh(self.inner(x)))

    model = Model(nnx.Rngs(0))
    nnx.update(model, randomized(nnx.state(model)))
    x = jax.random.normal(jax.random.key(2), (5, 8))
    before = model(x)
    nnx.update(model, merge_and_restart_layers(jax.random.key(1), nnx.state(model)))
    np.testing.assert_allclose(model(x), before, rtol=0, atol=1e-4)  # float32
    assert not np.any(model.inner.lora.get_value().b)


class Everything(nn.Module):
    """Kernels of more axes: in the order of their matrix and not, in a box and not."""

    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.normal(), ("embed", "mlp"))
        x = LoRADense(6, rank=2, kernel_init=init)(x)
        x = oplora_jax.linen.LoRAEinsum((6, 6), "btd,hd->bth", rank=2, name="square")(x)
        x = oplora_jax.linen.LoRAEinsum((3, 6, 2), "btd,ndh->btnh", rank=2, name="heads")(x)
        x = oplora_jax.linen.LoRADenseGeneral(5, axis=(-2, -1), rank=2)(x)
        x = oplora_jax.linen.LoRAConv(4, (3,), rank=2)(x)
        return oplora_jax.linen.LoRAConvTranspose(4, (2,), transpose_kernel=True, rank=2)(x)


def test_linen_kernels_of_all_kinds():
    x = jax.random.normal(jax.random.key(2), (2, 5, 8))
    variables = randomized(jax.jit(Everything().init)(jax.random.key(0), x))
    after = jax.jit(merge_and_restart_layers)(jax.random.key(1), variables)
    assert signature(after) == signature(variables)
    before, got = (jax.jit(Everything().apply)(z, x) for z in (variables, after))
    # float32, through six layers
    np.testing.assert_allclose(got, before, rtol=1e-4, atol=1e-5 * np.abs(before).max())
    chex.assert_trees_all_close(oplora_jax.linen.merge(after), oplora_jax.linen.merge(variables))


def test_a_loraized_nnx_model():
    """Einsum kernels that reshaping does not make a matrix: one of them is square."""
    rngs = nnx.Rngs(0)
    stack = nnx.vmap(lambda rngs: nnx.Einsum("btd,hd->bth", (6, 6), rngs=rngs), in_axes=0, out_axes=0)
    stack = nnx.split_rngs(splits=2)(stack)
    layers = [
        nnx.Einsum("btd,ndh->btnh", (3, 4, 2), rngs=rngs),
        nnx.LinearGeneral((3, 2), 6, axis=(-2, -1), rngs=rngs),
        nnx.ConvTranspose(6, 6, (2,), transpose_kernel=True, rngs=rngs),
        stack(rngs),
    ]
    model = nnx.List(layers)
    oplora_jax.nnx.loraize(model, 2, "*", rngs=rngs)
    nnx.update(model, randomized(nnx.state(model)))

    @nnx.jit
    def run(model, x):
        *first, stack = model
        for layer in first:
            x = layer(x)
        body = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return body(x, stack)

    x = jax.random.normal(jax.random.key(2), (2, 5, 4))
    before, kernel = run(model, x), model[3].kernel[...]
    nnx.update(model, jax.jit(merge_and_restart_layers)(jax.random.key(1), nnx.state(model)))
    # float32, through five layers
    np.testing.assert_allclose(run(model, x), before, rtol=1e-4, atol=1e-5 * np.abs(before).max())
    assert not any(np.any(layer.lora.get_value().b) for layer in model)
    assert np.abs(model[3].kernel[...] - kernel).max() > 0.1


def test_bad_input():
    params, lora = model(jnp.float32)
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"nowhere/kernel: no such kernel; the paths are: in/bias"):
        merge_and_restart(key, params, {"nowhere/kernel": lora["in/kernel"]})
    with pytest.raises(ValueError, match=r"out/kernel: the kernel is \(6, 4\), its LoRA parameter \(8, 6\)"):
        merge_and_restart(key, params, {"out/kernel": lora["in/kernel"]})
    with pytest.raises(ValueError, match="no LoRA parameter to merge"):
        merge_and_restart_layers(key, params)
    with pytest.raises(ValueError, match="layer/kernel: no such kernel; the paths are: layer/lora"):
        merge_and_restart_layers(key, {"layer": {"lora": lora["in/kernel"]}})
    with pytest.raises(ValueError, match="layer/delta: expected the name 'lora', beside a 'kernel'"):
        merge_and_restart_layers(key, {"layer": {"delta": lora["in/kernel"], "kernel": jnp.ones((8, 6))}})
