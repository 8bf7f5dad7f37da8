"""Frozen parameters, whatever their gradients look like."""

import jax
import jax.numpy as jnp
import optax


def set_to_zero() -> optax.GradientTransformationExtraArgs:
    """`optax.set_to_zero` for any kind of gradient: the updates look like the parameters.

    Freezes LoRA parameters under `optax.partition`, where the zeros of an `OuterProduct` would not be
    increments of the factors.

    Example:
      >>> import jax.numpy as jnp, oplora_jax
      >>> params = oplora_jax.LowRank(jnp.ones((3, 1)), jnp.ones((1, 2)))
      >>> tx = oplora_jax.set_to_zero()
      >>> updates, _ = tx.update(jnp.ones((3, 2)), tx.init(params), params)
      >>> updates.b.tolist()
      [[0.0, 0.0]]
    """

    def update_fn(updates, state, params=None, **extra_args):
        del updates, extra_args
        if params is None:
            raise ValueError("set_to_zero makes updates like the parameters: pass params to update")
        return jax.tree.map(jnp.zeros_like, params), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update_fn)
