"""What every LoRA optimizer shares: the walk over a tree's LoRA parameters, and what guards it."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from oplora_jax.gradients.tangent import factor_gradients, tangent_gradient
from oplora_jax.matrix import LowRank, Matrix, OuterProduct, check_factors, is_low_rank
from oplora_jax.optimizers.finite import skip_nonfinite
from oplora_jax.optimizers.precision import with_state_dtype
from oplora_jax.sharding import specs_of, under_auto_sharding


class LoRAState(NamedTuple):
    """State of an optimizer for trees of LoRA parameters and other leaves."""

    lora: optax.OptState
    others: optax.OptState
    skipped: Array  # int32 (): updates of single LoRA parameters left out for a non-finite value


def for_lora(
    lora: optax.GradientTransformation,
    others: optax.GradientTransformation,
    *,
    state_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """`lora` for the `LowRank` nodes of the parameters, `others` for the rest.

    `lora` sees trees with an `optax.MaskedNode` in the place of every other leaf. A LoRA parameter whose
    update or new state would not be finite keeps its old value and state, and is counted in `skipped`.

    Args:
      lora: takes, at each `LowRank` parameter, a matrix or the `LowRank` of its factor gradients; returns a
        `LowRank` of increments.
      others: any transformation.
      state_dtype: of the `LowRank` nodes of the state, the momenta; as `lora` makes them if None. Steps,
        of `others` too, are computed in this type if it is wider than the parameters'.

    Raises:
      ValueError: a state_dtype that is not of floating point; at the first update, params=None or a
        gradient that does not fit its parameter.
    """
    lora, others = (with_state_dtype(tx, state_dtype) for tx in (lora, others))

    def init_fn(params):
        for path, node in jax.tree.leaves_with_path(params, is_leaf=is_low_rank):
            if is_low_rank(node):
                check_factors(node, jax.tree_util.keystr(path) or "the LoRA parameter")
        of_lora, of_others = _split(params, params)
        return LoRAState(lora.init(of_lora), others.init(of_others), skipped=jnp.zeros((), jnp.int32))

    def update_fn(updates, state, params=None, **extra_args):
        if params is None:
            raise ValueError(
                "a LoRA optimizer's step depends on the parameters: call update(updates, state, params)"
            )
        _check_gradients(updates, params)
        lora_params, other_params = _split(params, params)
        lora_updates, other_updates = _split(updates, params)
        old_state = optax.tree.map_params(
            lora, _restore_nodes, state.lora, lora_params, is_leaf=lambda _: True
        )

        def step(updates, state, params):
            return skip_nonfinite(lora, *lora.update(updates, state, params, **extra_args), state)

        like = lambda: specs_of((lora_params, old_state, state.skipped))
        lora_updates, lora_state, skipped = under_auto_sharding(
            step, like, lora_updates, old_state, lora_params
        )
        other_updates, other_state = others.update(other_updates, state.others, other_params, **extra_args)
        updates = jax.tree.map(
            lambda p, u, v: u if is_low_rank(p) else v,
            params,
            lora_updates,
            other_updates,
            is_leaf=is_low_rank,
        )
        return updates, LoRAState(lora_state, other_state, state.skipped + skipped)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def set_to_zero() -> optax.GradientTransformationExtraArgs:
    """`optax.set_to_zero` for any kind of gradient: the updates look like the parameters.

    Freezes LoRA parameters under `optax.partition`, where the zeros of an `OuterProduct` would not be
    increments of the factors.

    Example:
      >>> import jax.numpy as jnp
      >>> import oplora_jax
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


def map_lora(function: Callable[..., tuple], num_outputs: int, params: Any, *rest: Any) -> tuple:
    """Maps a function with several results over the LoRA parameters of a tree; one tree for each result."""
    nodes, treedef = jax.tree.flatten(params, is_leaf=is_low_rank)
    rest = [treedef.flatten_up_to(tree) for tree in rest]
    results = [function(*arguments) for arguments in zip(nodes, *rest, strict=True)]
    columns = zip(*results, strict=True) if results else [()] * num_outputs
    return tuple(treedef.unflatten(column) for column in columns)


def full_gradient(param: LowRank, gradient: Matrix) -> Matrix:
    """The gradient of the full weight: exact, or projected on the tangent space from factor gradients."""
    return tangent_gradient(param, gradient) if isinstance(gradient, LowRank) else gradient


