"""LoRA-RITE: Adam with a matrix second moment, in coordinates that do not depend on the factors."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from oplora_jax.matrix import HIGHEST, compute_dtype, finite_or_nan, matmul, transpose
from oplora_jax.optimizers._factors import (
    from_thin,
    gram,
    orthonormal,
    pseudo_inverse,
    thin_factors_and_gradients,
)
from oplora_jax.optimizers._facts import facts
from oplora_jax.optimizers._lift import at_step, for_lora, map_lora


class LoRARITEState(NamedTuple):
    """State of `lora_rite` at the LoRA parameters."""

    count: Array  # int32 ()
    momentum: Any  # LowRank at each LoRA parameter: a (*batch, n, r), b (*batch, r, m)
    basis: Any  # likewise, float32 at least: orthonormal columns that span a's, rows that span b's
    second_moment: tuple[Any, Any]  # for a and b, of trees: (*batch, r, r), float32 at least
    escaped_mass: tuple[Any, Any] | None = None  # likewise: (*batch, 1, 1); None without


@facts(gradient="factors", source="2410.20625", invariant="any")
def lora_rite(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-6,
    skip_threshold: Any = 1.0,
    max_norm: Any = 1.0,
    escaped_mass: bool = False,
    weight_decay: Any = 0.0,
    others: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""LoRA-RITE: robust invariant transformation equilibration.

    For a, with the decomposition :math:`b^\top = Q R` (and for b likewise with that of a, both of the old
    factors):

    .. math::
      U &= \partial a\, R^{-1} = s\, G Q, \qquad T = Q_{old}^\top Q \\
      V &\leftarrow \beta_2(t)\, T^\top V T + (1 - \beta_2(t))\, U^\top U / n \\
      M &\leftarrow \beta_1(t)\, M T + (1 - \beta_1(t))\, U\, (V^{1/2} + \epsilon I)^{-1} \\
      a &\leftarrow a - \eta\, (M R^{-\top} + w a),

    with the bias correction in the decays, :math:`\beta(t) = \beta\, (1 - \beta^{t-1}) / (1 - \beta^t)`. U is
    the gradient without the magnitude of b. Before it enters, it is zeroed where the root of its mean square
    exceeds `skip_threshold`, and all U of a tree are scaled so that their joint norm is at most `max_norm`.
    A parameter whose gradient stays above the threshold does not move: scale the loss, or pass None.

    Without weight decay a b does not depend on how it is split into factors (a R, R^-1 b, any invertible R):
    another split turns Q and the moments by an orthogonal matrix. A triangle that is not invertible has its
    pseudo-inverse: where b is zero, a waits. A gradient that is not finite does not count in the joint norm,
    so that other parameters step as if that one were zero.

    The scale s is in U, where it cancels but for eps, `skip_threshold` and `max_norm`. A step of a is then
    that of scale 1, and the increment s a b moves s times as far.

    The state is twice the size of the LoRA parameters and 2 r^2 for each.

    Args:
      learning_rate: eta, a scalar or a schedule; about 3e-4 in the paper.
      b1: decay of the first moment M.
      b2: decay of the second moment V.
      eps: added to the roots of the eigenvalues of V.
      skip_threshold: of the root mean square of U, for each factor; none if None.
      max_norm: of all U together; none if None.
      escaped_mass: whether to make up for what of V is lost when a basis turns, the smaller of the largest
        drop of an eigenvalue and the drop of the trace, by adding an average of it to the eigenvalues.
      weight_decay: w, decoupled, of the factors, multiplied by the learning rate.
      others: for the leaves that are no LoRA parameters; AdamW with the same settings if None.

    Returns:
      An Optax transformation for any kind of gradient.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import oplora_jax
      >>> params = oplora_jax.LowRank(jnp.full((3, 1), 5.0), jnp.ones((1, 2)))
      >>> tx = oplora_jax.lora_rite(0.1)
      >>> gradients = jax.grad(lambda p: oplora_jax.to_dense(p).mean())(params)
      >>> updates, _ = tx.update(gradients, tx.init(params), params)
      >>> step = oplora_jax.LowRank(updates.a, params.b)  # lr times a matrix of orthonormal rows and columns
      >>> round(float(oplora_jax.frobenius_norm(step)), 3)  # 0.1 sqrt(n)
      0.173

    References:
      LoRA Done RITE, https://arxiv.org/abs/2410.20625.
    """

    def init_fn(params):
        momentum = jax.tree.map(jnp.zeros_like, params)
        basis = jax.tree.map(lambda z: jnp.zeros_like(z, compute_dtype(z)), params)
        squares = lambda size: map_lora(lambda param: (_zeros(param, size),) * 2, 2, params)
        escaped = squares(lambda r: 1) if escaped_mass else None
        return LoRARITEState(jnp.zeros((), jnp.int32), momentum, basis, squares(lambda r: r), escaped)

    def update_fn(updates, state, params=None, **extra_args):
        if extra_args.get("in_backward") and max_norm is not None:
            raise ValueError(
                f"max_norm is {max_norm}: a joint norm of all parameters is not known in the backward pass; "
                "expected None"
            )
        lr = at_step(learning_rate, state.count)
        count = optax.safe_increment(state.count)
        decays = _corrected(b1, state.count, lr.dtype), _corrected(b2, state.count, lr.dtype)
        sides_a, sides_b, squares = map_lora(lambda *z: _unmagnified(*z, skip_threshold), 3, params, updates)
        shrink = _clip_factor(jax.tree.leaves(squares), max_norm)

        def one(param, of_a, of_b, momentum, basis, va, vb, *escaped):
            (ua, qa, inverse_a), (ub, qb, inverse_b) = of_a, of_b
            dtype = ua.dtype
            ma, mb = momentum.a.astype(dtype), transpose(momentum.b).astype(dtype)
            ea, eb = escaped or (None, None)
            ma, va, ea = _moments(shrink * ua, transpose(basis.b), qb, ma, va, ea, decays, eps)
            mb, vb, eb = _moments(shrink * ub, basis.a, qa, mb, vb, eb, decays, eps)
            step_a = matmul(ma, transpose(inverse_b), HIGHEST) + weight_decay * param.a.astype(dtype)
            step_b = matmul(mb, transpose(inverse_a), HIGHEST) + weight_decay * transpose(param.b).astype(
                dtype
            )
            return (
                from_thin(param, -lr * step_a, -lr * step_b),
                from_thin(param, ma, mb),
                from_thin(basis, qa, qb),
                va,
                vb,
                *((ea, eb) if escaped else ()),
            )

        rest = state.momentum, state.basis, *state.second_moment, *(state.escaped_mass or ())
        trees = map_lora(one, 1 + len(rest), params, sides_a, sides_b, *rest)
        updates, momentum, basis, va, vb, *escaped = trees
        escaped = tuple(escaped) if escaped_mass else None
        return updates, LoRARITEState(count, momentum, basis, (va, vb), escaped)

    if others is None:
        others = optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    return for_lora(optax.GradientTransformationExtraArgs(init_fn, update_fn), others)


