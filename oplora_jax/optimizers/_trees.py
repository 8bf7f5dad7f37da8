"""Trees of parameters, some of which are LoRA parameters."""

import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from oplora_jax.matrix import LowRank, OuterProduct, check_factors, is_low_rank


def walk(params: Any) -> tuple[Callable[[Any], list], Callable[[Sequence[Any]], Any]]:
    """(what stands at the LoRA parameters of a tree like this one, the tree of what is to stand there)."""
    nodes, treedef = jax.tree.flatten(params, is_leaf=is_low_rank)
    at = [i for i, node in enumerate(nodes) if is_low_rank(node)]

    def pick(tree):
        parts = treedef.flatten_up_to(tree)
        return [parts[i] for i in at]

    def spread(some):
        found = dict(zip(at, some, strict=True))
        return treedef.unflatten(found.get(i, optax.MaskedNode()) for i in range(len(nodes)))

    return pick, spread


def names(params: Any) -> list[str]:
    """The paths of the LoRA parameters, for errors."""
    paths_and_nodes = jax.tree.leaves_with_path(params, is_leaf=is_low_rank)
    return [
        jax.tree_util.keystr(p) or "the LoRA parameter" for p, node in paths_and_nodes if is_low_rank(node)
    ]


# Whose frames are not the program's, where a warning is to point to.
_LIBRARIES = {"oplora_jax", "optax", "jax", "flax", "jaxtyping", "contextlib", "functools"}


def warn_of_no_lora(params: Any) -> None:
    """Warns, where the program calls `init`, that a tree has no LoRA parameter."""
    paths = [jax.tree_util.keystr(path) or "the parameter" for path, _ in jax.tree.leaves_with_path(params)]
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    frame, level = inspect.currentframe(), 1
    while frame and frame.f_globals.get("__name__", "").partition(".")[0] in _LIBRARIES:
        frame, level = frame.f_back, level + 1
    warnings.warn(
        f"no LoRA parameter, a LowRank, is among the parameters: {', '.join(paths[:3])}{more}. They all take "
        "the steps of other parameters. oplora_jax.pair_factors pairs factors that are leaves of their own",
        stacklevel=level,
    )


def is_column(part: Any, params: Any) -> bool:
    """Whether a part of a state is a tree with one entry at each LoRA parameter, and nothing elsewhere."""
    nodes, treedef = jax.tree.flatten(params, is_leaf=is_low_rank)
    try:
        parts = treedef.flatten_up_to(part)
    except ValueError:
        return False
    is_entry = lambda z: isinstance(z, LowRank) or hasattr(z, "shape")
    fits = lambda node, z: is_entry(z) if is_low_rank(node) else not jax.tree.leaves(z)
    return all(map(fits, nodes, parts))


def mapped(function: Any, params: Any, *rest: Any) -> Any:
    """A function of what stands at each LoRA parameter of some trees, to what is to stand there."""
    return jax.tree.map(
        lambda p, *z: function(p, *z) if is_low_rank(p) else p, params, *rest, is_leaf=is_low_rank
    )


def split(tree: Any, params: Any) -> tuple[Any, Any]:
    """(the LoRA parameters' part, the others' part) of a tree, each with the rest masked."""
    nodes, treedef = jax.tree.flatten(params, is_leaf=is_low_rank)
    parts = treedef.flatten_up_to(tree)
    pick = lambda lora: treedef.unflatten(
        part if is_low_rank(node) == lora else optax.MaskedNode()
        for node, part in zip(nodes, parts, strict=True)
    )
    return pick(True), pick(False)


def checked_gradients(updates: Any, params: Any) -> Any:
    """The gradients, which fit the parameters, with the seals of outer products opened."""
    paths_and_nodes, treedef = jax.tree.flatten_with_path(params, is_leaf=is_low_rank)
    try:
        gradients = treedef.flatten_up_to(updates)
    except ValueError as error:
        raise ValueError(f"the tree of gradients does not have the parameters' structure: {error}") from error
    for k, ((path, param), gradient) in enumerate(zip(paths_and_nodes, gradients, strict=True)):
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
        if isinstance(gradient, OuterProduct) and gradient.seal is not None:
            try:
                gradients[k] = gradient.opened()
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
    return treedef.unflatten(gradients)


def owners(tx: optax.GradientTransformation, state: Any, params: Any) -> list[int]:
    """Which node of the parameters each array of a state belongs to; -1 for counters and the like."""
    nodes, treedef = jax.tree.flatten(params, is_leaf=is_low_rank)
    marked = optax.tree.map_params(
        tx,
        lambda part, index: jax.tree.map(lambda _: index, part),
        state,
        treedef.unflatten(range(len(nodes))),
        transform_non_params=lambda _: -1,
        is_leaf=lambda z: isinstance(z, LowRank | optax.MaskedNode),
    )
    return jax.tree.leaves(marked)


def update_part(
    tx: Any,
    treedef: Any,
    params: dict[int, Any],
    gradients: dict[int, Any],
    arrays: dict[int, Any],
    **options: Any,
) -> tuple[list[Any], dict[int, Any]]:
    """The update of some nodes of a tree alone: the increments of all nodes, and the new arrays of the state.

    Args:
      tx: an optimizer for trees of this treedef.
      treedef: with a leaf for each node.
      params, gradients: of the nodes that are updated, by their places.
      arrays: their part of the optimizer's state, by the places among all arrays of the whole one.
      options: for `tx.update`.
    """
    only = lambda some: treedef.unflatten(some.get(i, optax.MaskedNode()) for i in range(treedef.num_leaves))
    with warnings.catch_warnings(action="ignore"):  # the part may have no LoRA parameter
        part, places = jax.tree.structure(jax.eval_shape(tx.init, only(params))), sorted(arrays)
    before = part.unflatten(arrays[k] for k in places)
    updates, after = tx.update(only(gradients), before, only(params), **options)
    return treedef.flatten_up_to(updates), dict(zip(places, jax.tree.leaves(after), strict=True))
