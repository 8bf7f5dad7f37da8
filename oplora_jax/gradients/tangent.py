"""The full gradient as far as plain factor gradients know it."""

import jax
import jax.numpy as jnp

from oplora_jax.matrix import (
    HIGHEST,
    LowRank,
    Matrix,
    check_factors,
    compute_dtype,
    left_product,
    matmul,
    right_product,
    transpose,
)
from oplora_jax.sharding import specs_of, under_auto_sharding
from oplora_jax.solve import inverse


def tangent_gradient(param: LowRank, factor_gradients: LowRank) -> LowRank:
    r"""The projection of the full gradient on the tangent space at s a b, from plain factor gradients.

    With :math:`P_a = a (a^\top a)^+ a^\top` and :math:`P_b = b^\top (b b^\top)^+ b` the projection is
    :math:`P_a G + G P_b - P_a G P_b`, which :math:`\partial a = s\,G b^\top` and
    :math:`\partial b = s\,a^\top G` determine. It is exact to first order: a step along it is a Riemannian
    gradient step.

    Args:
      param: the LoRA parameter, a (*batch, n, r) and b (*batch, r, m).
      factor_gradients: what `jax.grad` returns at it.

    Returns:
      A matrix of rank 2r: a `LowRank` with factors (*batch, n, 2r) and (*batch, 2r, m), in float32 at least.

    Raises:
      ValueError: shapes that do not fit.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from oplora_jax import LowRank, tangent_gradient, to_dense
      >>> param = LowRank(jnp.array([[1.0], [0.0]]), jnp.array([[0.0, 2.0]]))
      >>> gradients = jax.grad(lambda p: to_dense(p).sum())(param)
      >>> jnp.round(to_dense(tangent_gradient(param, gradients)), 4).tolist()
      [[1.0, 1.0], [0.0, 1.0]]

    References:
      Riemannian optimization on fixed-rank matrices, https://arxiv.org/abs/1209.3834, section 2.
    """
    check_factors(param, "param")
    shapes = [(jnp.shape(z.a), jnp.shape(z.b)) for z in (param, factor_gradients)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"the factor gradients have shapes {shapes[1]}, the factors {shapes[0]}")
    like = lambda: LowRank(*jax.tree.leaves(specs_of(param)))
    return under_auto_sharding(_tangent_gradient, like, param, factor_gradients)


def _tangent_gradient(param: LowRank, gradients: LowRank) -> LowRank:
    dtype = compute_dtype(param.a, param.b)
    a, b = param.a.astype(dtype), param.b.astype(dtype)
    da, db = (z.astype(dtype) / param.scale for z in (gradients.a, gradients.b))
    inverse_a = inverse(matmul(transpose(a), a, HIGHEST), None)
    row_space = matmul(inverse(matmul(b, transpose(b), HIGHEST), None), b, HIGHEST)
    both = matmul(matmul(transpose(a), da, HIGHEST), row_space, HIGHEST)
    columns = matmul(inverse_a, db - both, HIGHEST)
    return LowRank(jnp.concatenate([a, da], axis=-1), jnp.concatenate([columns, row_space], axis=-2))


def full_gradient(param: LowRank, gradient: Matrix) -> Matrix:
    """The gradient of the full weight, from what stands at a LoRA parameter in a tree of gradients.

    An exact one as it is; of factor gradients (`jax.grad`) their `tangent_gradient`.

    Args:
      param: the LoRA parameter.
      gradient: an `OuterProduct`, a `DenseGradient` or an array, or the `LowRank` of factor gradients.
    """
    return tangent_gradient(param, gradient) if isinstance(gradient, LowRank) else gradient


def factor_gradients(param: LowRank, gradient: Matrix) -> LowRank:
    r"""The gradients of the factors, from what stands at a LoRA parameter in a tree of gradients.

    Those of `jax.grad` as they are; of an exact one G what `jax.grad` would return,
    :math:`\partial a = s\,G b^\top` and :math:`\partial b = s\,a^\top G`, in float32 at least.

    Args:
      param: the LoRA parameter.
      gradient: an `OuterProduct`, a `DenseGradient` or an array, or the `LowRank` of factor gradients.
    """
    if isinstance(gradient, LowRank):
        return gradient
    da = param.scale * right_product(gradient, transpose(param.b))
    return param.with_factors(da, param.scale * left_product(transpose(param.a), gradient))
