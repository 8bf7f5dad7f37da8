import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oplora_jax
from oplora_jax import LowRank, OuterProduct, lora_dot, to_dense
from oplora_jax.reslora import block_shortcut, input_shortcut, merge_block
from tests.arrays import f64


def stack(dtype, depth=3, size=6, rank=2, batch=()):
    """(x, kernels, increments of scale 2) for layers of one shape."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape) / np.sqrt(size), dtype)
    kernels = [normal(*batch, size, size) for _ in range(depth)]
    loras = [LowRank(normal(*batch, size, rank), normal(*batch, rank, size), 2.0) for _ in range(depth)]
    return normal(*batch, 5, size), kernels, loras


@pytest.mark.parametrize("batch", [(), (3,)])
def test_block_shortcut_by_hand_and_merged(batch, x64):
    x, kernels, loras = stack(jnp.float64, batch=batch)
    y = block_shortcut(x, kernels[0], loras)
    increments = sum(2 * f64(lora.a) @ f64(lora.b) for lora in loras)
    np.testing.assert_allclose(y, f64(x) @ (f64(kernels[0]) + increments), rtol=0, atol=1e-13)  # float64
    merged = merge_block(kernels[0], loras)
    np.testing.assert_allclose(merged, f64(kernels[0]) + increments, rtol=0, atol=1e-14)
    # All of them are one matrix of three times the rank.
    side_by_side = LowRank(
        jnp.concatenate([lora.a for lora in loras], -1), jnp.concatenate([lora.b for lora in loras], -2), 2.0
    )
    np.testing.assert_allclose(y, lora_dot(x, kernels[0], side_by_side), rtol=0, atol=1e-13)
    np.testing.assert_allclose(
        block_shortcut(x, kernels[0], loras[:1]), lora_dot(x, kernels[0], loras[0]), rtol=0, atol=0
    )


@pytest.mark.parametrize("dtype, atol", [(jnp.bfloat16, 0.1), (jnp.float32, 1e-5)])  # eps by a sum near 5
def test_types(dtype, atol):
    x, kernels, loras = stack(dtype)
    y = block_shortcut(x, kernels[0], loras)
    merged = merge_block(kernels[0], loras)
    assert y.dtype == merged.dtype == dtype
    np.testing.assert_allclose(f64(y), f64(x @ merged), rtol=0, atol=atol)
    assert input_shortcut(x, x, kernels[0], loras[0]).dtype == dtype
    wide = jax.tree.map(lambda z: z.astype(jnp.float32), loras)  # increments follow the layer's type
    assert block_shortcut(x, kernels[0], wide).dtype == dtype


def deep(loras, x, kernels, shortcuts=2):
    for layer, kernel in enumerate(kernels):
        x = jnp.tanh(block_shortcut(x, kernel, loras[max(0, layer - shortcuts + 1) : layer + 1]))
    return jnp.sum(x**2)


def test_the_exact_gradient_adds_up_over_the_layers_that_share_an_increment(x64):
    x, kernels, loras = stack(jnp.float64)

    def dense_loss(increments):
        z = x
        for layer, kernel in enumerate(kernels):
            z = jnp.tanh(z @ (kernel + sum(increments[max(0, layer - 1) : layer + 1])))
        return jnp.sum(z**2)

    expected = jax.grad(dense_loss)([to_dense(lora) for lora in loras])
    for gradient in ("dense", "auto"):
        actual = oplora_jax.grad(deep, gradient)(loras, x, kernels)
        for got, want in zip(actual, expected, strict=True):
            np.testing.assert_allclose(to_dense(got), want, rtol=0, atol=1e-12)  # float64
    factors = jax.grad(deep)(loras, x, kernels)
    for got, lora, want in zip(factors, loras, expected, strict=True):
        np.testing.assert_allclose(got.a, 2 * want @ lora.b.T, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="used 2 times"):
        oplora_jax.grad(deep, "outer")(loras, x, kernels)


def test_input_shortcut(x64):
    x, kernels, loras = stack(jnp.float64)
    previous, kernel, lora = x[::-1] ** 2, kernels[0], loras[0]
    y = input_shortcut(x, previous, kernel, lora)
    expected = f64(x) @ f64(kernel) + 2 * (f64(x) + f64(previous)) @ f64(lora.a) @ f64(lora.b)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-13)  # float64
    # Merged exactly where the inputs are proportional, and only there.
    merged = kernel + 1.5 * to_dense(lora)
    np.testing.assert_allclose(input_shortcut(x, x / 2, kernel, lora), x @ merged, rtol=0, atol=1e-13)
    assert np.abs(y - x @ merged).max() > 0.1
    loss = lambda lora: jnp.sum(jnp.sin(input_shortcut(x, previous, kernel, lora)))
    gradient = oplora_jax.grad(loss, "outer")(lora)
    assert isinstance(gradient, OuterProduct)
    np.testing.assert_allclose(
        to_dense(gradient), f64(x + previous).T @ np.cos(f64(y)), rtol=0, atol=1e-13
    )  # (x + x')^T dy


def test_bad_input(unchecked):
    x, kernels, loras = stack(jnp.float32)
    with pytest.raises(ValueError, match="loras is empty"):
        block_shortcut(x, kernels[0], [])
    other = LowRank(jnp.ones((6, 1)), jnp.ones((1, 4)))
    for call in (lambda loras: block_shortcut(x, kernels[0], loras), lambda ls: merge_block(kernels[0], ls)):
        with pytest.raises(ValueError, match=r"loras\[1\] has shape \(6, 4\), the kernel \(6, 6\)"):
            call([loras[0], other])
        with pytest.raises(ValueError, match=r"loras\[1\]: factors a \(6, 2\) and b \(1, 4\) do not fit"):
            call([loras[0], LowRank(loras[0].a, other.b)])
    with pytest.raises(ValueError, match=r"x has shape \(5, 3\); a kernel"):
        block_shortcut(x[:, :3], kernels[0], loras)
    with pytest.raises(ValueError, match=r"x has shape \(5, 6\), previous_x \(4, 6\)"):
        input_shortcut(x, x[:4], kernels[0], loras[0])
    with pytest.raises(ValueError, match=r"kernel has shape \(6, 6\), lora \(6, 4\)"):
        input_shortcut(x, x, kernels[0], other)
