"""The order in which a layer multiplies: what it costs, and that it changes no number."""

import itertools

import chex
import jax
import jax.numpy as jnp
import pytest

from oplora_jax import LowRank, lora_dot
from oplora_jax.gradients import matmul_order
from oplora_jax.gradients.matmul_order import Order, Sizes, Wanted, backward_operations, backward_order
from tests.arrays import normals

ALL = Wanted(x=True, kernel=False, a=True, b=True)
# Few and many tokens, thin and wide ranks, both sides the longer one: each order is the cheapest of some.
SHAPES = [
    Sizes(*z)
    for z in [(4, 64, 96, 8), (40, 64, 96, 8), (512, 64, 96, 8), (512, 96, 64, 40), (512, 24, 24, 24)]
]
SHAPES += [Sizes(300, 16, 400, 16), Sizes(300, 400, 16, 16), Sizes(20, 200, 200, 150)]


def operands(sizes, dtype=jnp.float32):
    normal = normals(0, dtype)
    tokens, n, m, r = sizes
    return normal(tokens, n), normal(n, m), normal(n, r), normal(r, m), normal(tokens, m)


def table(sizes):
    """RunLoRA's operations of the backward pass, by order; D is those of a product with the kernel."""
    t, n, m, r = sizes
    d, formed = 2 * t * n * m, 2 * n * m * r
    return {
        Order(x=False, a=False, b=False): d + 2 * t * r * (3 * n + 2 * m),
        Order(x=True, a=False, b=False): d + 4 * t * r * (n + m) + formed,
        Order(x=False, a=False, b=True): 2 * d + 2 * t * r * (2 * n + m) + formed,
        Order(x=True, a=False, b=True): 2 * d + 2 * t * r * (n + m) + 2 * formed,
        Order(x=False, a=True, b=False): 2 * d + 4 * t * r * (n + m) + formed,
        Order(x=True, a=True, b=False): 2 * d + 2 * t * r * (n + m) + 2 * formed,
        Order(x=False, a=True, b=True): 2 * d + 2 * t * r * (n + m) + 2 * formed,
        Order(x=True, a=True, b=True): 2 * d + 3 * formed,
    }


def pull_back(x, kernel, a, b, dy):
    """The gradients by x and the factors; none by the kernel."""
    layer = lambda x, a, b: lora_dot(x, kernel, LowRank(a, b, scale=2.0))
    return jax.vjp(layer, x, a, b)[1](dy)


def flops(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("sizes", SHAPES)
def test_operations_are_those_of_the_table(sizes):
    for order, operations in table(sizes).items():
        assert backward_operations(sizes, order, ALL) == operations
    assert backward_operations(sizes, backward_order(sizes, ALL), ALL) == min(table(sizes).values())


def test_the_shapes_ask_for_different_orders():
    """With r at most n and m the others are never the cheapest."""
    cheapest = {backward_order(sizes, ALL) for sizes in SHAPES}
    assert cheapest == {
        Order(x, factors, factors) for x, factors in [(False,) * 2, (True, False), (True,) * 2]
    }
    assert {matmul_order.forward_is_merged(sizes) for sizes in SHAPES} == {False, True}


@pytest.mark.parametrize("sizes", SHAPES)
def test_compiled_flops_are_the_least(sizes):
    """Those of the products; sums over n x m or N x m entries, of which there are few, come on top."""
    t, n, m, r = sizes
    x, kernel, a, b, dy = operands(sizes)
    forward = 2 * t * n * m + min(2 * t * r * (n + m), 2 * n * m * r)
    sums = 4 * (n * m + t * (n + m) + r * (n + m + t))
    counted = flops(lambda *z: lora_dot(z[0], z[1], LowRank(z[2], z[3], scale=2.0)), x, kernel, a, b)
    assert forward <= counted <= forward + sums
    backward = min(table(sizes).values())
    assert backward <= flops(pull_back, x, kernel, a, b, dy) <= backward + sums


@pytest.mark.parametrize("sizes", SHAPES[2:5])
def test_every_order_gives_the_same_gradients(sizes, monkeypatch, x64):
    x, kernel, a, b, dy = operands(sizes, jnp.float64)
    weight = kernel + 2.0 * a @ b
    expected = [dy @ weight.T, 2.0 * x.T @ dy @ b.T, 2.0 * a.T @ x.T @ dy]
    for merged, order in itertools.product((False, True), table(sizes)):
        monkeypatch.setattr(matmul_order, "forward_is_merged", lambda _, merged=merged: merged)
        monkeypatch.setattr(matmul_order, "backward_order", lambda *_, order=order: order)
        y = lora_dot(x, kernel, LowRank(a, b, scale=2.0))
        # float64 sums of up to 600 products of normal numbers
        chex.assert_trees_all_close(y, x @ weight, rtol=1e-11, atol=1e-10)
        chex.assert_trees_all_close(list(pull_back(x, kernel, a, b, dy)), expected, rtol=1e-11, atol=1e-9)


def test_what_is_not_asked_for_costs_nothing():
    """With a frozen, x itself is not needed; with the kernel trained, x^T dy is there anyway."""
    sizes = Sizes(300, 64, 96, 8)
    x, kernel, a, b, dy = operands(sizes)
    only_b = lambda x, kernel, a, b, dy: jax.vjp(lambda b: lora_dot(x, kernel, LowRank(a, b)), b)[1](dy)
    t, n, m, r = sizes
    assert flops(only_b, x, kernel, a, b, dy) <= 2 * t * r * (n + m) + 4 * r * (t + m)
    trained = Wanted(x=False, kernel=True, a=True, b=True)
    assert backward_order(sizes, trained) == Order(x=False, a=True, b=True)
    by_weights = lambda x, kernel, a, b, dy: jax.vjp(
        lambda kernel, a, b: lora_dot(x, kernel, LowRank(a, b)), kernel, a, b
    )[1](dy)
    assert flops(by_weights, x, kernel, a, b, dy) <= 2 * t * n * m + 4 * n * m * r + 4 * n * m


def test_half_precision_is_not_merged():
    """An increment below the rounding of the weights counts all the same."""
    sizes = Sizes(512, 64, 32, 8)
    assert matmul_order.forward_is_merged(sizes)
    x, kernel, a, b, _ = operands(sizes, jnp.bfloat16)
    ones, kernel = 0 * x + 1, (0 * kernel + 1).at[::2].set(-1)  # whose columns sum to zero
    small = LowRank(0 * a + 1, 0 * b + 2.0**-13)  # 8 * 2^-13 = 2^-10, of which 1 + 2^-10 keeps nothing
    chex.assert_trees_all_equal(lora_dot(ones, kernel, small), jnp.full((512, 32), 64 * 2.0**-10, x.dtype))


def test_forward_mode_and_second_derivatives(x64):
    x, kernel, a, b, dy = operands(Sizes(50, 6, 5, 2), jnp.float64)
    function = lambda a, b: jnp.sum(jnp.tanh(lora_dot(x, kernel, LowRank(a, b, scale=2.0))) * dy)
    plain = lambda a, b: jnp.sum(jnp.tanh(x @ (kernel + 2.0 * a @ b)) * dy)
    for differentiate in (jax.jacfwd, jax.jacrev, jax.hessian):
        got, expected = (differentiate(f, argnums=(0, 1))(a, b) for f in (function, plain))
        # float64, second derivatives of 50 tokens
        chex.assert_trees_all_close(got, expected, rtol=1e-9, atol=1e-9)
