"""RefLoRA: the gradient at the most favourable split of a b into factors, for any optimizer."""

from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from oplora_jax import solve
from oplora_jax.gradients.tangent import factor_gradients
from oplora_jax.optimizers._factors import from_wide, is_determined, orthonormal, wide
from oplora_jax.optimizers._facts import facts
from oplora_jax.optimizers._lift import lora_transformation
from oplora_jax.optimizers._trees import mapped
from oplora_jax.products import times, transpose


class RefLoRAState(NamedTuple):
    """State of `reflora` beside that of its base."""

    count: Array  # int32 ()


@facts(gradient="factors", source="2505.18877", invariant="none", base=partial(optax.adamw, weight_decay=0.0))
def reflora(
    base: optax.GradientTransformation,
    *,
    warmup_steps: Any = 100,
    others: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""RefLoRA: any optimizer, on gradients that are rebalanced between the factors.

    Each factor gets the gradient that it would have if both were equally large.

    Args:
      base: an Optax transformation of factor gradients, learning rate included, such as `optax.adamw(1e-4)`.
      warmup_steps: how many steps pass the gradients on unchanged at first.
      others: the optimizer of the leaves that are no LoRA parameters; `base` if None.

    Returns:
      An Optax transformation that takes exact gradients and those of `jax.grad` alike. Its state is that of
      the base and a counter.

    Raises:
      ValueError: a negative warmup_steps.

    With $\partial a$, $\partial b$ the gradients of the factors, as of `jax.grad`, and $S$ the symmetric
    positive solution of $S\, a^\top a\, S = b b^\top$, the base is given

    $$
    \partial a\, S^{-1}, \qquad S\, \partial b.
    $$

    To first order that is a step of the base on a S^(1/2) and S^(-1/2) b, which are equally large in every
    direction, taken back to a and b. With SGD as the base the increment therefore does not depend on how it
    is split into factors; with an elementwise base such as Adam it does. Where a or b has not full rank, as
    at LoRA's start, there is no S, and the gradients pass unchanged.

    From [RefLoRA](https://arxiv.org/abs/2505.18877).

    Examples:
      >>> import jax.numpy as jnp, optax, oplora_jax
      >>> params = oplora_jax.LowRank(jnp.ones((2, 1)), jnp.full((1, 2), 4.0))  # S = 4
      >>> tx = oplora_jax.reflora(optax.sgd(0.1), warmup_steps=0)
      >>> updates, _ = tx.update(jnp.ones((2, 2)), tx.init(params), params)
      >>> bool(jnp.allclose(updates.a, -0.2) and jnp.allclose(updates.b, -0.8))  # not -0.8 and -0.2
      True
    """
    if isinstance(warmup_steps, int) and warmup_steps < 0:
        raise ValueError(f"warmup_steps is {warmup_steps}; expected 0 or more")

    init_fn = lambda _: RefLoRAState(jnp.zeros((), jnp.int32))

    def update_fn(updates, state, params=None):
        warm = state.count >= warmup_steps

        def refactored(param, gradient):
            dat, db = wide(factor_gradients(param, gradient))
            s, inverse, exists = refactoring(*wide(param))
            used = exists & warm
            dat, db = jnp.where(used, times(inverse, dat), dat), jnp.where(used, times(s, db), db)
            return from_wide(param, dat, db)

        return mapped(refactored, params, updates), RefLoRAState(optax.safe_increment(state.count))

    lora = optax.chain(optax.GradientTransformation(init_fn, update_fn), base)
    return lora_transformation(lora, others=base if others is None else others)


def refactoring(
    at: Float[Array, "*batch r n"], b: Float[Array, "*batch r m"]
) -> tuple[Float[Array, "*batch r r"], Float[Array, "*batch r r"], Array]:
    """(S, S^-1, whether they exist) for the factors a^T and b.

    With the triangles of both factors, a^T = La Qa and b = Lb Qb, and the decomposition U D V^T of La^T Lb,
    whose singular values are those of a b, S is Z D^-1 Z^T for Z = Lb V and its inverse the same for
    Z = La U. No Gram matrix is formed and nothing but the singular values is inverted.
    """
    triangle_a, triangle_b = orthonormal(at)[1], orthonormal(b)[1]
    u, values, vt = solve.svd(times(transpose(triangle_a), triangle_b))
    exists = jnp.all(is_determined(values), axis=-1)[..., None, None]
    values = jnp.where(exists, values[..., None, :], 1)

    def divided(triangle, vectors):
        z = times(triangle, vectors)
        return times(z / values, transpose(z))

    return divided(triangle_b, transpose(vt)), divided(triangle_a, u), exists
