"""MoFaSGD: SGD along the singular directions of a momentum that is kept as a truncated SVD."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from oplora_jax import solve
from oplora_jax.gradients.tangent import full_gradient
from oplora_jax.matrix import LowRank, Matrix, left_product, transposed
from oplora_jax.optimizers._factors import is_determined, orthonormal, wide
from oplora_jax.optimizers._facts import facts
from oplora_jax.optimizers._lift import at_step, each, lora_optimizer
from oplora_jax.products import compute_dtype, times, transpose
from oplora_jax.svd import svd


class MoFaSGDState(NamedTuple):
    """State of `mofasgd` at the LoRA parameters: trees of the parts of M = U S V^T, in float32 at least."""

    left: Any  # U at each LoRA parameter, (*batch, n, r), orthonormal columns
    values: Any  # the diagonal of S, (*batch, r), descending; all zero before the first gradient
    right: Any  # V^T, (*batch, r, m), orthonormal rows


@facts(gradient="exact", source="2507.08091", invariant="any")
def mofasgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: Any = 0.95,
    others: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""MoFaSGD: every direction of a rank-r momentum moves the full weight by the learning rate, as in Muon.

    In this project's experiments it was among the best on small networks, at a learning rate of 0.01.

    Args:
      learning_rate: a scalar or a schedule, the largest singular value of a step in the full weight.
      momentum: decay of the momentum. A gradient enters whole, not with a share of 1 - momentum.
      others: the optimizer of the leaves that are no LoRA parameters; `optax.adam` at the same learning rate
        if None.

    Returns:
      An Optax transformation. It takes exact gradients; of those of `jax.grad` it uses what
      `tangent_gradient` makes of them. Its state is the truncated SVD of the momentum, about the size of the
      LoRA parameters.

    Raises:
      ValueError: at the first update, a parameter whose rank is larger than n or m.

    With $G$ the gradient of the full weight, $M = U S V^\top$ the momentum, $P$ the increment,
    $P_U = U U^\top$ and $P_V = V V^\top$, a step is

    $$
    \begin{aligned}
    M &\leftarrow \mathrm{SVD}_r\,[\beta M + P_U G + G P_V - P_U G P_V] \\
    P &\leftarrow \mathrm{SVD}_r\,[P - \eta\, U V^\top]
    \end{aligned}
    $$

    for the learning rate $\eta$ and the momentum $\beta$. $\mathrm{SVD}_r$ is the best approximation of rank
    r; the sums in it are exact, and nothing n x m is formed. Directions whose singular value is rounding
    error do not move. The first momentum is the gradient, of rank r at most or close to its truncated SVD.
    After a step the factors are balanced, a^T a = b b^T.

    From [Low-rank momentum factorization (MoFaSGD)](https://arxiv.org/abs/2507.08091).

    Examples:
      >>> import jax.numpy as jnp, optax, oplora_jax
      >>> params = oplora_jax.LowRank(jnp.ones((3, 1)), jnp.zeros((1, 2)))
      >>> tx = oplora_jax.mofasgd(0.1)
      >>> updates, _ = tx.update(jnp.ones((3, 2)), tx.init(params), params)
      >>> step = oplora_jax.to_dense(optax.apply_updates(params, updates))
      >>> round(float(jnp.linalg.norm(step, 2)), 4)  # the largest singular value
      0.1
    """

    def init(param, _):
        dtype = compute_dtype(param.a, param.b)
        left, right = jnp.zeros_like(param.a, dtype), jnp.zeros_like(param.b, dtype)
        return MoFaSGDState(left, left.sum(-2), right)

    def step(param, gradient, state, count):
        gradient = full_gradient(param, gradient)
        left, right = _start(param, gradient, state)
        left, values, right = _add(left, state.values, right, gradient, momentum)
        direction = LowRank(transpose(left * is_determined(values)[..., :, None]), right)
        new = svd([(1.0, param), (-at_step(learning_rate, count), direction)], param.a.shape[-1], param.scale)
        return param.with_factors(new.a, new.b), MoFaSGDState(transpose(left), values, right)

    if others is None:
        others = optax.adam(learning_rate)
    return lora_optimizer(init, each(step), others=others, check=_fits)


def _fits(param: LowRank, _: Matrix) -> str | None:
    r, smaller = param.a.shape[-1], min(param.shape[-2:])
    return f"rank is {r}; matrices of shape {param.shape} need 1 to {smaller}" if r > smaller else None


def _start(param: LowRank, gradient: Matrix, state: MoFaSGDState) -> tuple[Array, Array]:
    """U^T and V^T; found from the gradient where the momentum is zero."""
    left, right = transpose(state.left), state.right
    fresh = jnp.all(state.values == 0, axis=-1)[..., None, None]

    def find():
        columns, _ = orthonormal(wide(param)[0])
        rows, _ = orthonormal(left_product(columns, gradient).astype(left.dtype))
        columns, _ = orthonormal(left_product(rows, transposed(gradient)).astype(left.dtype))
        return jnp.where(fresh, columns, left), jnp.where(fresh, rows, right)

    return jax.lax.cond(jnp.any(fresh), find, lambda: (left, right))


def _add(left: Array, values: Array, right: Array, gradient: Matrix, decay: Any) -> tuple[Array, ...]:
    """(U^T, S, V^T) of decay * M plus the gradient's projection on the tangent space at M, truncated."""
    dtype, r = left.dtype, left.shape[-2]
    columns = left_product(right, transposed(gradient)).astype(dtype)  # (G V)^T
    rows = left_product(left, gradient).astype(dtype)  # U^T G
    corner = times(left, transpose(columns))
    eye = jnp.broadcast_to(jnp.eye(r, dtype=dtype), corner.shape)
    # M and the projection in the spans of [U, G V] and [V, G^T U].
    blocks = [[decay * values[..., None, :] * eye - corner, eye], [eye, jnp.zeros_like(eye)]]
    q_left, r_left = solve.qr(transpose(jnp.concatenate([left, columns], axis=-2)))
    q_right, r_right = solve.qr(transpose(jnp.concatenate([right, rows], axis=-2)))
    u, values, vt = solve.svd(times(r_left, jnp.block(blocks), transpose(r_right)))
    left = times(transpose(u[..., :r]), transpose(q_left))
    return left, values[..., :r], times(vt[..., :r, :], transpose(q_right))
