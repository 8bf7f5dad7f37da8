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
    r"""What the gradients of the factors tell of the gradient of the full weight, as a matrix of rank 2 r.

    It is the part of the full gradient G that a small change of both factors can follow. Where there is no
    exact gradient, but that of `jax.grad`, the optimizers that need G take this in its place.

    Args:
      param: the LoRA parameter, a `(*batch, n, r)` and b `(*batch, r, m)`.
      factor_gradients: what `jax.grad` returns at it.

    Returns:
      A `LowRank` with factors `(*batch, n, 2r)` and `(*batch, 2r, m)`, in float32 at least.

    Raises:
      ValueError: shapes that do not fit.

    With $P_a = a (a^\top a)^+ a^\top$ and $P_b = b^\top (b b^\top)^+ b$, which project on the columns of a
    and on the rows of b, it is

    $$
    P_a G + G P_b - P_a G P_b,
    $$

    the projection of G on the tangent space of the matrices of rank r at a b. The gradients
    $\partial a = s\,G b^\top$ and $\partial b = s\,a^\top G$ determine it.

    From [Riemannian optimization on fixed-rank matrices](https://arxiv.org/abs/1209.3834), section 2.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from oplora_jax import LowRank, tangent_gradient, to_dense
      >>> param = LowRank(jnp.array([[1.0], [0.0]]), jnp.array([[0.0, 2.0]]))
      >>> gradients = jax.grad(lambda p: to_dense(p).sum())(param)
      >>> jnp.round(to_dense(tangent_gradient(param, gradients)), 4).tolist()
      [[1.0, 1.0], [0.0, 1.0]]
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
    """The gradient of the full weight, from any kind of gradient of a LoRA parameter.

    For optimizers of your own: an exact gradient is returned as it is, and of those of `jax.grad` their
    `tangent_gradient`.

    Args:
      param: the LoRA parameter.
      gradient: an `OuterProduct`, a `DenseGradient`, an array, or the `LowRank` of factor gradients.

    Returns:
      A matrix of the parameter's shape, of any kind; `to_dense` makes an array of it.

    Examples:
      >>> import jax.numpy as jnp
      >>> from oplora_jax import LowRank, full_gradient, to_dense
      >>> param = LowRank(jnp.array([[1.0], [0.0]]), jnp.array([[0.0, 1.0]]))
      >>> factors = LowRank(jnp.array([[2.0], [3.0]]), jnp.array([[5.0, 2.0]]))
      >>> to_dense(full_gradient(param, factors)).tolist()
      [[5.0, 2.0], [0.0, 3.0]]
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
    r"""The gradients of the factors, from any kind of gradient of a LoRA parameter.

    For optimizers of your own: those of `jax.grad` are returned as they are, and of an exact one what
    `jax.grad` would have returned.

    Args:
      param: the LoRA parameter.
      gradient: an `OuterProduct`, a `DenseGradient`, an array, or the `LowRank` of factor gradients.

    Returns:
      A `LowRank` of the two gradients, in float32 at least where they are computed here.

    With $G$ the gradient of the full weight they are $\partial a = s\,G b^\top$ and
    $\partial b = s\,a^\top G$.

    Examples:
      >>> import jax.numpy as jnp
      >>> from oplora_jax import LowRank, factor_gradients
      >>> param = LowRank(jnp.array([[1.0], [2.0]]), jnp.array([[3.0, 4.0]]), scale=2.0)
      >>> gradients = factor_gradients(param, jnp.ones((2, 2)))
      >>> gradients.a.tolist(), gradients.b.tolist()
      ([[14.0], [14.0]], [[6.0, 6.0]])
    """
    if isinstance(gradient, LowRank):
        return gradient
    da = param.scale * right_product(gradient, transpose(param.b))
    return param.with_factors(da, param.scale * left_product(transpose(param.a), gradient))
