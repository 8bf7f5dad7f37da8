"""Frozen parameters, whatever their gradients look like."""

import jax
import jax.numpy as jnp
import optax


def set_to_zero() -> optax.GradientTransformationExtraArgs:
    """Frozen LoRA parameters: `optax.set_to_zero` that takes every kind of gradient.

    For `optax.partition`. Optax's own would make zeros like the gradient, and the zeros of an exact one
    (`OuterProduct`) are no increments of the factors; these updates look like the parameters.

    Returns:
      An Optax transformation without state.

    Examples:
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
