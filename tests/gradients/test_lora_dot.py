"""Without taps `lora_dot` is ordinary JAX: its derivatives of every kind, and what is in the program."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oplora_jax
from oplora_jax import LowRank, lora_dot
from tests.arrays import normal

N, M, R = 6, 5, 2


def operands(tokens):
    return normal(0, tokens, N), normal(1, N, M), normal(2, N, R), normal(3, R, M)


def by_lora_dot(x, kernel, a, b):
    return jnp.sum(jnp.tanh(lora_dot(x, kernel, LowRank(a, b, 2.0))))


def written_out(x, kernel, a, b):
    return jnp.sum(jnp.tanh(x @ (kernel + 2.0 * a @ b)))


# N tokens are few and many: the weights are merged, or not, forward and backward.
@pytest.mark.parametrize("tokens", [1, 50])
@pytest.mark.parametrize("asked", [z for k in (1, 2, 4) for z in itertools.combinations(range(4), k)])
def test_derivatives_are_those_of_the_product(tokens, asked, x64):
    """In reverse, forward, and forward over reverse, by each set of operands."""
    at = operands(tokens)
    along = [normal(4 + i, *at[i].shape) for i in asked]
    put = lambda chosen: [chosen[asked.index(i)] if i in asked else z for i, z in enumerate(at)]
    chosen, results = [at[i] for i in asked], []
    for function in (by_lora_dot, written_out):
        part = lambda *chosen, f=function: f(*put(chosen))
        gradient = jax.grad(part, tuple(range(len(asked))))
        results.append((jax.jvp(part, chosen, along), jax.jvp(gradient, chosen, along)))
    # float64, sums of at most 50 tokens times 6 inputs
    chex.assert_trees_all_close(*results, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, lambda f: jax.jit(jax.checkpoint(f))])
@pytest.mark.parametrize("axes", [(0, None, None, None), (None, None, 0, 0), (0, 0, 0, 0)])
def test_transformed_programs(axes, wrap, x64):
    """Forward over reverse of a vmap of a jit of a remat."""
    at = [normal(i, *[3] * (axes[i] == 0), *z.shape) for i, z in enumerate(operands(4))]
    along = [normal(9 + i, *z.shape) for i, z in enumerate(at)]
    results = []
    for function in (by_lora_dot, written_out):
        loss = lambda *at, f=function: jnp.sum(jax.vmap(wrap(f), axes)(*at))
        results.append(jax.jvp(jax.value_and_grad(loss, (0, 1, 2, 3)), at, along))
    chex.assert_trees_all_close(*results, rtol=1e-11, atol=1e-11)  # float64, sums of 12 tokens


def primitives(jaxpr):
    """The names of a program's primitives, those of its sub-programs too."""
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        for value in eqn.params.values():
            if hasattr(value, "eqns"):
                yield from primitives(value)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_plain_gradients_are_ordinary_jax(dtype):
    """But for the mark, of which a compiled program has nothing."""
    x, kernel, a, b = (z.astype(dtype) for z in operands(50))
    loss = lambda lora: jnp.sum(jax.vmap(lambda x: lora_dot(x, kernel, lora))(x).astype(jnp.float32))
    lora = LowRank(a, b)
    plain = jax.jit(jax.grad(loss))
    names = set(primitives(jax.make_jaxpr(plain)(lora)))
    assert {"lora", "dot_general"} <= names  # names are found
    ordinary = {"jit", "dot_general", "add", "mul", "transpose", "convert_element_type", "broadcast_in_dim"}
    ordinary |= {"optimization_barrier", "reduce_sum", "reshape", "squeeze", "remat2", "checkpoint"}
    assert names <= ordinary | {"lora"}
    assert "lora" not in plain.lower(lora).as_text()
    assert "lora" not in set(primitives(jax.make_jaxpr(jax.jit(oplora_jax.grad(loss)))(lora)))


def test_the_product_is_linear_in_x():
    x, kernel, a, b = operands(5)
    apply = lambda x: lora_dot(x, kernel, LowRank(a, b))
    dy = apply(x)
    # float32: both are the same products
    np.testing.assert_allclose(jax.linear_transpose(apply, x)(dy)[0], jax.vjp(apply, x)[1](dy)[0], rtol=1e-5)
    np.testing.assert_allclose(jax.jvp(apply, (x,), (x,))[1], dy, rtol=1e-5, atol=1e-6)
