"""The full gradient as far as plain factor gradients know it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

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
    return under_auto_sharding(_projection, like, param, factor_gradients)


def _projection(param: LowRank, gradients: LowRank) -> LowRank:
    dtype = compute_dtype(param.a, param.b)
    a, b = param.a.astype(dtype), param.b.astype(dtype)
    grams = [gram(transpose(a)), gram(b)]
    # Both at once: they have one shape.
    inverse_a, inverse_b = together(lambda _, grams: inverse(grams, None), [None, None], grams)
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


def of_full_gradients(step: Callable[..., Any]) -> Callable[..., Any]:
    """A step of many parameters that takes gradients of any kind, from one that takes full gradients.

    Where factor gradients come, their parameters are stacked by shape, and so is all that the step computes:
    few kernels to compile however many there are. Exact gradients stay where they are, since stacks of
    them would be copies as large as the activations.

    Args:
      step: (params, gradients, states, count) -> (new params, new states), lists, as `lora_optimizer` takes.
    """

    def step_of_any(params, gradients, states, count):
        rows = [*zip(params, gradients, states, strict=True)]
        known = [i for i, gradient in enumerate(gradients) if isinstance(gradient, LowRank)]
        exact = [i for i in range(len(rows)) if i not in set(known)]

        def step_of_stack(_, row):
            param, gradient, state = row
            return tuple(z for (z,) in step([param], [tangent_gradient(param, gradient)], [state], count))

        found = dict(
            zip(known, together(step_of_stack, [None] * len(known), [rows[i] for i in known]), strict=True)
        )
        if exact:
            columns = map(list, zip(*(rows[i] for i in exact), strict=True))
            found |= zip(exact, zip(*step(*columns, count), strict=True), strict=True)
        return tuple([found[i][part] for i in range(len(rows))] for part in (0, 1))

    return step_of_any


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
