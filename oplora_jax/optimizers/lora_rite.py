"""LoRA-RITE: Adam with a matrix second moment, in coordinates that do not depend on the factors."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from oplora_jax import solve
from oplora_jax.gradients.tangent import factor_gradients
from oplora_jax.matrix import LowRank
from oplora_jax.optimizers._factors import from_wide, orthonormal, pseudo_inverse, wide
from oplora_jax.optimizers._facts import facts
from oplora_jax.optimizers._lift import at_step, lora_optimizer
from oplora_jax.products import compute_dtype, gram, times, transpose


class LoRARITEState(NamedTuple):
    """State of `lora_rite` at the LoRA parameters."""

    momentum: Any  # LowRank at each LoRA parameter: a (*batch, n, r), b (*batch, r, m)
    basis: Any  # likewise, float32 at least: orthonormal columns that span a's, rows that span b's
    second_moment: tuple[Any, Any]  # for a and b, of trees: (*batch, r, r), float32 at least
    escaped_mass: tuple[Any, Any] | None = None  # likewise: (*batch, 1, 1); None without
    above_threshold: tuple[Any, Any] | None = None  # likewise: in how many steps U counted as zero


@facts(gradient="factors", source="2410.20625", invariant="any")
def lora_rite(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-6,
    skip_threshold: Any = None,
    max_norm: Any = 1.0,
    escaped_mass: bool = False,
    weight_decay: Any = 0.0,
    others: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""LoRA-RITE: Adam whose steps do not depend on how the increment is split into factors.

    Args:
      learning_rate: a scalar or a schedule, of the size of Adam's; about 3e-4 in the paper.
      b1: decay of the momentum.
      b2: decay of the second moment.
      eps: added to the roots of the second moment's eigenvalues.
      skip_threshold: the root mean square above which a gradient (U below) counts as zero; no limit if None
        (1.0 in the authors' code). What stays above it does not train: `above_threshold` of the state counts
        such steps.
      max_norm: what the joint norm of all U is scaled down to; no limit if None. A gradient that is not
        finite does not count in it.
      escaped_mass: whether to make up for what the second moment loses when the factors' directions turn: an
        average of the smaller of the largest drop of an eigenvalue and the drop of the trace is added to the
        eigenvalues.
      weight_decay: decoupled, of the factors, multiplied by the learning rate.
      others: the optimizer of the leaves that are no LoRA parameters; AdamW with the same settings if None.

    Returns:
      An Optax transformation that takes exact gradients and those of `jax.grad` alike. Its state is twice the
      size of the LoRA parameters, and 2 r^2 numbers for each.

    For a, with $\partial a$ its gradient, as of `jax.grad`, and the decomposition $b^\top = Q R$ into
    orthonormal columns and a triangle, a step is

    $$
    \begin{aligned}
    U &= \partial a\, R^{-1} = s\, G Q, \qquad T = Q_{old}^\top Q \\
    V &\leftarrow \beta_2(t)\, T^\top V T + (1 - \beta_2(t))\, U^\top U / n \\
    M &\leftarrow \beta_1(t)\, M T + (1 - \beta_1(t))\, U\, (V^{1/2} + \epsilon I)^{-1} \\
    a &\leftarrow a - \eta\, (M R^{-\top} + w a)
    \end{aligned}
    $$

    for the learning rate $\eta$ and the weight decay $w$, with Adam's bias correction in the decays,
    $\beta(t) = \beta\, (1 - \beta^{t-1}) / (1 - \beta^t)$; and for b likewise, from the old a. $U$ is the
    gradient without the size of b.

    Both factors step at once, so a b moves by the product of their steps too, $\eta^2 M_a (a b)^+ M_b$ with
    the pseudo-inverse of a b, which has no bound where a b is short. Therefore a waits in directions in which
    a b is shorter than half a step of b, $\eta \sqrt m / 2$, and where a has fewer directions than b, as if
    it starts at zero, b waits. The scale s cancels but for `eps`, `skip_threshold` and `max_norm`: the
    increment s a b moves s times as far as at scale 1.

    From [LoRA Done RITE](https://arxiv.org/abs/2410.20625).

    Examples:
      >>> import jax.numpy as jnp, oplora_jax
      >>> params = oplora_jax.LowRank(jnp.full((3, 1), 5.0), jnp.ones((1, 2)))
      >>> tx = oplora_jax.lora_rite(0.1)
      >>> updates, _ = tx.update(jnp.full((3, 2), 1 / 6), tx.init(params), params)
      >>> step = oplora_jax.LowRank(updates.a, params.b)  # lr times a matrix of orthonormal rows and columns
      >>> round(float(oplora_jax.frobenius_norm(step)), 3)  # 0.1 sqrt(n)
      0.173
    """

    def init(param, _):
        dtype, r = compute_dtype(param.a, param.b), param.a.shape[-1]
        basis = jax.tree.map(lambda z: jnp.zeros_like(z, dtype), param)
        zero = jnp.sum(basis.a, axis=(-2, -1), keepdims=True)  # for its sharding
        square = zero + jnp.zeros((*zero.shape[:-2], r, r), dtype)
        of_both = lambda z, kept=True: (jnp.array(z), jnp.array(z)) if kept else None
        moments = jax.tree.map(jnp.zeros_like, param), basis, of_both(square)
        # Counts of floating point: the backward pass captures nothing else.
        above = of_both(zero, skip_threshold is not None)
        return LoRARITEState(*moments, of_both(zero, escaped_mass), above)

    def step(params, gradients, states, count):
        lr = at_step(learning_rate, count)
        decays = _corrected(b1, count, lr.dtype), _corrected(b2, count, lr.dtype)
        sides = [_sides(*z, lr, skip_threshold) for z in zip(params, gradients, states, strict=True)]
        shrink = 1.0
        if max_norm is not None:  # what is not finite does not count
            squares = [jnp.sum(z.gradient**2) for pair in sides for z in pair]
            norm = jnp.sqrt(sum(jnp.where(jnp.isnan(z), 0, z) for z in squares))
            shrink = jnp.where(norm > max_norm, max_norm / norm, 1)
        moved = [[_moved(z, shrink, decays, eps) for z in pair] for pair in sides]
        new, after = [], []
        for param, pair, found in zip(params, sides, moved, strict=True):
            directions, momentum, second, escaped = zip(*found, strict=True)
            factors = zip(wide(param), directions, strict=True)
            new.append(from_wide(param, *(z - lr * (d + weight_decay * z) for z, d in factors)))
            # The basis that a side is measured in spans the other factor.
            basis = from_wide(param, pair[1].basis, pair[0].basis)
            moments = from_wide(param, *momentum), basis, second
            above = None if skip_threshold is None else tuple(z.above_threshold for z in pair)
            after.append(LoRARITEState(*moments, escaped if escaped_mass else None, above))
        return new, after

    if others is None:
        others = optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    joint = None if max_norm is None else f"max_norm is {max_norm}; expected None"
    return lora_optimizer(init, step, others=others, joint=joint)


