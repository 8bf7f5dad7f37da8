"""`value_and_grad` for NNX modules."""

import functools
from collections.abc import Callable
from typing import Any

from flax import nnx

from oplora_jax.gradients.value_and_grad import Kind, stateful_value_and_grad
from oplora_jax.metrics import Structure


def value_and_grad(
    loss_fn: Callable[..., Any],
    gradient: Kind = "auto",
    has_aux: bool = False,
    *,
    wrt: Any = nnx.LoRAParam,
    moments: Structure | None = None,
    microbatches: int | None = None,
    weight: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """`oplora_jax.value_and_grad` for a loss of an NNX module.

    Other state that the loss changes, such as batch statistics, is updated in the module, by each microbatch.

    Args:
      loss_fn: a function of (model, *args, **kwargs) that returns a scalar loss, or with `has_aux` a pair.
      wrt: an NNX filter, the variables to differentiate by; the same as the optimizer's.
      gradient, has_aux, moments, microbatches, weight: as for `oplora_jax.value_and_grad`.

    Returns:
      A function of (model, *args, **kwargs) that returns (value, gradients), the latter an `nnx.State` for
        `nnx.Optimizer.update(model, gradients)`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from flax import nnx
      >>> import oplora_jax
      >>> from oplora_jax.nnx import LoRALinear, value_and_grad
      >>> model = LoRALinear(4, 6, rank=2, rngs=nnx.Rngs(0))
      >>> optimizer = nnx.Optimizer(model, oplora_jax.oplora(0.1), wrt=nnx.LoRAParam)
      >>> loss_fn = lambda model, x: jnp.sum(model(x) ** 2)
      >>> loss, gradients = value_and_grad(loss_fn)(model, jnp.ones((1, 4)))
      >>> _ = optimizer.update(model, gradients)
      >>> bool(loss_fn(model, jnp.ones((1, 4))) < loss)
      True
    """

    @functools.wraps(loss_fn)
    def value_and_grad_fn(model: nnx.Module, *args: Any, **kwargs: Any) -> Any:
        graphdef, params, rest = nnx.split(model, wrt, ...)

        def pure_loss(params, rest, *args, **kwargs):
            inner = nnx.merge(graphdef, params, rest, copy=True)
            out = loss_fn(inner, *args, **kwargs)
            loss, aux = out if has_aux else (out, None)
            return loss, (aux, nnx.state(inner, nnx.Not(wrt)))

        differentiate = stateful_value_and_grad(pure_loss, gradient, moments, microbatches, weight)
        loss, (aux, rest_after), grads = differentiate(params, rest, args, kwargs)
        nnx.update(model, rest_after)
        return ((loss, aux) if has_aux else loss), grads

    return value_and_grad_fn
