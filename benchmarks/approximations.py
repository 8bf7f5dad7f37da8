"""A sum of matrices whose singular values are known, what approximates it, and how well."""

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from oplora_jax import LowRank, OuterProduct, svd
from oplora_jax.matrix import Matrix, Terms, left_product, right_product, thin_factors
from oplora_jax.products import transpose

RATE = 0.1
TURN = 0.3  # how far the anchor is from the sum's first singular vectors: the tangent of the angle
OVERSAMPLING, POWER = 10, 2


class Bases(NamedTuple):
    """Orthonormal columns to make sums of one size from."""

    left: Float[np.ndarray, "d k"]
    right: Float[np.ndarray, "d k"]
    turns: tuple[Float[np.ndarray, "d r"], Float[np.ndarray, "d r"]]  # normal numbers, of norm about 1


def draw_bases(size: int, count: int, rank: int) -> Bases:
    """Bases for sums of up to so many terms and anchors of up to this rank, the same at every call."""
    random = np.random.default_rng(size)
    normal = lambda columns: random.standard_normal((size, columns))
    left, right = (np.linalg.qr(normal(min(count, size)))[0] for _ in range(2))
    return Bases(left, right, tuple(normal(rank) / math.sqrt(size) for _ in range(2)))


def make_terms(bases: Bases, kind: Literal["outer", "low_rank"], rank: int, inner: int) -> Terms:
    """The sum of an optimizer's step, P - RATE * G, whose i-th singular value is 1 / i.

    P, the anchor, is a step behind: it has the sum's first singular values, and singular vectors that are
    turned away from the sum's. G takes it back, and has the other singular values in it.

    Args:
      bases: singular vectors.
      kind: of G: an `OuterProduct` of tokens, or a `LowRank`.
      rank: r, of the anchor.
      inner: of G: its tokens, or its rank. The sum has rank `inner` - r, or the bases' if that is less.
    """
    size, count = bases.left.shape[0], min(inner - rank, bases.left.shape[1])
    values = 1 / np.arange(1, count + 1)
    left, right = bases.left[:, :count], bases.right[:, :count]
    near = (
        np.linalg.qr(side[:, :rank] + TURN * turn[:, :rank])
        for side, turn in zip((left, right), bases.turns, strict=True)
    )
    # The signs of the triangle, which QR leaves open, keep the two sides together.
    old_left, old_right = (q * np.sign(np.diag(triangle)) for q, triangle in near)
    root = np.sqrt(values[:rank])
    a, b = old_left * root, (old_right * root).T
    # Rows of normal numbers mix the columns of P and of the sum into tokens that are all alike.
    rows = np.random.default_rng(size + rank).standard_normal((inner, rank + count))
    mix = np.linalg.qr(rows)[0]
    x = mix @ np.concatenate([a, left * np.sqrt(values)], axis=1).T
    dy = mix @ np.concatenate([b, -(right * np.sqrt(values)).T]) / RATE
    to_device = lambda *arrays: (jnp.asarray(z, jnp.float32) for z in arrays)
    gradient = OuterProduct(*to_device(x, dy)) if kind == "outer" else LowRank(*to_device(x.T, dy))
    return [(1.0, LowRank(*to_device(a, b))), (-RATE, gradient)]


def randomized_svd(terms: Terms, rank: int) -> LowRank:
    """A truncated SVD from products with thin matrices alone: subspace iteration from a random start.

    References:
      Finding structure with randomness, https://arxiv.org/abs/0909.4061, algorithms 4.4 and 5.1.
    """
    n, m = terms[0][1].shape
    width = min(rank + OVERSAMPLING, n, m)
    times = lambda z: sum(c * right_product(t, z) for c, t in terms)
    times_transposed = lambda z: transpose(sum(c * left_product(transpose(z), t) for c, t in terms))
    orthonormal = lambda z: jnp.linalg.qr(z)[0]
    columns = orthonormal(times(jax.random.normal(jax.random.key(0), (m, width))))
    for _ in range(POWER):
        columns = orthonormal(times(orthonormal(times_transposed(columns))))
    u, values, vt = jnp.linalg.svd(transpose(times_transposed(columns)), full_matrices=False)
    root = jnp.sqrt(values[:rank])
    return LowRank(columns @ (u[:, :rank] * root[None, :]), root[:, None] * vt[:rank])


def formed_svd(terms: Terms, rank: int) -> LowRank:
    """The truncated SVD of the sum, formed."""
    formed = sum(c * matrix.to_dense() for c, matrix in terms)
    return svd([(1.0, formed)], rank)


def captured_energy(terms: Terms, approximation: LowRank) -> float:
    """(|S|^2 - |S - A|^2) / (s_1^2 + ... + s_r^2) for a sum of `make_terms`: 1 at the best approximation.

    In float64, and without forming a matrix.
    """
    wide = [_wide_factors(matrix) for _, matrix in terms]
    left = np.concatenate([c * x for (c, _), (x, _) in zip(terms, wide, strict=True)])
    right = np.concatenate([y for _, y in wide])
    a, b = _wide_factors(approximation)
    product = lambda x, y: float(np.sum((x @ a.T) * (y @ b.T)))
    best = np.sum(1 / np.arange(1, len(a) + 1) ** 2)
    return (2 * product(left, right) - product(a, b)) / best


def _wide_factors(matrix: Matrix) -> tuple[Float[np.ndarray, "k n"], Float[np.ndarray, "k m"]]:
    """(left, right) with matrix = left^T right, in float64."""
    left, right = (np.asarray(z, np.float64) for z in thin_factors(matrix))
    return left, right
