"""Types of the captured gradients, and what a layer computes in low precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oplora_jax
from oplora_jax import LowRank, lora_dot, to_dense

KEYS = jax.random.split(jax.random.key(1), 4)
X = jax.random.normal(KEYS[0], (64, 16))
W = jax.random.normal(KEYS[1], (16, 8)) / 4
P = LowRank(jax.random.normal(KEYS[2], (16, 2)), jax.random.normal(KEYS[3], (2, 8)) / 4)


def cast(tree, dtype):
    return jax.tree.map(lambda z: z.astype(dtype), tree)


@pytest.mark.parametrize("kind", ["outer", "dense"])
@pytest.mark.parametrize("lora_dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_types(kind, lora_dtype, dtype):
    """An outer product has the type of the activations; a dense gradient that of the parameter."""
    loss = lambda p, x, w: jnp.mean(jnp.tanh(lora_dot(x, w, p)).astype(jnp.float32))
    p, x, w = cast(P, lora_dtype), X.astype(dtype), W.astype(dtype)
    assert lora_dot(x, w, p).dtype == dtype
    gradient = oplora_jax.grad(loss, kind)(p, x, w)
    expected = dtype if kind == "outer" else lora_dtype
    arrays = (gradient.x, gradient.dy) if kind == "outer" else (gradient,)
    assert {array.dtype for array in arrays} == {jnp.dtype(expected)}
    exact = jax.grad(lambda d: jnp.mean(jnp.tanh(X @ (W + d))))(to_dense(P))
    error = np.linalg.norm(to_dense(gradient) - exact) / np.linalg.norm(exact)
    # bfloat16 keeps 8 bits: 2^-9 an operation, a handful of them in the pass; float32 rounds at 1e-7.
    assert error < (2e-2 if jnp.bfloat16 in (dtype, lora_dtype) else 1e-5)


def test_parameters_cast_inside_the_loss():
    """A model that casts its parameters casts the taps with them; the gradient keeps its own type."""
    loss = lambda p: jnp.sum(lora_dot(X.astype(jnp.bfloat16), W.astype(jnp.bfloat16), cast(p, jnp.bfloat16)))
    assert oplora_jax.grad(loss, "dense")(P).dtype == jnp.float32
    gradient = oplora_jax.grad(loss, "outer")(P)
    np.testing.assert_allclose(
        to_dense(gradient).astype(jnp.float32), np.tile(X.sum(0)[:, None], (1, 8)), atol=0.1, rtol=0.02
    )  # 64 bfloat16 inputs of size 1 are summed


def test_dense_gradient_is_accumulated_in_float32():
    """10,000 equal bfloat16 contributions would stop growing at 256 in a bfloat16 accumulator."""
    x = jnp.ones((10_000, 1), jnp.bfloat16)
    p = LowRank(jnp.ones((1, 1)), jnp.ones((1, 1)))
    loss = lambda p: jnp.sum(lora_dot(x, jnp.ones((1, 1), jnp.bfloat16), p).astype(jnp.float32))
    assert float(oplora_jax.grad(loss, "dense")(p)[0, 0]) == 10_000