def plain_gradient(param: LowRank, gradient: Matrix) -> LowRank:
    """The factor gradients in the factors' types, as `jax.grad` returns them."""
    if not isinstance(gradient, LowRank):
        gradient = factor_gradients(param, gradient)
    return LowRank(gradient.a.astype(param.a.dtype), gradient.b.astype(param.b.dtype), param.scale)


def on_factor(
    transformation: optax.GradientTransformation, factor: Literal["a", "b"]
) -> optax.GradientTransformationExtraArgs:
    """A transformation of plain arrays for one factor of the LoRA parameters; the other passes unchanged.

    There is no state for the other: `optax.MaskedNode` stands in its place.
    """

    def mask(tree):
        of_one = lambda node: LowRank(factor == "a", factor == "b", node.scale)
        return jax.tree.map(of_one, tree, is_leaf=is_low_rank)

    return optax.masked(transformation, mask)


def difference(new: LowRank, old: LowRank) -> LowRank:
    """The increments of the factors, in the types of the old ones; columns that `new` lacks are zero."""
    kept = new.a.shape[-1]
    if kept == old.a.shape[-1]:
        return LowRank((new.a - old.a).astype(old.a.dtype), (new.b - old.b).astype(old.b.dtype), old.scale)
    delta_a = (-old.a.astype(new.a.dtype)).at[..., :kept].add(new.a)
    delta_b = (-old.b.astype(new.b.dtype)).at[..., :kept, :].add(new.b)
    return LowRank(delta_a.astype(old.a.dtype), delta_b.astype(old.b.dtype), old.scale)


def at_step(learning_rate: optax.ScalarOrSchedule, count: Array) -> Array:
    """The learning rate of a step, a float32 scalar at least."""
    value = jnp.asarray(learning_rate(count) if callable(learning_rate) else learning_rate)
    if value.ndim != 0:
        raise ValueError(f"learning_rate has shape {value.shape}; expected a scalar or a schedule of one")
    return value.astype(jnp.promote_types(value.dtype, jnp.float32))


def is_zero(value: Any) -> bool:
    """Whether a hyperparameter is known to be zero or None, and what it multiplies need not exist."""
    return value is None or (isinstance(value, int | float) and value == 0)


def _restore_nodes(like_params: Any, params: Any) -> Any:
    """`LowRank` nodes where a container has made dicts of them, as `nnx.Optimizer` does."""
    nodes, treedef = jax.tree.flatten(params, is_leaf=is_low_rank)
    parts = treedef.flatten_up_to(like_params)
    # Such a container drops a factor without state.
    factor = lambda part, name: part[name] if name in part else optax.MaskedNode()
    return treedef.unflatten(
        LowRank(factor(part, "a"), factor(part, "b"), node.scale)
        if isinstance(part, Mapping) and set(part) <= {"a", "b"}
        else part
        for node, part in zip(nodes, parts, strict=True)
    )


def _split(tree: Any, params: Any) -> tuple[Any, Any]:
    """(the LoRA parameters' part, the others' part) of a tree, each with the rest masked."""
    nodes, treedef = jax.tree.flatten(params, is_leaf=is_low_rank)
    parts = treedef.flatten_up_to(tree)
    pick = lambda lora: treedef.unflatten(
        part if is_low_rank(node) == lora else optax.MaskedNode()
        for node, part in zip(nodes, parts, strict=True)
    )
    return pick(True), pick(False)


def _check_gradients(updates: Any, params: Any) -> None:
    paths_and_nodes, treedef = jax.tree.flatten_with_path(params, is_leaf=is_low_rank)
    try:
        gradients = treedef.flatten_up_to(updates)
    except ValueError as error:
        raise ValueError(f"the tree of gradients does not have the parameters' structure: {error}") from error
    for (path, param), gradient in zip(paths_and_nodes, gradients, strict=True):
        if not is_low_rank(param):
            continue
        name = jax.tree_util.keystr(path) or "the LoRA parameter"
        check_factors(param, name)
        if isinstance(gradient, LowRank):
            got = jnp.shape(gradient.a), jnp.shape(gradient.b)
            expected = param.a.shape, param.b.shape
        elif isinstance(gradient, OuterProduct) or hasattr(gradient, "shape"):
            got, expected = gradient.shape, param.shape
        else:
            raise ValueError(
                f"{name}: the gradient is {type(gradient).__name__}; expected an OuterProduct or an array "
                f"of shape {param.shape} (oplora_jax.value_and_grad), or a LowRank of factor gradients "
                "(jax.grad)"
            )
        if got != expected:
            raise ValueError(f"{name}: the gradient has shape {got}; the parameter needs {expected}")
