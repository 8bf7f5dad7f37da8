"""Metrics of the space of matrices: second moments of a layer's two sides, averaged and raised to a power."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from oplora_jax import matrix
from oplora_jax.matrix import DenseGradient, LowRank, Matrix, OuterProduct
from oplora_jax.products import compute_dtype, gram, matmul, times, transpose
from oplora_jax.solve import eigh

Structure = Literal["diagonal", "dense"]
Reduction = Literal["mean", "sum"]

FLOOR = 1e-12  # of the entries or eigenvalues that are raised to a power


class KroneckerMetric(NamedTuple):
    r"""A norm of n x m matrices that weighs their rows and their columns, for `lorsum`.

    Attributes:
      input: the weights of the n rows, `(*batch, n)`, or a symmetric positive matrix, `(*batch, n, n)`.
      output: the weights of the m columns, `(*batch, m)`, or a symmetric positive matrix, `(*batch, m, m)`.

    With $D_{in}$ and $D_{out}$ the two, the norm of $T$ is $\|D_{in}^{1/2}\, T\, D_{out}^{1/2}\|_F$.

    Examples:
      >>> import jax.numpy as jnp
      >>> from oplora_jax import KroneckerMetric, LowRank, lorsum, to_dense
      >>> metric = KroneckerMetric(input=jnp.array([2.0, 1.0]), output=jnp.ones(2))
      >>> start, gradient = LowRank(jnp.eye(2), jnp.zeros((2, 2))), jnp.ones((2, 2))
      >>> jnp.round(to_dense(lorsum([(1.0, start), (-1.0, gradient)], metric=metric)), 4).tolist()
      [[-0.5, -0.5], [-1.0, -1.0]]
    """

    input: Any
    output: Any


def kfac_moments(
    gradient: OuterProduct | DenseGradient, structure: Structure, loss_reduction: Reduction
) -> KroneckerMetric:
    """K-FAC's second moments: x^T x / N, and N dy^T dy of a mean loss over N tokens or dy^T dy / N of a sum.

    A `DenseGradient` has moments of this structure or dense ones.
    """
    if isinstance(gradient, OuterProduct):
        x, dy = (second_moment(z, structure) for z in (gradient.scaled(gradient.x), gradient.dy))
        tokens = gradient.x.shape[-2]
    else:
        x, dy = gradient.x_moment, gradient.dy_moment
        if structure == "diagonal" and x.ndim == gradient.gradient.ndim:
            x, dy = (jnp.diagonal(z, axis1=-2, axis2=-1) for z in (x, dy))
        tokens = _per_batch_entry(gradient.tokens, x)
    return KroneckerMetric(x / tokens, dy * tokens if loss_reduction == "mean" else dy / tokens)


def shampoo_moments(gradient: Matrix, structure: Structure, loss_reduction: Reduction) -> KroneckerMetric:
    """Shampoo's second moments: c G G^T and c G^T G, c = N of a mean loss over N tokens and 1 / N of a sum.

    Of a plain array and of a `LowRank` N is not known, and c is 1.
    """
    n, m = gradient.shape[-2:]
    factors = matrix.thin_factors(gradient) if isinstance(gradient, LowRank | OuterProduct) else None
    if factors is not None and factors[0].shape[-2] * (n + m) <= n * m:  # the smaller not to form
        left, right = factors
        first = second_moment(left, structure, matmul(gram(right), left))
        second = second_moment(right, structure, matmul(gram(left), right))
    else:
        dense = matrix.to_dense(gradient)
        first, second = (second_moment(z, structure) for z in (transpose(dense), dense))
    if isinstance(gradient, OuterProduct):
        tokens = gradient.x.shape[-2]
    elif isinstance(gradient, DenseGradient):
        tokens = _per_batch_entry(gradient.tokens, first)
    else:
        return KroneckerMetric(first, second)
    factor = tokens if loss_reduction == "mean" else 1 / tokens
    return KroneckerMetric(factor * first, factor * second)


def _per_batch_entry(tokens: Array, like: Array) -> Array:
    """N, one at least, to multiply a moment by."""
    return jnp.maximum(tokens, 1).reshape(tokens.shape + (1,) * (like.ndim - tokens.ndim))


def second_moment(rows: Float[Array, "*batch N n"], structure: Structure, other: Any = None) -> Array:
    """rows^T rows, (*batch, n, n), or rows^T other; or its diagonal, (*batch, n). In float32 at least."""
    other = rows if other is None else other
    if structure == "dense":
        return matmul(transpose(rows), other.astype(rows.dtype))
    dtype = compute_dtype(rows)
    return jnp.sum(rows.astype(dtype) * other.astype(dtype), axis=-2)


def average(old: Array, new: Array, weight: Any) -> Array:
    """The exponential average one step on: old (1 - weight) + new weight, in the type of the old one."""
    return old * (1 - weight).astype(old.dtype) + new.astype(old.dtype) * weight.astype(old.dtype)


def relative(metric: KroneckerMetric, shape: tuple[int, ...]) -> KroneckerMetric:
    """Both sides, of matrices of a shape, over their mean eigenvalues; a side of zeros as it is."""

    def over_its_mean(side: Array) -> Array:
        mean = jnp.mean(_diagonal(side, shape), axis=-1)
        return side / jnp.where(mean > 0, mean, 1).reshape(mean.shape + (1,) * (side.ndim - mean.ndim))

    return KroneckerMetric(*map(over_its_mean, metric))


def typical(side: Array, shape: tuple[int, ...], damping: Any) -> Float[Array, "*batch"]:
    """The geometric mean of a side's diagonal, which the few largest hardly change.

    damping, a share of the mean, is added to all: the dead ones count as that.
    """
    diagonal = _diagonal(side, shape)
    mean = jnp.mean(diagonal, axis=-1, keepdims=True)
    shares = diagonal / jnp.where(mean > 0, mean, 1) + jnp.maximum(damping, FLOOR)
    return mean[..., 0] * jnp.exp(jnp.mean(jnp.log(shares), axis=-1))


def _diagonal(side: Array, shape: tuple[int, ...]) -> Array:
    return side if side.ndim < len(shape) else jnp.diagonal(side, axis1=-2, axis2=-1)


def powers(
    metric: KroneckerMetric, power: Any, damping: Any = 0.0, *, batch_ndim: int = 0
) -> tuple[KroneckerMetric, KroneckerMetric]:
    """(D + damping)^power of both sides, and the inverse of that.

    Entries and eigenvalues below 1e-12 count as 1e-12, and those of a dense side that rounding leaves
    undetermined as n eps of its largest.
    """
    pairs = [_powers(side, power, damping, dense=side.ndim == batch_ndim + 2) for side in metric]
    columns = zip(*pairs, strict=True)  # in the types of the sides, whatever the numbers' are
    return tuple(
        KroneckerMetric(*(z.astype(side.dtype) for z, side in zip(column, metric, strict=True)))
        for column in columns
    )


def _powers(side: Array, power: Any, damping: Any, *, dense: bool) -> tuple[Array, Array]:
    if not dense:
        side = jnp.maximum(side + damping, FLOOR)
        return side**power, side**-power
    values, vectors = eigh(side)
    values = values + damping
    floor = side.shape[-1] * jnp.finfo(values.dtype).eps * values[..., -1:]
    values = jnp.maximum(values, jnp.maximum(floor, FLOOR))
    form = lambda z: times(vectors * z[..., None, :], transpose(vectors))
    return form(values**power), form(values**-power)


def times_output(left: Float[Array, "*batch k m"], side: Array) -> Float[Array, "*batch k m"]:
    """left @ D for a side of a metric."""
    return times(left, side) if side.ndim == left.ndim else left * side[..., None, :]


def checked_metric(metric: KroneckerMetric, shape: tuple[int, ...], dtype: Any) -> KroneckerMetric:
    """The metric in a type; raises ValueError unless both sides fit matrices of a shape (*batch, n, m)."""
    (*batch, n, m) = shape
    for name, side, size in (("input", metric.input, n), ("output", metric.output, m)):
        if jnp.shape(side) not in ((*batch, size), (*batch, size, size)):
            raise ValueError(
                f"the metric's {name} side has shape {jnp.shape(side)}; matrices of shape {shape} take "
                f"{(*batch, size)} (diagonal) or {(*batch, size, size)} (dense)"
            )
    return jax.tree.map(lambda side: jnp.asarray(side, dtype), metric)
