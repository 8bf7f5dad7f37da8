"""An optimizer as a step of LoRA parameters, lifted to trees of parameters."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from oplora_jax.matrix import LowRank, check_factors, is_low_rank
from oplora_jax.optimizers._trees import (
    checked_gradients,
    is_column,
    names,
    owners,
    split,
    walk,
    warn_of_no_lora,
)
from oplora_jax.optimizers._types import cast, cast_up, check_state_dtype, in_dtype, widest
from oplora_jax.sharding import specs_of, under_auto_sharding


class LoRAState(NamedTuple):
    """State of an optimizer for trees of LoRA parameters and other leaves."""

    count: Array  # int32 (): steps
    lora: optax.OptState
    others: optax.OptState
    skipped: Array  # int32 (): steps of single LoRA parameters that were left out, being not finite


def lora_optimizer(
    init: Callable[[LowRank, Array], Any],
    step: Callable[..., tuple[Sequence[LowRank], Sequence[Any]]],
    *,
    others: optax.GradientTransformation,
    state_dtype: Any = None,
    check: Callable[[LowRank, Any], str | None] | None = None,
    joint: str | None = None,
    seed: Any = 0,
) -> optax.GradientTransformationExtraArgs:
    """An Optax optimizer from the formula for a step of LoRA parameters: all there is to write.

    Done here are the walk over the tree and its checks; types, with parameters and states in float32 at least
    within the step and rounded once behind it; steps that are not finite, which are left out and counted in
    `skipped` of the state; and meshes.

    Args:
      init: (param, key) -> state, of one LoRA parameter: a NamedTuple of arrays, `LowRank` matrices and None,
        of the same structure for every parameter, as one of shape (1, 1) shows. For `value_and_update` its
        arrays begin with the batch axes of the parameter. What is made from the parameter's own arrays, by
        `jnp.zeros_like` for example, lies on a mesh as they do.
      step: (params, gradients, states, count) -> (new params, new states), lists with one entry for each LoRA
        parameter; `each` makes it from a step of one. A gradient is of any kind: `full_gradient` and
        `factor_gradients` make of each what a formula needs. count is the number of steps before this one, an
        int32 to evaluate schedules at.
      others: the optimizer of the leaves that are no LoRA parameters.
      state_dtype: the type that the `LowRank` matrices of the states are kept in; as `init` makes them if
        None. Steps, of `others` too, are computed in this type if it is wider than the parameters'.
      check: (param, gradient) -> what is wrong with them, or None: raised with the parameter's path.
      joint: None where each parameter steps by itself. Otherwise what ties them together, such as "max_norm
        is 1.0": `value_and_update`, which steps one parameter at a time, refuses with these words.
      seed: of the keys that `init` is given.

    Returns:
      An Optax transformation that takes every kind of gradient. Its state has the fields of your NamedTuple
      as trees with one entry at every LoRA parameter: ``optax.tree.get(state, "momentum")``.

    Raises:
      ValueError: a state_dtype that is not of floating point; at init and at update, what does not fit, with
        the parameter's path.

    Examples:
      Sign descent with momentum, on the factors:

      >>> from typing import Any, NamedTuple
      >>> import jax, jax.numpy as jnp, optax
      >>> from oplora_jax import LowRank, each, factor_gradients, lora_optimizer, to_dense
      >>> class SignState(NamedTuple):
      ...   momentum: Any  # a LowRank
      >>> def lora_sign(learning_rate, decay=0.9):
      ...   def step(param, gradient, state, count):
      ...     g = factor_gradients(param, gradient)
      ...     m = jax.tree.map(lambda m, g: decay * m + g, state.momentum, g)
      ...     return jax.tree.map(lambda p, m: p - learning_rate * jnp.sign(m), param, m), SignState(m)
      ...   init = lambda param, key: SignState(jax.tree.map(jnp.zeros_like, param))
      ...   return lora_optimizer(init, each(step), others=optax.sign_sgd(learning_rate))
      >>> params = LowRank(jnp.ones((3, 1)), jnp.ones((1, 2)))
      >>> tx = lora_sign(0.1)
      >>> gradients = jax.grad(lambda p: to_dense(p).sum())(params)
      >>> updates, state = tx.update(gradients, tx.init(params), params)
      >>> bool(jnp.allclose(updates.a, -0.1)), int(state.count)
      (True, 1)
    """
    stored = check_state_dtype(state_dtype)
    is_node = lambda z: isinstance(z, LowRank)
    keep = lambda z: cast(z, stored) if is_node(z) and stored is not None else z

    def init_fn(params):
        pick, spread = walk(params)
        nodes = pick(params)
        keys = jax.random.split(jax.random.key(seed), len(nodes) or 1)
        wide = nodes if stored is None else [cast(node, widest(node, stored)) for node in nodes]
        states = [init(*z) for z in zip(wide, keys, strict=bool(nodes))]
        # Known without any parameter too: for `optax.tree.map_params`, and under `optax.partition`.
        probe = LowRank(jnp.zeros((1, 1)), jnp.zeros((1, 1)))
        shapes = jax.eval_shape(lambda: init(probe, jax.random.key(0)))
        structure = jax.tree.structure(shapes, is_leaf=is_node)
        for name, state in zip(names(params), states, strict=True):
            arrays = all(hasattr(z, "shape") for z in jax.tree.leaves(state))
            if not arrays or structure != jax.tree.structure(state, is_leaf=is_node):
                raise ValueError(
                    f"{name}: init returns {state}; expected arrays in one structure for all parameters"
                )
        rows = [map(keep, structure.flatten_up_to(state)) for state in states]
        columns = zip(*rows, strict=True) if rows else [()] * structure.num_leaves
        return structure.unflatten(map(spread, columns))

    def update_fn(updates, trees, params, count, **extra_args):
        del extra_args
        pick, spread = walk(params)
        nodes, gradients = pick(params), pick(updates)
        if not nodes:
            return spread([]), trees, 0
        for name, *pair in zip(names(params), nodes, gradients, strict=True):
            wrong = check and check(*pair)
            if wrong:
                raise ValueError(f"{name}: {wrong}")
        columns, structure = jax.tree.flatten(trees, is_leaf=lambda z: is_column(z, params))
        rows = zip(*map(pick, columns), strict=True)
        old = [structure.unflatten(row) for row in rows] if columns else [trees] * len(nodes)
        wide = [widest(node, jnp.float32, *([] if stored is None else [stored])) for node in nodes]
        at, before = ([cast_up(z, d) for z, d in zip(some, wide, strict=True)] for some in (nodes, old))
        new, after = step(at, gradients, before, count)
        _check_results("parameter", names(params), new, at)
        _check_results("state", names(params), after, old)
        results = zip(nodes, at, old, new, after, strict=True)
        changes, states, finite = zip(*(_guarded(*z) for z in results), strict=True)
        rows = [structure.flatten_up_to(state) for state in states]
        trees = structure.unflatten(spread(column) for column in zip(*rows, strict=True))
        return spread(changes), trees, sum(~z for z in finite)

    return _lift(_OnTrees(init_fn, update_fn), in_dtype(others, stored), joint)


def lora_transformation(
    tx: optax.GradientTransformation, *, others: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """A LoRA optimizer from a transformation of trees, such as a chain that ends in one of Optax's.

    Args:
      tx: sees trees with an `optax.MaskedNode` in the place of every other leaf. It takes any kind of
        gradient at a LoRA parameter, and returns a `LowRank` of increments.
      others: for the leaves that are no LoRA parameters.
    """
    tx = optax.with_extra_args_support(tx)

    def init_fn(params):
        state = tx.init(params)
        try:
            owners(tx, state, params)
        except (TypeError, ValueError) as error:
            raise ValueError(
                "the state of the base does not tell which of its arrays belongs to which parameter, as that "
                "of optax.flatten does not: take the base without it"
            ) from error
        return state

    def update_fn(updates, state, params, count, **extra_args):
        del count
        return _skip_nonfinite(tx, *tx.update(updates, state, params, **extra_args), state, params)

    return _lift(_OnTrees(init_fn, update_fn), others, None)


def each(
    step_of_one: Callable[..., tuple[LowRank, Any]],
) -> Callable[..., tuple[Sequence[LowRank], Sequence[Any]]]:
    """The step that `lora_optimizer` takes, of a list of LoRA parameters, from the step of one.

    Args:
      step_of_one: (param, gradient, state, count) -> (new param, new state).

    Returns:
      The function (params, gradients, states, count) -> (new params, new states), of lists.
    """

    def step(params, gradients, states, count):
        found = [step_of_one(*z, count) for z in zip(params, gradients, states, strict=True)]
        return [new for new, _ in found], [state for _, state in found]

    return step


def at_step(learning_rate: optax.ScalarOrSchedule, count: Array) -> Array:
    """The learning rate at a step, from a number or a schedule: a scalar in float32 at least.

    Args:
      learning_rate: a scalar or a schedule.
      count: the number of steps before this one.

    Raises:
      ValueError: a learning rate that is not a scalar, or a schedule of others.

    Examples:
      >>> import jax.numpy as jnp, optax, oplora_jax
      >>> float(oplora_jax.at_step(optax.linear_schedule(1.0, 0.0, 4), jnp.int32(1)))
      0.75
    """
    value = learning_rate(count) if callable(learning_rate) else learning_rate
    # A Python float, as which NumPy's float64 passes, takes on the type of what it is multiplied with.
    value = jnp.asarray(float(value) if isinstance(value, float) else value)
    if value.ndim != 0:
        raise ValueError(f"learning_rate has shape {value.shape}; expected a scalar or a schedule of one")
    wide = jnp.promote_types(value.dtype, jnp.float32)
    return value if value.dtype == wide else value.astype(wide)


class _OnTrees(NamedTuple):
    """An optimizer of trees of LoRA parameters alone."""

    init: Callable[[Any], Any]
    update: Callable[..., Any]  # to (updates, state, how many steps were left out); is given the step's count


def _lift(lora: _OnTrees, others: Any, joint: str | None) -> optax.GradientTransformationExtraArgs:
    """`lora` for the LoRA parameters of a tree, and `others` for the rest."""
    others = optax.with_extra_args_support(others)

    def init_fn(params):
        with jax.numpy_dtype_promotion("standard"):  # ours, whatever the program's
            return start(params)

    def start(params):
        for name, node in zip(names(params), walk(params)[0](params), strict=True):
            check_factors(node, name)
        if jax.tree.leaves(params) and not names(params):
            warn_of_no_lora(params)
        of_lora, of_others = split(params, params)
        zero = jnp.zeros((), jnp.int32)
        return LoRAState(zero, lora.init(of_lora), others.init(of_others), skipped=jnp.zeros_like(zero))

    def update_fn(updates, state, params=None, **extra_args):
        with jax.numpy_dtype_promotion("standard"):
            return one_step(updates, state, params, **extra_args)

    def one_step(updates, state, params, *, in_backward=False, **extra_args):
        if params is None:
            raise ValueError(
                "a LoRA optimizer's step depends on the parameters: call update(updates, state, params)"
            )
        if in_backward and joint is not None:
            raise ValueError(f"{joint}: a step in the backward pass sees one LoRA parameter at a time")
        updates = checked_gradients(updates, params)
        (lora_updates, other_updates), (at, other_params) = split(updates, params), split(params, params)
        step = lambda updates, old, at, count: lora.update(updates, old, at, count=count, **extra_args)
        like = lambda: specs_of((at, state.lora, state.skipped))
        found = under_auto_sharding(step, like, lora_updates, state.lora, at, state.count)
        lora_updates, lora_state, skipped = found
        other_updates, other_state = others.update(other_updates, state.others, other_params, **extra_args)
        updates = jax.tree.map(
            lambda p, u, v: u if is_low_rank(p) else v,
            params,
            lora_updates,
            other_updates,
            is_leaf=is_low_rank,
        )
        count = optax.safe_increment(state.count)
        return updates, LoRAState(count, lora_state, other_state, state.skipped + skipped)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _skip_nonfinite(tx: Any, updates: Any, state: Any, old: Any, params: Any) -> tuple[Any, Any, Array]:
    """No updates and the old state for LoRA parameters where either is not finite; and how many these are."""
    nodes, treedef = jax.tree.flatten(updates, is_leaf=is_low_rank)
    arrays, structure = jax.tree.flatten(state)
    owner = owners(tx, state, updates)
    of_updates = [(i, array) for i, node in enumerate(nodes) for array in jax.tree.leaves(node)]
    parts: list[Any] = [[] for _ in nodes]
    for i, array in [*of_updates, *zip(owner, arrays, strict=True)]:
        if i >= 0:
            parts[i].append(array)
    finite = list(map(_is_finite, parts))
    keep = lambda i, new, old: jax.lax.select(finite[i], new.astype(old.dtype), old)
    still = map(partial(jax.tree.map, jnp.zeros_like), jax.tree.leaves(params, is_leaf=is_low_rank))
    updates = [
        jax.tree.map(partial(keep, i), node, zeros)
        for i, (node, zeros) in enumerate(zip(nodes, still, strict=True))
    ]
    kept = [
        z if i < 0 else keep(i, z, o) for i, z, o in zip(owner, arrays, jax.tree.leaves(old), strict=True)
    ]
    skipped = jnp.sum(~jnp.asarray(finite, bool), dtype=jnp.int32)
    return treedef.unflatten(updates), structure.unflatten(kept), skipped


def _check_results(what: str, names: Sequence[str], found: Sequence[Any], expected: Sequence[Any]) -> None:
    if len(found) != len(names):
        raise ValueError(f"the step returns {len(found)} {what}s; expected a list of {len(names)}")
    form = lambda tree: (jax.tree.structure(tree), [jnp.shape(z) for z in jax.tree.leaves(tree)])
    for name, z, like in zip(names, found, expected, strict=True):
        if form(z) != form(like):
            shapes, needed = (jax.tree.map(jnp.shape, tree) for tree in (z, like))
            raise ValueError(f"{name}: the step returns a {what} {shapes}; expected {needed}")


def _guarded(param: LowRank, at: LowRank, old: Any, new: LowRank, after: Any) -> tuple[Any, Any, Array]:
    """(increments, state, whether they are finite) in the types kept; nothing and the old one where not."""
    change = jax.tree.map(lambda p, x, y: (y - x).astype(p.dtype), param, at, new)
    after = jax.tree.map(lambda x, y: y.astype(x.dtype), old, after)
    finite = _is_finite(jax.tree.leaves((change, after)))
    keep = lambda x, y: jax.lax.select(finite, x, y)
    still = jax.tree.map(jnp.zeros_like, change)
    return jax.tree.map(keep, change, still), jax.tree.map(keep, after, old), finite


def _is_finite(arrays: Sequence[Array]) -> Array:
    """Whether all of several arrays are: in one pass over those of a shape."""
    nothing: dict[Any, Any] = {}
    for z in arrays:
        nothing[z.shape] = nothing.get(z.shape, 0) + z * 0
    return sum(map(jnp.sum, nothing.values())) == 0
