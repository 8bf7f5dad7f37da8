"""The optimizer's step inside the backward pass: no gradient outlives the layer it belongs to."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from oplora_jax.gradients.capture import Tapped
from oplora_jax.gradients.value_and_grad import lora_uses, name_of
from oplora_jax.matrix import OuterProduct, is_low_rank
from oplora_jax.optimizers._lift import LoRAState
from oplora_jax.optimizers._trees import owners


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
        nodes, structure = [node for _, node in paths_and_nodes], jax.tree.structure(state)
        if not isinstance(state, LoRAState):
            raise ValueError(
                f"the state is {type(state).__name__}; expected that of one of this package's optimizers by "
                "itself. Clipping by a global norm, accumulation and optax.chain need all gradients at once: "
                "take them with value_and_grad"
            )
        if structure != jax.tree.structure(jax.eval_shape(tx.init, params)):
            raise ValueError(
                "the state does not belong to these parameters; expected that of tx.init(params)"
            )

        def loss(nodes):
            out = loss_fn(treedef.unflatten(nodes), *args, **kwargs)
            return out if has_aux else (out, None)

        uses = lora_uses(lambda nodes: loss(nodes)[0], paths_and_nodes)
        kept, owner = jax.tree.leaves(state), owners(tx, state, params)
        others = [i for i, use in enumerate(uses) if use is None]
        loras = [i for i, use in enumerate(uses) if use is not None]
        # The arrays of the state that a step of one LoRA parameter sees: its own, and the counters.
        seen = {i: [k for k, of in enumerate(owner) if of in (i, -1)] for i in loras}
        own = {i: [k for k in seen[i] if owner[k] == i] for i in loras}

        def step(chosen, gradients, arrays, **options):
            """The step of some nodes: a list with their increments, and the arrays of their new state."""
            only = lambda some: treedef.unflatten(some.get(i, optax.MaskedNode()) for i in range(len(nodes)))
            before = jax.tree.structure(jax.eval_shape(tx.init, only(chosen))).unflatten(arrays)
            updates, after = tx.update(only(gradients), before, only(chosen), **options)
            return treedef.flatten_up_to(updates), jax.tree.leaves(after)

        def rule_of(i):
            types = [z.dtype for z in (nodes[i].a, nodes[i].b, *(kept[k] for k in seen[i]))]

            def rule(a, b, held, x, dy):
                if [z.dtype for z in (a, b, *held)] != types:  # the state would be rounded too
                    raise ValueError(
                        f"{name_of(paths_and_nodes[i][0])}: the loss casts this LoRA parameter to {a.dtype}; "
                        f"expected {nodes[i].a.dtype}, as lora_dot computes in the type of x and the kernel. Cast "
                        "those alone, or take the gradients with value_and_grad"
                    )
                at = (0,) * (a.ndim - 2)
                arrays = [z if k in own[i] else z[at] for k, z in zip(seen[i], held, strict=True)]
                chosen, gradients = {i: nodes[i].with_factors(a, b)}, {i: OuterProduct(x, dy)}
                updates, after = step(chosen, gradients, arrays, in_backward=True)
                new = [z for k, z in zip(seen[i], after, strict=True) if k in own[i]]
                ran = jnp.ones(a.shape[:-2])
                skipped = jnp.zeros_like(ran).at[at].set(after[-1] - arrays[-1])
                return updates[i].a, updates[i].b, *new, ran, skipped

            return rule

        def taps(i):
            """Zeros for what a rule returns; none for a parameter that is not used."""
            name, batch = name_of(paths_and_nodes[i][0]), nodes[i].shape[:-2]
            if not uses[i].once:
                raise ValueError(
                    f"{name}: a step in the backward pass needs one use per forward pass, through lora_dot, "
                    f"but this LoRA parameter of shape {nodes[i].shape} is {uses[i]}. Take the gradients with "
                    "value_and_grad"
                )
            for k in own[i]:
                if not jnp.issubdtype(kept[k].dtype, jnp.floating):
                    raise ValueError(f"{name}: its state has {kept[k].dtype}; expected floating point")
            like = nodes[i].a, nodes[i].b, *(kept[k] for k in own[i])
            return (*map(jnp.zeros_like, like), jnp.zeros(batch), jnp.zeros(batch)) if uses[i].places else ()

        def held(i):
            """The state's arrays, with counters for each entry of the batch axes: a scan takes them along."""
            spread = lambda z: jnp.broadcast_to(z, (*nodes[i].shape[:-2], *z.shape))
            return tuple(kept[k] if k in own[i] else spread(kept[k]) for k in seen[i])

        def tapped_loss(at):
            at = list(at)
            for i in loras:
                a, b, scale, roles = nodes[i].a, nodes[i].b, nodes[i].scale, nodes[i].roles
                at[i] = Tapped(a, b, scale, roles, at[i], held(i), rule_of(i)) if at[i] else nodes[i]
            return loss(at)

        at = [node if use is None else taps(i) for i, (node, use) in enumerate(zip(nodes, uses, strict=True))]
        (value, aux), cotangents = jax.value_and_grad(tapped_loss, has_aux=True)(at)

        shared = [k for k, of in enumerate(owner) if of in (-1, *others)]
        found = step(
            {i: nodes[i] for i in others}, {i: cotangents[i] for i in others}, [kept[k] for k in shared]
        )
        updates, new = found[0], dict(zip(shared, found[1], strict=True))
        for i in loras:
            (*batch, n, m), result = nodes[i].shape, cotangents[i]
            if not result:  # of an unused parameter: one row of zeros
                rows = (
                    jnp.zeros((*batch, 1, n), nodes[i].a.dtype),
                    jnp.zeros((*batch, 1, m), nodes[i].b.dtype),
                )
                result = rule_of(i)(nodes[i].a, nodes[i].b, held(i), *rows)
            a, b, *after, ran, skipped = result
            updates[i] = nodes[i].with_factors(a, b)
            for k, z in zip(own[i], after, strict=True):
                new[k] = jnp.where(ran.reshape(*batch, *[1] * (z.ndim - len(batch))) > 0, z, kept[k])
            new[len(kept) - 1] += jnp.sum(skipped).astype(jnp.int32)
        value = (value, aux) if has_aux else value
        return value, treedef.unflatten(updates), structure.unflatten(new[k] for k in range(len(kept)))

    return functools.wraps(loss_fn)(value_and_update_fn)
