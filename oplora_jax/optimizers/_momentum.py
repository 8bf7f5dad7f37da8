"""A low-rank momentum, and the heavy-ball step with it."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from oplora_jax.lorsum import Sums, lorsums
from oplora_jax.matrix import LowRank, Matrix, from_unit_scale, is_zero
from oplora_jax.products import compute_dtype


def random_start(param: LowRank, key: jax.Array, rank: Any = None) -> LowRank:
    """A zero momentum of a rank, the parameter's if None; at scale 1 its left factor is standard normal.

    It is drawn in the type of the solves and then rounded, so that every type starts from the same numbers.
    """
    (*batch, n, _), rank = param.shape, param.a.shape[-1] if rank is None else int(rank)
    # Built on zeros made from the parameter, for its sharding.
    column, row = jnp.zeros_like(param.a[..., :1]), jnp.zeros_like(param.b[..., :1, :])
    a = column + jax.random.normal(key, (*batch, n, rank), compute_dtype(param.a))
    return from_unit_scale(LowRank(a, row + jnp.zeros((*batch, rank, 1), param.b.dtype)), param)


def heavy_ball(
    params: Sequence[LowRank],
    momenta: Sequence[LowRank | None],
    gradients: Sequence[Matrix],
    metrics: Sequence[Any],
    *,
    learning_rate: Any,
    decay: Any,
    share: Any,
    weight: Any,
    regularization: tuple[Any, Any],
    num_iters: Any,
    relative: bool = False,
) -> list[tuple[LowRank, LowRank | None]]:
    """P <- LoRSum[w P - lr (share G + decay M)] and M <- LoRSum[decay M + share G], in one pass over each G.

    A Jacobi step, num_iters=0, takes each change S of an anchor a b to (a + S b^+)(b + a^+ S): twice what
    lies in the rows and columns of both factors, and S (a b)^+ S besides. M changes by more than it is, and
    all of it lies there: decay M + G would be decay^2 M + 2 decay G + G M^+ G, whose sign never turns where M
    has full rank. So M is solved for by alternation, in a pass of its own.

    Args:
      params: P of each parameter.
      momenta: M, of all parameters or of none.
      gradients: G, exact or its projection.
      metrics: of the first sum, as for `Sums`.
      learning_rate, decay, share, weight: lr, decay, share and w.
      regularization: of both sums; relative, as for `lorsums`.
      num_iters: as for `lorsum`; for the momentum 1 at least.
    """
    mixing, rates = [[weight, -learning_rate * decay], [0.0, decay]], [-learning_rate * share, share]
    # The authors' code adds 1e-6 to the diagonal of every Gram matrix. It shows in the momentum alone, which
    # starts at zero: at most 0.2 % of the regularization, so that a step of size 0 changes nothing.
    small = 0.0 if relative or is_zero(regularization[1]) else jnp.minimum(1e-6, 2e-3 * regularization[1])
    shrinkage, sums = [0.0, small], 1 if None in momenta else 2
    found = lorsums(
        [
            Sums([p, m][:sums], [(1.0, g)], d)
            for p, m, g, d in zip(params, momenta, gradients, metrics, strict=True)
        ],
        [row[:sums] for row in mixing[:sums]],
        rates[:sums],
        regularization=regularization[:sums],
        shrinkage=shrinkage[:sums],
        num_iters=num_iters,
        relative=relative,
    )
    if sums == 2 and not (isinstance(num_iters, int) and num_iters):
        alone = [Sums([m], [(1.0, g)]) for m, g in zip(momenta, gradients, strict=True)]
        ridges, once = (regularization[1:], shrinkage[1:]), at_least_one(num_iters)
        moments = lorsums(
            alone, [[decay]], [share], ridges[0], shrinkage=ridges[1], num_iters=once, relative=relative
        )
        found = [[new, moment] for (new, _), (moment,) in zip(found, moments, strict=True)]
    return [(new, _balanced(moment[0]) if moment else None) for new, *moment in found]


def at_least_one(num_iters: Any) -> Any:
    """The number of alternating iterations where a Jacobi step diverges."""
    return max(num_iters, 1) if isinstance(num_iters, int) else jnp.maximum(num_iters, 1)


def _balanced(moment: LowRank) -> LowRank:
    """The same matrix, with the norm of a not below that of b.

    Its decay falls on the factor that is solved first, and the other one grows in return. Left alone, a would
    vanish like decay^k, until the regularization outweighed it and froze b.
    """
    left, right = (jnp.sum(jnp.square(z), axis=(-2, -1), keepdims=True) for z in (moment.a, moment.b))
    least, most = jnp.ones((), left.dtype), jnp.asarray(1 / jnp.finfo(left.dtype).tiny, left.dtype)
    ratio = jax.lax.clamp(least, jnp.where(left > 0, right / left, 1.0), most) ** 0.25
    return moment.with_factors(moment.a * ratio, moment.b / ratio)
