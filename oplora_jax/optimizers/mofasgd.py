"""MoFaSGD: SGD along the singular directions of a momentum that is kept as a truncated SVD."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from oplora_jax.matrix import (
    HIGHEST,
    LowRank,
    Matrix,
    compute_dtype,
    finite_or_nan,
    left_product,
    matmul,
    right_product,
    transpose,
)
from oplora_jax.optimizers._factors import is_determined, orthonormal
from oplora_jax.optimizers._facts import facts
from oplora_jax.optimizers._lift import (
    at_step,
    difference,
    for_lora,
    full_gradient,
    map_lora,
)
from oplora_jax.svd import svd


class MoFaSGDState(NamedTuple):
    """State of `mofasgd` at the LoRA parameters: trees of the parts of M = U S V^T, in float32 at least."""

    count: Array  # int32 ()
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
    r"""MoFaSGD: a momentum M = U S V^T of rank r, and steps along U V^T.

    With G the gradient of the full weight, :math:`P_U = U U^\top` and :math:`P_V = V V^\top`,

    .. math::
      M &\leftarrow \mathrm{SVD}_r[\beta M + P_U G + G P_V - P_U G P_V] \\
      P &\leftarrow \mathrm{SVD}_r[P - \eta\, U V^\top].

    The first line goes through a QR of [U, G V] and of [V, G^T U] and the SVD of a 2r x 2r core, which
    represent the sum exactly before it is truncated; of G it needs two products with r columns, and nothing
    n x m is formed. The step is spectrally normalised: every direction of the momentum moves by eta, and
    those whose singular value is rounding error by nothing.

    The full weight may take such a step as it is. A LoRA parameter is brought back to its rank by the SVD
    of both matrices' factors, exact where `lorsum` would approximate: the decomposition is one of 2r columns,
    as large as the momentum's. After a step the factors are balanced, a^T a = b b^T.

    While the momentum is zero, U and V are found from the gradient by block power iteration: V spans the rows
    of a^T G, and U the columns of G V. So the first momentum is the gradient, if its rank is at most r, and
    close to its truncated SVD otherwise. The `LowRank` of factor gradients (`jax.grad`) stands for the
    projection on the tangent space at P.

    Args:
      learning_rate: eta, a scalar or a schedule: the spectral norm of a step in the full weight.
      momentum: beta. The gradient enters whole, not with a share of 1 - beta.
      others: for the leaves that are no LoRA parameters; `optax.adam` at the same learning rate if None,
        whose steps do not depend on the gradient's size either.

    Returns:
      An Optax transformation for any kind of gradient.

    Raises:
      ValueError: at the first update, a parameter whose rank is larger than n or m.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import oplora_jax
      >>> params = oplora_jax.LowRank(jnp.ones((3, 1)), jnp.zeros((1, 2)))
      >>> tx = oplora_jax.mofasgd(0.1)
      >>> gradients = jax.grad(lambda p: oplora_jax.to_dense(p).sum())(params)
      >>> updates, _ = tx.update(gradients, tx.init(params), params)
      >>> step = oplora_jax.to_dense(optax.apply_updates(params, updates))
      >>> round(float(jnp.linalg.norm(step, 2)), 4)  # the largest singular value
      0.1

    References:
      Low-rank momentum factorization (MoFaSGD), https://arxiv.org/abs/2507.08091.
    """

    def init_fn(params):
        return MoFaSGDState(jnp.zeros((), jnp.int32), *map_lora(_zero_momentum, 3, params))

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        lr = at_step(learning_rate, state.count)

        def step(param, gradient, left, values, right):
            gradient = full_gradient(param, gradient)
            left, right = _start(param, gradient, left, values, right)
            left, values, right = _add(left, values, right, gradient, momentum)
            direction = LowRank(left * is_determined(values)[..., None, :], right)
            new = svd([(1.0, param), (-lr, direction)], param.a.shape[-1], param.scale)
            return difference(new, param), left, values, right

        updates, *parts = map_lora(step, 4, params, updates, state.left, state.values, state.right)
        return updates, MoFaSGDState(optax.safe_increment(state.count), *parts)

    if others is None:
        others = optax.adam(learning_rate)
    return for_lora(optax.GradientTransformation(init_fn, update_fn), others)


def _zero_momentum(param: LowRank) -> tuple[Array, Array, Array]:
    dtype = compute_dtype(param.a, param.b)
    left, right = jnp.zeros_like(param.a, dtype), jnp.zeros_like(param.b, dtype)
    return left, left.sum(-2), right


def _start(param: LowRank, gradient: Matrix, left: Array, values: Array, right: Array) -> tuple[Array, Array]:
    """U and V^T; found from the gradient where the momentum is zero."""
    fresh = jnp.all(values == 0, axis=-1)[..., None, None]

    def find():
        columns, _ = orthonormal(param.a.astype(left.dtype))
        rows, _ = orthonormal(transpose(left_product(transpose(columns), gradient)).astype(left.dtype))
        columns, _ = orthonormal(right_product(gradient, rows).astype(left.dtype))
        return jnp.where(fresh, columns, left), jnp.where(fresh, transpose(rows), right)

    return jax.lax.cond(jnp.any(fresh), find, lambda: (left, right))


def _add(
    left: Array, values: Array, right: Array, gradient: Matrix, decay: Any
) -> tuple[Array, Array, Array]:
    """The truncated SVD of decay * M plus the gradient's projection on the tangent space at M = U S V^T."""
    dtype, r = left.dtype, left.shape[-1]
    columns = right_product(gradient, transpose(right)).astype(dtype)  # G V
    rows = left_product(transpose(left), gradient).astype(dtype)  # U^T G
    corner = matmul(transpose(left), columns, HIGHEST)
    eye = jnp.broadcast_to(jnp.eye(r, dtype=dtype), corner.shape)
    # M and the projection in the spans of [U, G V] and [V, G^T U].
    blocks = [[decay * values[..., None, :] * eye - corner, eye], [eye, jnp.zeros_like(eye)]]
    q_left, r_left = jnp.linalg.qr(jnp.concatenate([left, columns], axis=-1))
    q_right, r_right = jnp.linalg.qr(transpose(jnp.concatenate([right, rows], axis=-2)))
    core = matmul(matmul(r_left, jnp.block(blocks), HIGHEST), transpose(r_right), HIGHEST)
    u, values, vt = jnp.linalg.svd(finite_or_nan(core), full_matrices=False)
    left = matmul(q_left, u[..., :r], HIGHEST)
    right = matmul(vt[..., :r, :], transpose(q_right), HIGHEST)
    return left, values[..., :r], right
