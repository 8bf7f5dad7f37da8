"""The order in which a layer with LoRA multiplies, forward and backward: the one of the fewest operations.

Shapes are static, so the order is chosen while the program is traced. The derivative is written as a linear
map of the tangents in the chosen order; the backward pass is what JAX transposes it to.
"""

import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from oplora_jax.matrix import LowRank, formed
from oplora_jax.products import as_wide, transpose


class Sizes(NamedTuple):
    """N tokens, a kernel n x m and rank r."""

    tokens: int
    n: int
    m: int
    r: int


class Order(NamedTuple):
    """Which gradients are taken through an n x m matrix."""

    x: bool  # dy (W + s a b)^T, and not dy W^T + s (dy b^T) a^T
    a: bool  # s (x^T dy) b^T, and not s x^T (dy b^T)
    b: bool  # s a^T (x^T dy), and not s (x a)^T dy


class Wanted(NamedTuple):
    """Which gradients are asked for."""

    x: bool
    kernel: bool
    a: bool
    b: bool


def forward_is_merged(sizes: Sizes) -> bool:
    """Whether x (W + s a b) takes fewer operations than x W + s (x a) b: 2 n m r against 2 N r (n + m)."""
    tokens, n, m, _ = sizes
    return n * m < tokens * (n + m)


def backward_operations(sizes: Sizes, order: Order, wanted: Wanted) -> int:
    """The operations of the gradients that are asked for; of x, a and b RunLoRA's, arXiv:2312.03415."""
    tokens, n, m, r = sizes
    full, formed = 2 * tokens * n * m, 2 * n * m * r
    thin_n, thin_m = 2 * tokens * n * r, 2 * tokens * m * r
    asked = Order(wanted.x, wanted.a, wanted.b)
    through = Order(*(w and o for w, o in zip(asked, order, strict=True)))
    thin = Order(*(w and not o for w, o in zip(asked, order, strict=True)))
    return (
        full * wanted.x
        + full * (wanted.kernel or through.a or through.b)  # x^T dy
        + formed * sum(through)
        + thin_m * (thin.x or thin.a)  # dy b^T, which both take
        + thin_n * (thin.x + thin.a)
        + (thin_n + thin_m) * thin.b  # x a, and its product with dy
    )


def backward_order(sizes: Sizes, wanted: Wanted) -> Order:
    """The order of the fewest operations; of equal ones that which forms the fewest n x m matrices."""
    orders = sorted((Order(*z) for z in itertools.product((False, True), repeat=3)), key=sum)
    return min(orders, key=lambda order: backward_operations(sizes, order, wanted))


def dot(x: Array, y: Array, *, precision: Any = None, out_sharding: Any = None) -> Array:
    """x @ y, where x has the batch axes of y in front, then those of its tokens."""
    batch = tuple(range(y.ndim - 2))
    dimensions = ((x.ndim - 1,), (y.ndim - 2,)), (batch, batch)
    return jax.lax.dot_general(x, y, dimensions, precision=precision, out_sharding=out_sharding)


def _multiply(
    x: Float[Array, "*tokens n"],
    kernel: Float[Array, "*batch n m"],
    a: Float[Array, "*batch n r"],
    b: Float[Array, "*batch r m"],
    scale: float | int,
    precision: Any,
) -> Float[Array, "*tokens m"]:
    """x (W + s a b), by x and the factors or by the merged weights."""
    product = functools.partial(dot, precision=precision)
    if forward_is_merged(_sizes(x, a, b)):
        return product(x, kernel + formed(LowRank(a, b, scale)))
    return product(x, kernel) + product(product(x, a) * scale, b)


multiply = jax.custom_jvp(_multiply, nondiff_argnums=(4, 5))


@functools.partial(multiply.defjvp, symbolic_zeros=True)
def _derivative(scale, precision, primals, tangents):
    """The product, and a sum of terms that are linear in the tangents there are."""
    product = functools.partial(dot, precision=precision)
    (x, kernel, a, b), (dx, dkernel, da, db) = primals, tangents
    wanted = Wanted(*(not isinstance(t, SymbolicZero) for t in tangents))
    order = backward_order(_sizes(x, a, b), wanted)
    terms, thin, weight = [], [], []  # outputs, what b is yet to multiply, what x is yet to multiply
    if wanted.kernel:
        weight.append(dkernel)
    if wanted.x and order.x:
        # Formed again for the backward pass: a loop over layers would keep the merged weights of them all.
        through = jax.checkpoint(lambda dx, w, *ab: product(dx, w + formed(LowRank(*ab, scale))))
        terms.append(through(dx, kernel, a, b))
    elif wanted.x:
        terms.append(product(dx, kernel))
        thin.append(product(dx, a))
    if wanted.a:
        weight.append(scale * product(da, b)) if order.a else thin.append(_times_thin(x, da, precision))
    if wanted.b and order.b:
        weight.append(scale * product(a, db))
    elif wanted.b:
        terms.append(product(product(x, a) * scale, db))
    if thin:
        terms.append(product(sum(thin[1:], thin[0]) * scale, b))
    if weight:
        terms.append(product(x, sum(weight[1:], weight[0])))
    return _multiply(*primals, scale, precision), sum(terms[1:], terms[0])


def _times_thin(x: Array, a: Array, precision: Any) -> Array:
    """x @ a, which the backward pass turns into a product of few rows, x^T and the cotangent's transpose."""
    batch = tuple(range(a.ndim - 2))
    dimensions = ((x.ndim - 1,), (a.ndim - 1,)), (batch, batch)
    return jax.lax.dot_general(x, as_wide(transpose(a)), dimensions, precision=precision)


def _sizes(x: Array, a: Array, b: Array) -> Sizes:
    return Sizes(math.prod(x.shape[a.ndim - 2 : -1]), a.shape[-2], b.shape[-1], a.shape[-1])
