"""Exact gradients for the modules of Equinox.

A `LowRank` is a field of a module like any other. The weights of `equinox.nn.Linear` are (out, in), the
kernels of `lora_dot` (in, out): a layer that puts LoRA on one transposes its weight, and stands in its place.
`init_lora` and `merge` take modules too, for LoRA beside a model that stays as it is; that needs no more than
`oplora_jax.value_and_grad`. `optax.partition` calls a tree of labels that is a module with ``__call__``: give
it ``lambda _: labels``.

Examples:
  >>> import equinox as eqx, jax, jax.numpy as jnp
  >>> import oplora_jax
  >>> from oplora_jax.equinox import value_and_grad
  >>> class LoRALinear(eqx.Module):
  ...   linear: eqx.nn.Linear
  ...   lora: oplora_jax.LowRank
  ...   def __init__(self, linear, rank, alpha, *, key):
  ...     self.linear = linear
  ...     kernel = {"kernel": linear.weight.T}
  ...     self.lora = oplora_jax.init_lora(key, kernel, rank, "kernel", alpha=alpha)["kernel"]
  ...   def __call__(self, x, *, key=None):
  ...     y = oplora_jax.lora_dot(x, self.linear.weight.T, self.lora)
  ...     return y if self.linear.bias is None else y + self.linear.bias

  On two projections of an attention:

  >>> k = jax.random.split(jax.random.key(0), 4)
  >>> attention = eqx.nn.MultiheadAttention(num_heads=2, query_size=8, key=k[0])
  >>> chosen = lambda attention: (attention.query_proj, attention.value_proj)
  >>> layers = [LoRALinear(z, 2, 4.0, key=one) for z, one in zip(chosen(attention), k[1:3])]
  >>> model = eqx.tree_at(chosen, attention, layers)
  >>> tx, x = oplora_jax.oplora(0.1), jax.random.normal(k[3], (4, 5, 8))  # a batch of 4, 5 tokens each
  >>> loss_fn = lambda model, x: jnp.mean((jax.vmap(model)(x, x, x) - 1.0) ** 2)
  >>> trained = lambda model: eqx.filter(model, oplora_jax.is_low_rank, is_leaf=oplora_jax.is_low_rank)
  >>> @eqx.filter_jit
  ... def step(model, state, x):
  ...   loss, gradients = value_and_grad(loss_fn)(model, x)
  ...   updates, state = tx.update(gradients, state, trained(model))
  ...   return eqx.apply_updates(model, updates), state, loss
  >>> state = tx.init(trained(model))
  >>> model, state, before = step(model, state, x)
  >>> bool(loss_fn(model, x) < before)
  True
"""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from oplora_jax.gradients.value_and_grad import Kind, name_of
from oplora_jax.gradients.value_and_grad import value_and_grad as value_and_grad_of_trees
from oplora_jax.matrix import LowRank, is_low_rank
from oplora_jax.metrics import Structure


def value_and_grad(
    loss_fn: Callable[..., Any],
    gradient: Kind = "auto",
    has_aux: bool = False,
    *,
    filter_spec: Any = is_low_rank,
    moments: Structure | None = None,
    microbatches: int | None = None,
    weight: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """`oplora_jax.value_and_grad` for a loss of an Equinox module.

    Like `equinox.filter_value_and_grad`, it leaves the rest of the module alone: functions, integers, and
    what is frozen.

    Args:
      loss_fn: a function of `(model, *args, **kwargs)` that returns a scalar loss, or with `has_aux` a pair.
      gradient: as for `oplora_jax.value_and_grad`.
      has_aux: whether the loss returns a pair of the loss and auxiliary data.
      filter_spec: what of the model to differentiate by, a tree as for `equinox.filter`: a prefix of the
        model, of True, False and functions. A function is asked about LoRA parameters as a whole and about
        arrays. `is_low_rank`, the default, takes the LoRA parameters, `equinox.is_inexact_array` everything.
      moments: as for `oplora_jax.value_and_grad`.
      microbatches: as for `oplora_jax.value_and_grad`.
      weight: as for `oplora_jax.value_and_grad`.

    Returns:
      A function of `(model, *args, **kwargs)` that returns (value, gradients), the latter a tree like
      `equinox.filter(model, filter_spec)`, which the optimizer takes for its parameters: with `is_low_rank`
      that is `equinox.filter(model, is_low_rank, is_leaf=is_low_rank)`. `equinox.apply_updates` adds the
      updates.

    Raises:
      ValueError: a filter that leaves nothing, or one factor of a LoRA parameter; and what
        `oplora_jax.value_and_grad` raises.

    Examples:
      >>> import equinox as eqx, jax, jax.numpy as jnp
      >>> from oplora_jax import LowRank, lora_dot
      >>> from oplora_jax.equinox import value_and_grad
      >>> class Model(eqx.Module):
      ...   kernel: jax.Array
      ...   lora: LowRank
      ...   activation: callable = jnp.sin
      ...   def __call__(self, x):
      ...     return self.activation(lora_dot(x, self.kernel, self.lora))
      >>> model = Model(jnp.zeros((3, 2)), LowRank(jnp.ones((3, 1)), jnp.zeros((1, 2))))
      >>> loss, gradients = value_and_grad(lambda model, x: model(x).sum())(model, jnp.ones(3))
      >>> gradients.kernel, gradients.lora.to_dense().tolist()
      (None, [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]])
    """

    @functools.wraps(loss_fn)
    def value_and_grad_fn(model: Any, /, *args: Any, **kwargs: Any) -> Any:
        # As `equinox.filter_jit` takes them: JAX 0.10 fails at NumPy's arrays under a `jax.vmap` in the loss.
        as_jax = lambda z: jnp.asarray(z) if isinstance(z, np.ndarray) else z
        model, args, kwargs = jax.tree.map(as_jax, (model, args, kwargs))
        params, static = eqx.partition(model, _asked(filter_spec, model))
        _check(params)

        def loss_of(params: Any, /, *args: Any, **kwargs: Any) -> Any:
            return loss_fn(eqx.combine(params, static), *args, **kwargs)

        others = {"moments": moments, "microbatches": microbatches, "weight": weight}
        return value_and_grad_of_trees(loss_of, gradient, has_aux, **others)(params, *args, **kwargs)

    return value_and_grad_fn


def _asked(filter_spec: Any, model: Any) -> Any:
    """The filter spec with its functions asked, about whole LoRA parameters too."""

    def answers(spec: Any, part: Any) -> Any:
        if not callable(spec):
            return spec
        answer = lambda node: jax.tree.map(lambda leaf: bool(spec(node) or spec(leaf)), node)
        return jax.tree.map(answer, part, is_leaf=is_low_rank)

    return jax.tree.map(answers, filter_spec, model)


def _check(params: Any) -> None:
    """Raises ValueError unless something is left of the model, and LoRA parameters are whole."""
    if not jax.tree.leaves(params):
        raise ValueError(
            "filter_spec leaves nothing of the model to differentiate by; expected LoRA parameters, "
            "LowRank nodes that stand in the layers, or arrays"
        )
    for path, node in jax.tree.leaves_with_path(params, is_leaf=lambda z: isinstance(z, LowRank)):
        if isinstance(node, LowRank) and len(jax.tree.leaves(node)) == 1:
            raise ValueError(
                f"{name_of(path)}: filter_spec leaves one factor of this LoRA parameter; expected both, or "
                "none. oplora_jax.lora_fa trains b alone"
            )
