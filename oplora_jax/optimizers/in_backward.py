"""The optimizer's step inside the backward pass: no gradient outlives the layer it belongs to."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from oplora_jax.gradients.value_and_grad import TracedLoss, name_of
from oplora_jax.matrix import OuterProduct, is_low_rank
from oplora_jax.optimizers._lift import LoRAState
from oplora_jax.optimizers._trees import owners, update_part


def value_and_update(
    loss_fn: Callable[..., Any], tx: optax.GradientTransformation, has_aux: bool = False
) -> Callable[..., Any]:
    """`value_and_grad` and `tx.update` in one: each LoRA parameter steps within the backward pass.

    For memory: the step is that with exact gradients, but a gradient is gone as soon as its layer is done,
    and a `jax.lax.scan` over layers holds that of one. What needs all gradients at once is not possible:
    clipping by a global norm, microbatches, `optax.chain` (or such a base of `svdlora`, `reflora` or
    `lora_plus`: that is not checked).

    Args:
      loss_fn: as for `value_and_grad`. It uses each LoRA parameter once, through `lora_dot`.
      tx: one of this package's optimizers, or of `lora_optimizer`, by itself.
      has_aux: whether the loss returns a pair of the loss and auxiliary data.

    Returns:
      A function of `(params, state, *args, **kwargs)` that returns (value, updates, state), with `has_aux`
      the value with the auxiliary data. In a scan a step that is not finite is left out, and counted, by
      layer. A parameter that the backward pass does not reach, as in a branch that is not taken, is left
      alone.

    Raises:
      ValueError: another optimizer's state, or a LoRA parameter that the loss merges, casts or uses twice.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, oplora_jax
      >>> kernels = jnp.ones((5, 4, 4)) / 4
      >>> layers = oplora_jax.LowRank(jnp.ones((5, 4, 1)), jnp.zeros((5, 1, 4)))
      >>> layer = lambda x, at: (oplora_jax.lora_dot(x, *at), None)
      >>> def loss_fn(layers, x):
      ...   return jnp.mean((jax.lax.scan(layer, x, (kernels, layers))[0] - 3.0) ** 2)
      >>> tx = oplora_jax.oplora(0.01)
      >>> step = jax.jit(oplora_jax.value_and_update(loss_fn, tx))
      >>> state, x = tx.init(layers), jnp.ones((2, 4))
      >>> for _ in range(60):
      ...   loss, updates, state = step(layers, state, x)
      ...   layers = optax.apply_updates(layers, updates)
      >>> bool(loss < 1e-3)
      True
    """

    def value_and_update_fn(params: Any, state: Any, /, *args: Any, **kwargs: Any) -> Any:
        paths_and_nodes, treedef = jax.tree.flatten_with_path(params, is_leaf=is_low_rank)
        names, nodes = [name_of(path) for path, _ in paths_and_nodes], [node for _, node in paths_and_nodes]
        kept, structure = jax.tree.flatten(state)
        expected = jax.tree.structure(jax.eval_shape(tx.init, params))
        if not isinstance(state, LoRAState) or structure != expected:
            raise ValueError(
                f"the state is {type(state).__name__}; expected that of tx.init(params), for one of this "
                "package's optimizers by itself. What needs all gradients at once (clipping, accumulation, "
                "optax.chain) takes them with value_and_grad"
            )

        def loss(at):
            out = loss_fn(treedef.unflatten(at), *args, **kwargs)
            return out if has_aux else (out, None)

        program, owner = TracedLoss(loss, paths_and_nodes), owners(tx, state, params)
        uses = program.uses
        counters = [k for k, of in enumerate(owner) if of == -1]  # the last one counts skipped steps
        own = {i: [k for k, of in enumerate(owner) if of == i] for i, z in enumerate(uses) if z is not None}

        def rule(i, a, b, held, x, dy):
            """What the taps capture: increments, the new state, whether this ran, whether it was skipped."""
            if a.dtype != nodes[i].a.dtype:  # the state would be rounded too
                raise ValueError(
                    f"{names[i]}: the loss casts this LoRA parameter to {a.dtype}; expected "
                    f"{nodes[i].a.dtype}. Cast x and the kernel alone, or use value_and_grad"
                )
            at, arrays = (0,) * (a.ndim - 2), dict(zip([*own[i], *counters], held, strict=True))
            arrays |= {k: arrays[k][at] for k in counters}
            at_node = {i: nodes[i].with_factors(a, b)}, {i: OuterProduct(x, dy)}
            updates, new = update_part(tx, treedef, *at_node, arrays, in_backward=True)
            ran, last = jnp.ones(a.shape[:-2]), counters[-1]
            skipped = jnp.zeros_like(ran).at[at].set((new[last] - arrays[last]).astype(ran.dtype))
            return updates[i].a, updates[i].b, *(new[k] for k in own[i]), ran, skipped

        held, taps = {}, list(nodes)
        for i, places in own.items():
            if not uses[i].once:
                raise ValueError(
                    f"{names[i]}: a step in the backward pass needs one use per forward pass, through "
                    f"lora_dot, but this LoRA parameter is {uses[i]}. Use value_and_grad"
                )
            batch, arrays = nodes[i].shape[:-2], [kept[k] for k in places]
            if any(z.shape[: len(batch)] != batch for z in arrays):
                raise ValueError(f"{names[i]}: its state's arrays must begin with its batch axes {batch}")
            # Counters for each entry of the batch axes: a scan takes them along.
            held[i] = (*arrays, *(jnp.broadcast_to(kept[k], (*batch, *kept[k].shape)) for k in counters))
            like = nodes[i].a, nodes[i].b, *arrays, jnp.zeros(batch), jnp.zeros(batch)
            taps[i] = tuple(map(jnp.zeros_like, like)) if uses[i].places else ()

        def tapped_loss(taps):
            return program(taps, {i: (taps[i], held[i], functools.partial(rule, i)) for i in own})

        (value, computed), found = jax.value_and_grad(tapped_loss, has_aux=True)(taps)
        aux = program.rest(computed)
        rest = {i: node for i, node in enumerate(nodes) if i not in own}
        arrays = {k: kept[k] for k, of in enumerate(owner) if of not in own}
        updates, new = update_part(tx, treedef, rest, {i: found[i] for i in rest}, arrays)
        for i, places in own.items():
            *batch, n, m = nodes[i].shape
            if not found[i]:  # of an unused parameter: one row of zeros
                rows = (jnp.zeros((*batch, 1, size), nodes[i].dtype) for size in (n, m))
                found[i] = rule(i, nodes[i].a, nodes[i].b, held[i], *rows)
            da, db, *after, ran, skipped = found[i]
            updates[i] = nodes[i].with_factors(da, db)
            for k, z in zip(places, after, strict=True):
                new[k] = jnp.where(ran.reshape(*batch, *[1] * (z.ndim - len(batch))) > 0, z, kept[k])
            new[counters[-1]] += jnp.sum(skipped).astype(jnp.int32)
        after = structure.unflatten(new[k] for k in range(len(kept)))
        return ((value, aux) if has_aux else value), treedef.unflatten(updates), after

    return functools.wraps(loss_fn)(value_and_update_fn)
