"""The full gradient as far as plain factor gradients know it."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array

from oplora_jax.matrix import LowRank, Matrix, check_factors, left_product, right_product
from oplora_jax.products import compute_dtype, gram, times, transpose
from oplora_jax.sharding import specs_of, under_auto_sharding
from oplora_jax.solve import inverse
from oplora_jax.together import together


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
    project = lambda *pair: _projections([pair])[0]
    return under_auto_sharding(project, like, param, factor_gradients)


def _projections(pairs: Sequence[tuple[LowRank, LowRank]]) -> list[LowRank]:
    """The small inverses of all parameters are computed together."""
    factors = [wide for param, _ in pairs for wide in (transpose(param.a), param.b)]
    grams = [gram(wide.astype(compute_dtype(wide))) for wide in factors]
    inverses = together(lambda _, grams: inverse(grams, None), [None] * len(grams), grams)
    return [_projection(*z) for z in zip(pairs, inverses[::2], inverses[1::2], strict=True)]


@jax.jit
def _projection(pair: tuple[LowRank, LowRank], inverse_a: Array, inverse_b: Array) -> LowRank:
    param, gradients = pair
    dtype = compute_dtype(param.a, param.b)
    a, b = param.a.astype(dtype), param.b.astype(dtype)
    da, db = (z.astype(dtype) / param.scale for z in (gradients.a, gradients.b))
    row_space = times(inverse_b, b)
    columns = times(inverse_a, db - times(transpose(a), da, row_space))
    return LowRank(jnp.concatenate([a, da], axis=-1), jnp.concatenate([columns, row_space], axis=-2))


def full_gradient(param: LowRank, gradient: Matrix) -> Matrix:
    """The gradient of the full weight, from what stands at a LoRA parameter in a tree of gradients.

    An exact one as it is; of factor gradients (`jax.grad`) their `tangent_gradient`.

    Args:
      param: the LoRA parameter.
      gradient: an `OuterProduct`, a `DenseGradient` or an array, or the `LowRank` of factor gradients.
    """
    return tangent_gradient(param, gradient) if isinstance(gradient, LowRank) else gradient


def full_gradients(params: Sequence[LowRank], gradients: Sequence[Matrix]) -> list[Matrix]:
    """`full_gradient` of many parameters: the same with fewer kernels."""
    pairs = zip(params, gradients, strict=True)
    known = {i: pair for i, pair in enumerate(pairs) if isinstance(pair[1], LowRank)}
    projections = dict(zip(known, _projections([*known.values()]), strict=True))
    return [projections.get(i, gradient) for i, gradient in enumerate(gradients)]


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