class _Side(NamedTuple):
    """One factor's gradient without the magnitude of the other factor, b = L Q for a^T, and its moments."""

    gradient: Array  # U^T, (*batch, r, n)
    basis: Array  # Q
    inverse: Array  # L^+, without the directions in which the factor waits
    old_basis: Array
    momentum: Array  # M^T
    second_moment: Array  # V
    escaped_mass: Array | None
    above_threshold: Array | None


def _sides(param: LowRank, gradient: Any, state: LoRARITEState, lr: Array, skip_threshold: Any) -> tuple:
    """Those of a^T and of b."""
    derivatives, bases = wide(factor_gradients(param, gradient)), wide(state.basis)
    (basis_a, triangle_a), (basis_b, triangle_b) = map(orthonormal, wide(param))
    # Rows of a factor's momentum, which are whitened, have entries of about 1.
    step_of_b, step_of_a = (lr * size**0.5 for size in reversed(param.shape[-2:]))
    inverses = _inverses(triangle_a, triangle_b, step_of_a, step_of_b)
    sides = []
    for i, (derivative, inverse) in enumerate(zip(derivatives, inverses, strict=True)):
        u = times(inverse, derivative)
        u = jnp.where(jnp.isfinite(u), u, jnp.nan)
        escaped, above = (z and z[i] for z in (state.escaped_mass, state.above_threshold))
        if skip_threshold is not None:
            is_above = jnp.sqrt(jnp.mean(u**2, axis=(-2, -1), keepdims=True)) > skip_threshold
            u, above = jnp.where(is_above, 0, u), above + is_above
        moments = wide(state.momentum)[i], state.second_moment[i], escaped, above
        sides.append(_Side(u, (basis_b, basis_a)[i], inverse, bases[1 - i], *moments))
    return tuple(sides)