def _zeros(param, size):
    """Zeros (*batch, k, k) for a size k of the rank, in float32 at least, sharded as the batch axes are."""
    k, dtype = size(param.a.shape[-1]), compute_dtype(param.a, param.b)
    per_layer = jnp.sum(jnp.zeros_like(param.a, dtype), axis=(-2, -1), keepdims=True)
    return per_layer + jnp.zeros((k, k), dtype).reshape((1,) * (param.a.ndim - 2) + (k, k))


def _corrected(decay, steps, dtype):
    """The decay of the next step, with which an average needs no other bias correction."""
    decay = jnp.asarray(decay, dtype)
    return decay * (1 - decay**steps) / (1 - decay ** (steps + 1))


def _unmagnified(param, gradient, skip_threshold):
    """(U, Q, R^+) for a, the same for b^T, and the sum of the squares of both U.

    U of a factor is its derivative without the magnitude of the other; Q and R decompose the factor itself.
    """
    a, b, da, db = thin_factors_and_gradients(param, gradient)
    (qa, ra), (qb, rb) = orthonormal(a), orthonormal(b)
    inverse_a, inverse_b = pseudo_inverse(ra), pseudo_inverse(rb)
    us = []
    for derivative, inverse in ((da, inverse_b), (db, inverse_a)):
        u = finite_or_nan(matmul(derivative, inverse, HIGHEST))
        if skip_threshold is not None:
            rms = jnp.sqrt(jnp.mean(u**2, axis=(-2, -1), keepdims=True))
            u = jnp.where(rms > skip_threshold, 0, u)
        us.append(u)
    square = sum(jnp.sum(u**2) for u in us)
    return (us[0], qa, inverse_a), (us[1], qb, inverse_b), square


def _clip_factor(squares, max_norm):
    """What to multiply all U of a tree by; those that are not finite do not count."""
    if max_norm is None or not squares:
        return 1.0
    norm = jnp.sqrt(sum(jnp.where(jnp.isnan(z), 0, z) for z in squares))
    return jnp.where(norm > max_norm, max_norm / norm, 1)


def _moments(u, old_basis, basis, momentum, second, escaped, decays, eps):
    """The new first and second moment of one side, and its new escaped mass."""
    decay, decay_second = decays
    turn = matmul(transpose(old_basis), basis, HIGHEST)
    carried = matmul(matmul(transpose(turn), second, HIGHEST), turn, HIGHEST)
    if escaped is not None:
        escaped = decay_second * (escaped + _escaped_mass(second, carried))
    second = decay_second * carried + (1 - decay_second) * gram(u) / u.shape[-2]
    values, vectors = jnp.linalg.eigh(finite_or_nan(second))
    # Rounding leaves smaller eigenvalues undetermined; U has nothing there but rounding either.
    floor = values.shape[-1] * jnp.finfo(values.dtype).eps * values[..., -1:]
    values = jnp.maximum(values, jnp.maximum(floor, 0))[..., None, :]
    roots = jnp.sqrt(values if escaped is None else values + escaped) + eps
    whitened = matmul(matmul(u, vectors / roots, HIGHEST), transpose(vectors), HIGHEST)
    momentum = decay * matmul(momentum, turn, HIGHEST) + (1 - decay) * whitened
    return momentum, second, escaped


def _escaped_mass(old, carried):
    """How much a second moment loses in a change of basis, (*batch, 1, 1)."""
    drops = jnp.linalg.eigvalsh(old) - jnp.linalg.eigvalsh(carried)
    trace = jnp.trace(old, axis1=-2, axis2=-1) - jnp.trace(carried, axis1=-2, axis2=-1)
    mass = jnp.minimum(jnp.maximum(jnp.max(drops, axis=-1), 0), jnp.maximum(trace, 0))
    return mass[..., None, None]
