"""Chains of LoRA: merge the increment into the weights, start a fresh one, train on."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from oplora_jax.adapters.kernel_axes import named_roles
from oplora_jax.adapters.merge import merge, merge_as
from oplora_jax.adapters.paths import path_name
from oplora_jax.matrix import LowRank, is_low_rank


def merge_and_restart(
    key: PRNGKeyArray, params: Any, lora: dict[str, LowRank]
) -> tuple[Any, dict[str, LowRank]]:
    r"""Merges LoRA parameters into the kernels they belong to, and starts fresh ones of the same rank.

    :math:`W \leftarrow W + s\,a\,b`, then a new a and b = 0: the model computes what it did, to the rounding
    of the kernels' type, and the next increment may lie in other directions. After k rounds the weights have
    moved by a matrix of rank up to k r. (A bfloat16 kernel takes on nothing of an increment below 1/512 of
    its entries: keep the base in float32 where increments are small.)

    The result has the structure and the types of the arguments, and the function can be compiled: call it
    every so many steps under `jax.lax.cond`. The optimizer's state is the caller's: ``tx.init(lora)`` begins
    anew, its schedule and its counters with it, as Chain of LoRA does; or it is kept as it is, which suits a
    momentum of the full weight, such as that of `oplora`. To unload a share f alone, as PeriodicLoRA offers,
    ``merge(params, ...)`` the increments with f b and keep (1 - f) b.

    Args:
      key: a random key, another one for each restart, such as `jax.random.fold_in(key, step)`.
      params: the model's parameters, as for `merge`.
      lora: LoRA parameters by the path of their kernel, as from `init_lora`.

    Returns:
      The merged params, and the fresh LoRA parameters.

    Raises:
      ValueError: a path that params lacks, or a kernel of another size.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import oplora_jax
      >>> params = {"dense": {"kernel": jnp.ones((4, 6))}}
      >>> lora = {"dense/kernel": oplora_jax.LowRank(jnp.ones((4, 1)), jnp.ones((1, 6)))}
      >>> tx = oplora_jax.oplora(0.1)
      >>> def restart(key, params, lora, state):
      ...   params, lora = oplora_jax.merge_and_restart(key, params, lora)
      ...   return params, lora, tx.init(lora)
      >>> @jax.jit
      ... def after_step(step, params, lora, state):
      ...   key = jax.random.fold_in(jax.random.key(0), step)
      ...   keep = lambda key, *trees: trees
      ...   return jax.lax.cond(step % 1000 == 0, restart, keep, key, params, lora, state)
      >>> params, lora, state = after_step(1000, params, lora, tx.init(lora))
      >>> float(params["dense"]["kernel"][0, 0]), float(lora["dense/kernel"].b[0, 0])
      (2.0, 0.0)

    References:
      Chain of LoRA, https://arxiv.org/abs/2401.04151; PeriodicLoRA, https://arxiv.org/abs/2402.16141.
    """
    return merge(params, lora), _fresh(key, lora)


def merge_and_restart_layers(key: PRNGKeyArray, params: Any) -> Any:
    """`merge_and_restart` for a tree in which each LoRA parameter, `lora`, stands beside its `kernel`.

    Such are the parameters of a model with the layers of `oplora_jax.linen`, and the `flax.nnx.state` of one
    with those of `oplora_jax.nnx`: ``nnx.update(model, merge_and_restart_layers(key, nnx.state(model)))``.
    Kernels of any number of axes are taken for the matrices that their layers take them for. (Of an einsum
    whose kernel does not have its axes in the order of its matrix linen has that in the parameter's name,
    such as `lora_oio`, and NNX in the metadata of the variable: give the state itself, not a dict of it.)

    Args:
      key: a random key, another one for each restart.
      params: a tree with kernels and LoRA parameters, and whatever else.

    Returns:
      A tree like params.

    Raises:
      ValueError: no LoRA parameter, one without a kernel of its size beside it, or one of a ResLoRA layer.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import oplora_jax
      >>> layer = {"kernel": jnp.ones((4, 6)), "lora": oplora_jax.LowRank(jnp.ones((4, 1)), jnp.ones((1, 6)))}
      >>> layer = oplora_jax.merge_and_restart_layers(jax.random.key(0), layer)
      >>> float(layer["kernel"][0, 0]), float(layer["lora"].b[0, 0])
      (2.0, 0.0)
    """
    paths_and_nodes, treedef = jax.tree.flatten_with_path(params, is_leaf=is_low_rank)
    paths = [path_name(path) for path, _ in paths_and_nodes]
    variables = jax.tree.leaves_with_path(params, is_leaf=_is_variable)
    in_metadata = {
        path_name(p): v.get_metadata("kernel_roles", None) for p, v in variables if _is_variable(v)
    }
    for path, variable in variables:
        if _is_variable(variable) and variable.get_metadata("shortcut", None):
            raise ValueError(f"{path_name(path)}: an increment with a shortcut is more than its own kernel's")
    lora, roles, kernels = {}, {}, {}
    for path, (_, node) in zip(paths, paths_and_nodes, strict=True):
        if is_low_rank(node):
            before, _, name = path.removesuffix("/value").rpartition("/")
            if name.split("_")[0] != "lora":
                raise ValueError(f"{path}: expected the name 'lora', beside a 'kernel'")
            kernel = f"{before}/kernel".strip("/")
            # Where the kernel is in a box, of linen or of NNX, its path has one more part.
            kernel = kernels[path] = f"{kernel}/value" if f"{kernel}/value" in paths else kernel
            lora[kernel] = node
            known = in_metadata.get(path.removesuffix("/value")) or named_roles(name)
            roles.update({} if known is None else {kernel: known})
    if not lora:
        raise ValueError("the parameters have no LoRA parameter to merge")
    nodes = treedef.flatten_up_to(merge_as(params, lora, roles))
    fresh = _fresh(key, lora)
    return treedef.unflatten(fresh.get(kernels.get(path), z) for path, z in zip(paths, nodes, strict=True))


def _is_variable(node: Any) -> bool:
    """Whether a node is a variable of NNX, which has metadata beside its value."""
    return hasattr(node, "get_metadata")


def _fresh(key: PRNGKeyArray, lora: dict[str, LowRank]) -> dict[str, LowRank]:
    """LoRA's usual start, like old parameters."""
    keys = jax.random.split(key, len(lora) or 1)
    return {path: _fresh_like(old, k) for k, (path, old) in zip(keys, lora.items(), strict=False)}


def _fresh_like(old: LowRank, key: PRNGKeyArray) -> LowRank:
    batch = tuple(range(old.a.ndim - 2))
    a = jax.nn.initializers.he_uniform(batch_axis=batch)(key, old.a.shape, old.a.dtype)
    # Added to zeros made from the old factor, for its sharding.
    return LowRank(jnp.zeros_like(old.a) + a, jnp.zeros_like(old.b), old.scale)
