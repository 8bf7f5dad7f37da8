"""Kernels as matrices: any einsum that is a product has its increment, and nothing else has."""

import string

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oplora_jax import LowRank
from oplora_jax.adapters.kernel_axes import add_einsum_increment, add_increment, kernel_roles, matrix_shape
from tests.arrays import normal


@st.composite
def products(draw):
    """An einsum of inputs and a kernel, with the sizes of its axes."""
    counts = draw(st.tuples(*[st.integers(0, 2)] * 2, st.integers(1, 2), st.integers(0, 2)))
    letters = iter(draw(st.permutations(string.ascii_letters)))
    batch, tokens, contracted, features = ("".join(next(letters) for _ in range(k)) for k in counts)
    alone = "".join(next(letters) for _ in range(draw(st.integers(0, 1))))  # summed over x alone
    shuffle = lambda z: "".join(draw(st.permutations(z)))
    kernel = shuffle(batch + contracted + features)
    equation = (
        f"{shuffle(batch + tokens + contracted + alone)},{kernel}->{shuffle(batch + tokens + features)}"
    )
    sizes = {c: draw(st.integers(1, 3)) for c in equation if c in string.ascii_letters}
    return equation, kernel, batch, contracted, sizes


@settings(max_examples=15)
@given(products())
def test_any_product(case):
    """The increment of the outputs is the einsum with the increment of the kernel, in float64."""
    equation, kernel, batch, contracted, sizes = case
    roles = "".join("b" if c in batch else "i" if c in contracted else "o" for c in kernel)
    assert kernel_roles(equation, len(kernel)) == roles
    shape = [sizes[c] for c in kernel]
    *stack, n, m = matrix_shape(shape, roles)
    assert n == np.prod([sizes[c] for c in contracted])
    with jax.enable_x64(True):
        x = normal(0, *(sizes[c] for c in equation.split(",")[0]))
        lora = LowRank(normal(1, *stack, n, 1), normal(2, *stack, 1, m), 0.5, roles)
        increment = add_increment(jnp.zeros(shape), lora)
        expected = np.einsum(equation, x, increment)
        got = add_einsum_increment(jnp.ones(expected.shape), equation, x, shape, lora)
        # float64, sums of at most 27 products
        np.testing.assert_allclose(got, 1 + expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("equation", "x", "kernel", "roles"),
    [
        ("...i,io->...o", (5, 2, 3), (3, 4), "io"),
        ("...i,io->o...", (3,), (3, 4), "io"),
        ("...ti,...io->...to", (2, 5, 3), (2, 3, 4), "bio"),
        ("...ti,...io->...to", (6, 2, 5, 3), (2, 3, 4), "bio"),
        ("...ti,...io->...to", (1, 5, 3), (2, 3, 4), "bio"),
        ("...ti,...io->...to", (5, 3), (2, 3, 4), "bio"),
        ("ti, ...io -> ...to", (5, 3), (2, 3, 4), "oio"),
    ],
)
def test_ellipsis(equation, x, kernel, roles, x64):
    """What an ellipsis in the kernel stands for are batch axes, or outputs if the inputs have none."""
    assert kernel_roles(equation, len(kernel)) == roles
    *stack, n, m = matrix_shape(kernel, roles)
    x, lora = normal(0, *x), LowRank(normal(1, *stack, n, 2), normal(2, *stack, 2, m), 2.0, roles)
    increment = add_increment(jnp.zeros(kernel), lora)
    expected = jnp.einsum(equation, x, increment)
    got = add_einsum_increment(jnp.ones(expected.shape), equation, x, kernel, lora)
    np.testing.assert_allclose(got, 1 + expected, rtol=1e-12, atol=1e-12)  # float64, sums of 3 products
