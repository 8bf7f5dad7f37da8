"""Chains of LoRA: merge the increment into the weights, start a fresh one, train on."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from oplora_jax.adapters.checks import refuse_old_names
from oplora_jax.adapters.init import he_uniform
from oplora_jax.adapters.merge import merge
from oplora_jax.adapters.paths import leaf_name, path_name
from oplora_jax.matrix import LowRank, is_low_rank


def merge_and_restart(
    key: PRNGKeyArray, params: Any, lora: dict[str, LowRank]
) -> tuple[Any, dict[str, LowRank]]:
    """Chain of LoRA: the increments added to their kernels, and fresh LoRA parameters in their place.

    The model computes what it did, to the rounding of the kernels' type: a bfloat16 kernel takes on nothing
    below 1/512 of its entries. After k rounds the weights have moved by a matrix of rank up to k r.

    The optimizer's state is yours: `tx.init(lora)` begins anew, its schedule too, as the paper does; kept, it
    suits a momentum of the full weight, such as that of `oplora`.

    Args:
      key: a random key, another one for each restart, such as `jax.random.fold_in(key, step)`.
      params: the model's parameters, as for `merge`.
      lora: the LoRA parameters by path, as for `merge`.

    Returns:
      The merged params and the fresh LoRA parameters, of the arguments' structure and types, as
      `jax.lax.cond` needs.

    Raises:
      ValueError: as for `merge`.

    From [Chain of LoRA](https://arxiv.org/abs/2401.04151).

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import oplora_jax
      >>> params = {"dense": {"kernel": jnp.ones((4, 6))}}
      >>> lora = {"dense/kernel": oplora_jax.LowRank(jnp.ones((4, 1)), jnp.ones((1, 6)))}
      >>> params, lora = oplora_jax.merge_and_restart(jax.random.key(0), params, lora)
      >>> float(params["dense"]["kernel"][0, 0]), float(lora["dense/kernel"].b[0, 0])
      (2.0, 0.0)
    """
    keys = jax.random.split(key, len(lora) or 1)
    # Added to zeros made from the old factor, for its sharding.
    new_a = lambda k, old: jnp.zeros_like(old.a) + he_uniform(k, old.a.shape, old.a.dtype)
    start = lambda k, old: old.with_factors(new_a(k, old), jnp.zeros_like(old.b))
    fresh = {path: start(k, old) for k, (path, old) in zip(keys, lora.items(), strict=False)}
    return merge(params, lora), fresh


def merge_and_restart_layers(key: PRNGKeyArray, params: Any) -> Any:
    """`merge_and_restart` for a tree in which each LoRA parameter, `lora`, stands beside its `kernel`.

    Such are the parameters of models with layers of `oplora_jax.linen`. For `oplora_jax.nnx` it is
    `nnx.update(model, merge_and_restart_layers(key, nnx.state(model)))`.

    Args:
      key: a random key, another one for each restart.
      params: a tree with kernels, LoRA parameters and whatever else.

    Returns:
      A tree like params.

    Raises:
      ValueError: no LoRA parameter, one without a kernel of its size beside it, or one of a ResLoRA layer.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import oplora_jax
      >>> layer = {"kernel": jnp.ones((4, 6)), "lora": oplora_jax.LowRank(jnp.ones((4, 1)), jnp.ones((1, 6)))}
      >>> layer = oplora_jax.merge_and_restart_layers(jax.random.key(0), layer)
      >>> float(layer["kernel"][0, 0]), float(layer["lora"].b[0, 0])
      (2.0, 0.0)
    """
    refuse_old_names(params)
    paths_and_nodes, treedef = jax.tree.flatten_with_path(params, is_leaf=is_low_rank)
    boxed = {leaf_name(path): path_name(path) for path, _ in paths_and_nodes}
    lora, kernels = {}, {}
    for path, node in paths_and_nodes:
        if is_low_rank(node):
            before, _, name = leaf_name(path).rpartition("/")
            if name != "lora":
                raise ValueError(f"{leaf_name(path)}: expected the name 'lora', beside a 'kernel'")
            kernel = f"{before}/kernel".strip("/")
            kernel = kernels[path] = boxed.get(kernel, kernel)
            lora[kernel] = node
    if not lora:
        raise ValueError("the parameters have no LoRA parameter to merge")
    merged, fresh = merge_and_restart(key, params, lora)
    nodes = zip(paths_and_nodes, treedef.flatten_up_to(merged), strict=True)
    return treedef.unflatten(fresh[kernels[path]] if path in kernels else node for (path, _), node in nodes)