def _inverses(at: Array, b: Array, step_of_a: Array, step_of_b: Array) -> tuple[Array, Array]:
    """Of the triangle of b, for a^T, and of that of a^T, for b; for one of them without short directions.

    Short are directions of a b below half a step of the other factor. That is the one with fewer directions
    of its own, b if there are as many; below 2^-8 of the longest, as bfloat16 rounds, there is none.
    """
    of_a, of_b, of_product = solve.svd(at), solve.svd(b), solve.svd(times(transpose(at), b))
    rank_a, rank_b = (jnp.sum(z[1] > 2**-8 * z[1][..., :1], axis=-1, keepdims=True) for z in (of_a, of_b))
    a_waits = rank_a >= rank_b
    long = pseudo_inverse(of_product, jnp.where(a_waits, step_of_b, step_of_a) / 2)
    a_waits = a_waits[..., None]
    for_a = jnp.where(a_waits, times(long, transpose(at)), pseudo_inverse(of_b))
    return for_a, jnp.where(a_waits, pseudo_inverse(of_a), times(transpose(long), transpose(b)))


def _corrected(decay: Any, steps: Array, dtype: Any) -> Array:
    """The decay of the next step, with which an average needs no other bias correction."""
    decay = jnp.asarray(decay, dtype)
    return decay * (1 - decay**steps) / (1 - decay ** (steps + 1))


def _moved(side: _Side, shrink: Any, decays: tuple[Any, Any], eps: Any) -> tuple[Any, ...]:
    """(the direction of a step, the new momentum, second moment and escaped mass)."""
    (decay, decay_second), u, escaped = decays, shrink * side.gradient, side.escaped_mass
    turn = times(side.basis, transpose(side.old_basis))  # T^T
    carried = times(turn, side.second_moment, transpose(turn))
    if escaped is not None:
        escaped = decay_second * (escaped + _escaped_mass(side.second_moment, carried))
    second = decay_second * carried + (1 - decay_second) * gram(u) / u.shape[-1]
    values, vectors = solve.eigh(second)
    # Rounding leaves smaller eigenvalues undetermined; U has nothing there but rounding either.
    floor = values.shape[-1] * jnp.finfo(values.dtype).eps * values[..., -1:]
    values = jnp.maximum(values, jnp.maximum(floor, 0))[..., None, :]
    roots = jnp.sqrt(values if escaped is None else values + escaped) + eps
    whitened = times(vectors / roots, transpose(vectors), u)
    momentum = decay * times(turn, side.momentum) + (1 - decay) * whitened
    return times(transpose(side.inverse), momentum), momentum, second, escaped


def _escaped_mass(old: Array, carried: Array) -> Array:
    """How much a second moment loses in a change of basis, (*batch, 1, 1)."""
    drops = solve.eigh(old)[0] - solve.eigh(carried)[0]
    trace = jnp.trace(old, axis1=-2, axis2=-1) - jnp.trace(carried, axis1=-2, axis2=-1)
    mass = jnp.minimum(jnp.maximum(jnp.max(drops, axis=-1), 0), jnp.maximum(trace, 0))
    return mass[..., None, None]
