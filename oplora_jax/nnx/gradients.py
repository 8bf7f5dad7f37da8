"""`value_and_grad` for NNX modules."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
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

    Other state that the loss changes is updated as by `flax.nnx.value_and_grad`: batch statistics of the
    model, and random streams, metrics or a teacher among the other arguments.

    Args:
      loss_fn: a function of `(model, *args, **kwargs)` that returns a scalar loss, or with `has_aux` a pair.
        Any argument may be an NNX object, or hold some in containers.
      gradient: as for `oplora_jax.value_and_grad`.
      has_aux: whether the loss returns a pair of the loss and auxiliary data.
      wrt: an NNX filter, the model's variables to differentiate by; the same as the optimizer's.
      moments: as for `oplora_jax.value_and_grad`.
      microbatches: as for `oplora_jax.value_and_grad`. The arrays outside of NNX objects are the batch; each
        microbatch sees, and updates, all NNX objects.
      weight: as for `oplora_jax.value_and_grad`.

    Returns:
      A function of `(model, *args, **kwargs)` that returns (value, gradients), the latter an `nnx.State` for
      `nnx.Optimizer.update(model, gradients)`.

    Raises:
      ValueError: as for `oplora_jax.value_and_grad`; with microbatches, a loss that makes new variables.

    Examples:
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

    is_wrt = nnx.filterlib.to_predicate(wrt)
    in_model = lambda path, value: path[0] == 0 and is_wrt(path[1:], value)

    @functools.wraps(loss_fn)
    def value_and_grad_fn(model: nnx.Module, /, *args: Any, **kwargs: Any) -> Any:
        leaves, treedef = jax.tree.flatten((args, kwargs), is_leaf=_is_object)
        # All at once: they may share variables with the model, and with each other.
        objects = (model, *filter(_is_object, leaves))
        graphdef, params, rest = nnx.split(objects, in_model, ...)
        places = map(_Place, range(1, len(objects)))
        args, kwargs = treedef.unflatten(next(places) if _is_object(leaf) else leaf for leaf in leaves)

        def pure_loss(params, rest, /, *args, **kwargs):
            inner = nnx.merge(graphdef, nnx.State({0: params}), rest, copy=True)
            at_places = lambda leaf: inner[leaf.index] if isinstance(leaf, _Place) else leaf
            args, kwargs = jax.tree.map(at_places, (args, kwargs), is_leaf=lambda z: isinstance(z, _Place))
            out = loss_fn(inner[0], *args, **kwargs)
            loss, aux = out if has_aux else (out, None)
            after = nnx.state(inner, nnx.Not(in_model))
            new = [] if microbatches is None else sorted(_paths(after) - _paths(rest))
            if new:
                raise ValueError(
                    f"microbatches={microbatches}: the loss makes the variables {', '.join(new)}, which one "
                    "microbatch cannot hand to the next. Make them before, or return them as auxiliary data"
                )
            return loss, (aux, after)

        differentiate = stateful_value_and_grad(pure_loss, gradient, moments, microbatches, weight)
        loss, (aux, rest_after), grads = differentiate(params.get(0, nnx.State({})), rest, args, kwargs)
        nnx.update(objects, rest_after)
        return ((loss, aux) if has_aux else loss), grads

    return value_and_grad_fn


class _Place(NamedTuple):
    """Where an NNX object stands among the arguments, and its number."""

    index: int


def _paths(state: Any) -> set[str]:
    """The variables' paths within their objects."""
    return {"/".join(map(str, path[1:])) for path, _ in nnx.to_flat_state(state)}


def _is_object(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Variable | nnx.Pytree)
