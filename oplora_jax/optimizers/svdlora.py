"""SVDLoRA: the full step, then the best approximation of rank r. The gold standard, at full cost."""

from functools import partial

import jax.numpy as jnp
import optax

from oplora_jax.gradients.tangent import full_gradient
from oplora_jax.matrix import LowRank, to_dense
from oplora_jax.optimizers._facts import facts
from oplora_jax.optimizers._lift import lora_transformation
from oplora_jax.optimizers._trees import mapped
from oplora_jax.svd import svd


@facts(gradient="exact", source="2509.19977", invariant="any", base=partial(optax.sgd, momentum=0.9))
def svdlora(
    base: optax.GradientTransformation,
    rank: int | None = None,
    *,
    others: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SVDLoRA: any optimizer on the full increment, truncated to rank r by an SVD after each step.

    The step that `oplora` approximates. It forms and decomposes every n x m matrix: for comparison, not for
    large models.

    Args:
      base: the optimizer of the full increment, learning rate included, such as
        `optax.sgd(0.1, momentum=0.9)`.
      rank: the rank after each step, at most that of the parameter; the parameter's if None.
      others: the optimizer of the leaves that are no LoRA parameters; `base` if None.

    Returns:
      An Optax transformation. It takes exact gradients; of those of `jax.grad` it uses what
      `tangent_gradient` makes of them. Its state is the base's for n x m matrices. After a step the factors
      are balanced, a^T a = b b^T.

    Raises:
      ValueError: a rank larger than a parameter's; a base whose state mixes parameters, as that of
        `optax.flatten`.

    From [OPLoRA](https://arxiv.org/abs/2509.19977), section 2.

    Examples:
      >>> import jax.numpy as jnp, optax, oplora_jax
      >>> params = oplora_jax.LowRank(jnp.ones((3, 1)), jnp.zeros((1, 2)))
      >>> tx = oplora_jax.svdlora(optax.sgd(1.0))
      >>> updates, state = tx.update(-jnp.ones((3, 2)), tx.init(params), params)
      >>> bool(jnp.allclose(oplora_jax.to_dense(optax.apply_updates(params, updates)), 1, atol=1e-5))
      True
    """
    dense_base = optax.with_extra_args_support(base)

    def update_fn(updates, state, params=None, **extra_args):
        dense = lambda param, gradient: to_dense(full_gradient(param, gradient)).astype(param.dtype)
        increments = mapped(to_dense, params)
        steps, state = dense_base.update(mapped(dense, params, updates), state, increments, **extra_args)

        def truncated(param, increment, step):
            r = param.a.shape[-1]
            if rank is not None and not 1 <= rank <= r:
                raise ValueError(f"rank is {rank}; a parameter of rank {r} takes 1 to {r}")
            new = svd([(1.0, increment), (1.0, step)], r if rank is None else rank, param.scale)
            return _difference(new, param)

        return mapped(truncated, params, increments, steps), state

    init_fn = lambda params: dense_base.init(mapped(to_dense, params))
    lora = optax.GradientTransformationExtraArgs(init_fn, update_fn)
    return lora_transformation(lora, others=base if others is None else others)


def _difference(new: LowRank, old: LowRank) -> LowRank:
    """The increments of the factors; columns that `new` lacks are zero."""
    missing = old.a.shape[-1] - new.a.shape[-1]
    batch = [(0, 0)] * (old.a.ndim - 2)
    a = jnp.pad(new.a, [*batch, (0, 0), (0, missing)])
    b = jnp.pad(new.b, [*batch, (0, missing), (0, 0)])
    return old.with_factors((a - old.a).astype(old.a.dtype), (b - old.b).astype(old.b.dtype))
