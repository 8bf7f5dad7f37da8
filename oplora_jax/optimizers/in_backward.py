"""The optimizer's step inside the backward pass: no gradient outlives the layer it belongs to."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from oplora_jax.gradients.count_uses import Uses
from oplora_jax.gradients.tap import Tapped
from oplora_jax.gradients.value_and_grad import lora_uses, name_of
from oplora_jax.matrix import LowRank, OuterProduct, is_low_rank
from oplora_jax.optimizers._lift import LoRAState


def value_and_update(
    loss_fn: Callable[..., Any], tx: optax.GradientTransformation, has_aux: bool = False
) -> Callable[..., Any]:
    r"""`value_and_grad` and `tx.update` in one: each LoRA parameter takes its step in the backward pass.

    The same step as with exact gradients, but a gradient is gone as soon as its layer is done. Under a
    `jax.lax.scan` over layers, where `value_and_grad` returns the gradients of all layers stacked, x and dy
    or n x m numbers of each, the memory stays that of one layer: what leaves the backward pass are the
    increments of the factors and the new state.

    What needs all gradients at once is not possible: clipping by a global norm, accumulation over
    microbatches, `optax.chain`. The same holds for a base that is given to `svdlora`, `reflora` or as one of
    their settings, which is not checked. In a scan a step that is not finite is left out, and counted, for
    each layer by itself. A parameter that the backward pass does not reach, in a branch of `jax.lax.cond`
    that is not taken or behind `jax.lax.stop_gradient`, is left alone: no momentum, no weight decay.

    Args:
      loss_fn: a function of (params, *args, **kwargs) that returns a scalar loss, or with `has_aux` a pair of
        the loss and anything else. It uses each LoRA parameter once, through `lora_dot`.
      tx: one of this package's optimizers, by itself.
      has_aux: whether the loss returns auxiliary data.

    Returns:
      A function of (params, state, *args, **kwargs), with the state that `tx.init(params)` makes, that
        returns (value, updates, state); value is (loss, aux) with `has_aux`.

    Raises:
      ValueError: a state that is not of one of this package's optimizers, or a LoRA parameter that is used
        several times, merged, or cast to another type within the loss; the message names its path.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import oplora_jax
      >>> kernels = jnp.ones((5, 4, 4)) / 4
      >>> layers = oplora_jax.LowRank(jnp.ones((5, 4, 1)), jnp.zeros((5, 1, 4)))
      >>> def loss_fn(layers, x):
      ...   def layer(x, at):
      ...     kernel, lora = at
      ...     return oplora_jax.lora_dot(x, kernel, lora), None
      ...   x, _ = jax.lax.scan(layer, x, (kernels, layers))
      ...   return jnp.mean((x - 3.0) ** 2)
      >>> tx = oplora_jax.oplora(0.01)
      >>> step = jax.jit(oplora_jax.value_and_update(loss_fn, tx))
      >>> state, x = tx.init(layers), jnp.ones((2, 4))
      >>> for _ in range(60):
      ...   loss, updates, state = step(layers, state, x)
      ...   layers = optax.apply_updates(layers, updates)
      >>> bool(loss < 1e-3)
      True
    """

    def value_and_update_fn(params: Any, state: Any, *args: Any, **kwargs: Any) -> Any:
        paths_and_nodes, treedef = jax.tree.flatten_with_path(params, is_leaf=is_low_rank)

        def loss(nodes):
            out = loss_fn(treedef.unflatten(nodes), *args, **kwargs)
            return out if has_aux else (out, None)

        uses = lora_uses(lambda nodes: loss(nodes)[0], paths_and_nodes)
        common, steps = _steps(tx, params, state, uses)

        def tapped_loss(at):
            return loss([z if step is None else step.tapped(z) for step, z in zip(steps, at, strict=True)])

        nodes = [node for _, node in paths_and_nodes]
        at = [node if step is None else step.taps() for node, step in zip(nodes, steps, strict=True)]
        (value, aux), cotangents = jax.value_and_grad(tapped_loss, has_aux=True)(at)
        updates, state = common(cotangents)
        return ((value, aux) if has_aux else value), updates, state

    return functools.wraps(loss_fn)(value_and_update_fn)


class _Step(NamedTuple):
    """How one LoRA parameter takes its step."""

    taps: Callable[[], tuple[Array, ...]]  # zeros; () if the parameter is not used
    tapped: Callable[[tuple[Array, ...]], LowRank]  # the parameter with its taps
    # From the cotangents, (increments of a and b, the new state, whether it ran, whether it was skipped):
    # the increments, the state by path, how often it was skipped.
    finish: Callable[[tuple[Array, ...]], tuple[LowRank, dict[str, Array], Array]]


def _steps(tx: Any, params: Any, state: Any, uses: list[Uses | None]) -> tuple[Any, list[_Step | None]]:
    """(what is done with the cotangents, the steps of the LoRA parameters; None for other leaves)."""
    if not isinstance(state, LoRAState):
        raise ValueError(
            f"the state is {type(state).__name__}; expected that of one of this package's optimizers by "
            "itself. Clipping by a global norm, accumulation and optax.chain need all gradients at once: "
            "take them with value_and_grad"
        )
    paths_and_nodes, treedef = jax.tree.flatten_with_path(params, is_leaf=is_low_rank)
    kept = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(state)}

    def only(chosen: dict[int, Any]) -> Any:
        """A tree like the parameters with these nodes alone."""
        return treedef.unflatten(chosen.get(i, optax.MaskedNode()) for i in range(len(uses)))

    def part_of_state(chosen: dict[int, Any]) -> tuple[list[str], Any]:
        """The state for some of the parameters: the paths of its leaves in the whole one, its structure."""
        shapes, structure = jax.tree.flatten_with_path(jax.eval_shape(tx.init, only(chosen)))
        names = [jax.tree_util.keystr(path) for path, _ in shapes]
        if not set(names) <= set(kept):
            raise ValueError(
                "the state does not belong to these parameters; expected that of tx.init(params)"
            )
        return names, structure

    nodes = [node for _, node in paths_and_nodes]
    others = {i: node for i, (node, found) in enumerate(zip(nodes, uses, strict=True)) if found is None}
    shared, structure = part_of_state(others)  # counters, and what is kept for the other leaves

    def step_of(i: int) -> _Step:
        name, node = name_of(paths_and_nodes[i][0]), nodes[i]
        if not uses[i].once:
            raise ValueError(
                f"{name}: a step in the backward pass needs one use per forward pass, through lora_dot, but "
                f"this LoRA parameter of shape {node.shape} is {uses[i]}. Take the gradients with "
                "value_and_grad"
            )
        paths, own_structure = part_of_state({i: node})
        owned = [path not in shared for path in paths]
        batch = node.shape[:-2]
        old = [
            kept[path] if own else _spread(kept[path], batch) for path, own in zip(paths, owned, strict=True)
        ]
        types = [z.dtype for z in (node.a, node.b, *old)]
        own_paths = [path for path, own in zip(paths, owned, strict=True) if own]
        for path in own_paths:
            if not jnp.issubdtype(kept[path].dtype, jnp.floating):
                raise ValueError(f"{name}: its state{path} is {kept[path].dtype}; expected floating point")

        def rule(a, b, held, x, dy):
            found = [z.dtype for z in (a, b, *held)]
            if found != types:  # the state would be rounded too
                raise ValueError(
                    f"{name}: the loss casts this LoRA parameter to {a.dtype}; expected {node.a.dtype}, as "
                    "lora_dot computes in the type of x and the kernel. Cast those alone, or take the "
                    "gradients with value_and_grad"
                )
            at = (0,) * (a.ndim - 2)
            leaves = [z if own else z[at] for z, own in zip(held, owned, strict=True)]
            before = own_structure.unflatten(leaves)
            gradient, param = only({i: OuterProduct(x, dy)}), only({i: LowRank(a, b, node.scale)})
            updates, after = tx.update(gradient, before, param, in_backward=True)
            update = treedef.flatten_up_to(updates)[i]
            new = [z for z, own in zip(jax.tree.leaves(after), owned, strict=True) if own]
            ran = jnp.ones(a.shape[:-2])
            skipped = jnp.zeros_like(ran).at[at].set(after.skipped - before.skipped)
            return update.a, update.b, *new, ran, skipped

        def taps():
            if not uses[i].places:
                return ()
            own = (kept[path] for path in own_paths)
            return (*map(jnp.zeros_like, (node.a, node.b, *own)), jnp.zeros(batch), jnp.zeros(batch))

        def tapped(tap):
            return Tapped(node.a, node.b, node.scale, node.roles, tap, tuple(old), rule) if tap else node

        def finish(cotangents):
            if not cotangents:  # of an unused parameter: one row of zeros
                n, m = node.shape[-2:]
                x, dy = jnp.zeros((*batch, 1, n), node.a.dtype), jnp.zeros((*batch, 1, m), node.b.dtype)
                cotangents = rule(node.a, node.b, old, x, dy)
            da, db, *new, ran, skipped = cotangents
            new = [
                jnp.where(ran.reshape(*batch, *[1] * (z.ndim - len(batch))) > 0, z, kept[path])
                for path, z in zip(own_paths, new, strict=True)
            ]
            return LowRank(da, db, node.scale), dict(zip(own_paths, new, strict=True)), jnp.sum(skipped)

        return _Step(taps, tapped, finish)

    steps = [None if found is None else step_of(i) for i, found in enumerate(uses)]

    def common(cotangents):
        gradients = {i: cotangents[i] for i in others}
        before = structure.unflatten(kept[path] for path in shared)
        updates, after = tx.update(only(gradients), before, only(others))
        updates = treedef.flatten_up_to(updates)
        new = dict(zip(shared, jax.tree.leaves(after), strict=True))
        skipped = after.skipped
        for i, step in enumerate(steps):
            if step is not None:
                updates[i], own, count = step.finish(cotangents[i])
                new |= own
                skipped += count.astype(skipped.dtype)
        leaves = [new[path] for path in kept]
        after = jax.tree.unflatten(jax.tree.structure(state), leaves)
        return treedef.unflatten(updates), after._replace(skipped=skipped)

    return common, steps


def _spread(counter: Array, batch: tuple[int, ...]) -> Array:
    """A counter for each entry of the batch axes, so that a scan takes it along."""
    counter = jnp.asarray(counter)
    return jnp.broadcast_to(counter, (*batch, *counter.shape))
