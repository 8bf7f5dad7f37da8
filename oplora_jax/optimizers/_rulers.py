"""Steps whose length a learning rate says, whatever the units of the loss and of a layer's inputs are."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from oplora_jax.matrix import LowRank, Matrix, from_unit_scale, left_product, transposed
from oplora_jax.metrics import KroneckerMetric, average, times_output
from oplora_jax.optimizers._factors import Pair, Square, wide, wide_at_unit_scale
from oplora_jax.products import times, transpose
from oplora_jax.solve import inverse
from oplora_jax.together import together

Pairs = tuple[KroneckerMetric, KroneckerMetric]  # D and its inverse

MOST = 2.0  # usual lengths that a gradient counts for: one odd batch does not throw a training off its path
LEAST_INPUTS = 0.1  # the root mean square that inputs count as whose own is less: no huge steps for them


class Ruler(NamedTuple):
    """How long the steps of a parameter are.

    The measures are |a' b| and |a b'| in the metric, a' and b' the least-squares steps along a gradient.
    """

    rates: tuple[Square, Square]  # what the averaged gradients of a^T and b are multiplied with
    size: Float[Array, "*batch 2"]  # the running means of the squared measures
    share: Float[Array, "*batch 2"]  # what this gradient counts for: less than 1 if far longer than usual
    factor: Float[Array, "*batch"]  # the second one at a rate of 1, which D is multiplied with in `in_units`


def factor_products(param: LowRank, gradient: Matrix) -> Pair:
    """((G b^T)^T, a^T G) for the factors at scale 1."""
    at, b = wide_at_unit_scale(param)
    products = left_product(b, transposed(gradient)), left_product(at, gradient)
    return tuple(z.astype(at.dtype) for z in products)


def measure(
    params: Sequence[LowRank],
    products: Sequence[Any],
    metrics: Sequence[Pairs],
    inputs: Sequence[Any],
    sizes: Sequence[Any],
    *,
    learning_rate: Any,
    weight: Any,
    regularization: Any,
    hold: Any,
) -> list[Ruler]:
    """The rulers of parameters a b, from the `factor_products` of their gradients.

    Args:
      params, products, metrics: of each parameter: the products are a Pair.
      inputs: the mean square of a layer's inputs, (*batch), or 1 where it is not known.
      sizes: of the last rulers, (*batch, 2).
      learning_rate: the root mean square of a step's entries, for inputs of mean square 1.
      weight: of this step in the running mean.
      regularization: of the solves, as a share of the mean eigenvalue of their Gram matrices.
      hold: how many squared lengths of a step the Gram matrix of b is enlarged by in the solve for a.
    """

    def algebra(_, z):
        (gram_a, gram_b), (energy_a, energy_b), size, unit = z
        mean = lambda gram: jnp.trace(gram, axis1=-2, axis2=-1) / gram.shape[-1]
        ridges = regularization * jnp.stack([mean(gram_b), mean(gram_a)])
        solve_a, solve_b = inverse(jnp.stack([gram_b, gram_a]), ridges[..., None])
        along = lambda gram, solve, energy: jnp.sum(times(solve, gram, solve) * energy, axis=(-2, -1))
        new = jnp.stack([along(gram_b, solve_a, energy_a), along(gram_a, solve_b, energy_b)], axis=-1)
        # Nothing is usual before the first gradient.
        usual = jnp.where(size > 0, MOST**2 * size / jnp.where(new > 0, new, 1), 1)
        share = jnp.sqrt(jnp.minimum(1, usual))
        size = average(size, jnp.square(share) * new, weight)
        started = mean(gram_a) > 0  # b's step is the measure: a's goes along what b has learned
        square = jnp.where(started, size[..., 1], size[..., 0])
        # None at all, or gradients whose squares are rounded to zero here or in the moments: no step.
        moves = square > jnp.finfo(size.dtype).tiny / jnp.finfo(size.dtype).eps
        factor = jnp.where(moves, jnp.sqrt(square), 1) / unit
        rate = jnp.where(moves, learning_rate / factor, 0)[..., None, None]
        held = hold * jnp.square(learning_rate * unit) / jnp.where(started, mean(gram_a), jnp.inf)
        slow_a = inverse(gram_b, (ridges[0] + held)[..., None])
        return Ruler((rate * slow_a, rate * solve_b), size, share, factor)

    found = []
    for param, pair, (metric, inverse_metric), square, size in zip(
        params, products, metrics, inputs, sizes, strict=True
    ):
        *_, n, m = param.shape
        inner = lambda rows, side: times(times_output(rows, side), transpose(rows))
        grams = tuple(map(inner, wide_at_unit_scale(param), metric))
        energies = tuple(map(inner, pair, inverse_metric))
        unit = (n * m) ** 0.5 / jnp.sqrt(jnp.maximum(square, LEAST_INPUTS**2))
        found.append((grams, energies, size, jnp.broadcast_to(unit, size.shape[:-1]).astype(size.dtype)))
    return together(algebra, [None] * len(params), found)


def averaged(momentum: LowRank | None, products: Pair, ruler: Ruler, decay: Any) -> Pair:
    """The average of `factor_products` one step on, from that in a state; the products if there is none."""
    shares = jnp.moveaxis(ruler.share, -1, 0)[..., None, None]
    new = [share * product for share, product in zip(shares, products, strict=True)]
    if momentum is None:
        return tuple(new)
    return tuple(decay * z + (1 - decay) * g for z, g in zip(wide(momentum), new, strict=True))


def step_along(param: LowRank, averages: Pair, metrics: Pairs, ruler: Ruler, correction: Any) -> LowRank:
    """The parameter after least-squares steps of both factors along averages over their correction."""
    at, b = (
        rows - times(rate / correction, times_output(ahead, side))
        for rows, rate, ahead, side in zip(
            wide_at_unit_scale(param), ruler.rates, averages, metrics[1], strict=True
        )
    )
    return from_unit_scale(LowRank(transpose(at), b), param)


def in_units(metrics: Pairs, ruler: Ruler) -> Pairs:
    """The metric in which a step at a rate is as long as it says."""
    (given, output), (inverse_given, inverse_output) = metrics
    factor = ruler.factor.reshape(ruler.factor.shape + (1,) * (output.ndim - ruler.factor.ndim))
    return KroneckerMetric(given, output * factor), KroneckerMetric(inverse_given, inverse_output / factor)
