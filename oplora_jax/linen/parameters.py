"""From a plain model's parameters to those with LoRA, and back."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from flax.core import meta

from oplora_jax.adapters.checks import refuse_old_names
from oplora_jax.adapters.init import beside
from oplora_jax.adapters.kernel_axes import add_increment
from oplora_jax.adapters.paths import path_name
from oplora_jax.adapters.reslora import SHORTCUTS
from oplora_jax.matrix import LowRank, is_low_rank


def add_lora(model: nn.Module, rngs: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
    """The parameters of a model with LoRA, from pretrained ones without.

    Whatever else the model has and the pretrained parameters lack, such as a new head, is initialised too.
    Nothing else is computed: the forward pass is traced for its shapes alone.

    Args:
      model: a model with LoRA layers, as from `loraize`.
      params: the pretrained parameters: the tree of the model's, without LoRA.
      rngs, *args, **kwargs: as for `model.init`; example inputs may be of `jax.ShapeDtypeStruct`.

    Returns:
      A tree of dicts, with the arrays of params as they are and new LoRA parameters. On a mesh these are
        sharded as the rows and the columns of their kernels.

    Raises:
      ValueError: params has an array that the model lacks, or one of another shape; no layer matched.

    Example:
      >>> import flax.linen as nn
      >>> import jax, jax.numpy as jnp
      >>> from oplora_jax.linen import add_lora, loraize
      >>> x, plain = jnp.ones((1, 4)), nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(3)])
      >>> pretrained = plain.init(jax.random.key(0), x)["params"]
      >>> model = loraize(plain, rank=2, targets="layers_*")
      >>> params = add_lora(model, jax.random.key(1), pretrained, x)
      >>> bool((model.apply({"params": params}, x) == plain.apply({"params": pretrained}, x)).all())
      True
    """
    refuse_old_names(params)
    given = {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}
    is_box = lambda node: isinstance(node, meta.AxisMetadata)
    boxed = any(map(is_box, jax.tree.leaves(params, is_leaf=is_box)))
    expected: dict[str, Any] = {}

    @jax.jit  # so that no array is made that is given
    def missing(rngs: Any) -> Any:
        tree = model.lazy_init(rngs, *args, **kwargs)["params"]
        tree = tree if boxed else meta.unbox(tree)
        expected.update({path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)})
        if not any(map(is_low_rank, jax.tree.leaves(tree, is_leaf=is_low_rank))):
            raise ValueError(f"the model has no LoRA parameter; it has: {', '.join(expected)}")
        return jax.tree.map_with_path(lambda path, leaf: None if path_name(path) in given else leaf, tree)

    tree = missing(rngs)
    for name, leaf in given.items():
        if name not in expected:
            raise ValueError(f"{name}: the model has no such parameter; it has: {', '.join(expected)}")
        if leaf.shape != expected[name].shape:
            raise ValueError(f"{name}: the array is {leaf.shape}; the model needs {expected[name].shape}")
    fill = lambda path, leaf: given[path_name(path)] if leaf is None else leaf
    return _placed(jax.tree.map_with_path(fill, tree, is_leaf=lambda leaf: leaf is None))


def _placed(tree: Any) -> Any:
    """A tree with each LoRA parameter spread out over a mesh as the kernel beside it."""
    if not isinstance(tree, Mapping):
        return tree
    placed = {name: _placed(child) for name, child in tree.items()}
    for name, lora in tree.items():
        if name in ("lora", *SHORTCUTS) and isinstance(lora, LowRank):
            placed[name] = beside(meta.unbox(tree["kernel"]), lora)
    return placed


def merge(params: Any) -> Any:
    """The parameters of the plain model: the LoRA increments added to the kernels beside them.

    The plain model computes with them what the model with LoRA does, to rounding.

    Args:
      params: the parameters of a model with LoRA layers, or all its variables.

    Returns:
      A tree of dicts without LoRA parameters.

    Raises:
      ValueError: there is no LoRA parameter, or one whose kernel is missing or of another size, or one of
        a layer with a shortcut: `merge_shortcuts` merges those that can be.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from oplora_jax.linen import LoRADense, merge
      >>> params = LoRADense(6, rank=2).init(jax.random.key(0), jnp.ones((1, 4)))["params"]
      >>> sorted(merge(params))
      ['bias', 'kernel']
    """
    refuse_old_names(params)
    if not any(map(is_low_rank, jax.tree.leaves(params, is_leaf=is_low_rank))):
        raise ValueError("the parameters have no LoRA parameter to merge")
    return merge_tree(params, "")


def merge_tree(tree: Any, path: str) -> Any:
    """`merge` of the part of a tree at a path, which need not have a LoRA parameter."""
    if not isinstance(tree, Mapping):
        return tree
    merged = {name: merge_tree(child, f"{path}/{name}" if path else name) for name, child in tree.items()}
    for name, lora in tree.items():
        if name in SHORTCUTS:
            raise ValueError(f"{path}/{name}: {SHORTCUTS[name]}")
        if name == "lora" and isinstance(lora, LowRank):
            del merged[name]
            if "kernel" not in tree:
                raise ValueError(f"{path}: there is no kernel beside the LoRA parameter {name!r}")
            kernel = tree["kernel"]
            try:
                merged["kernel"] = meta.replace_boxed(kernel, add_increment(meta.unbox(kernel), lora))
            except ValueError as error:
                raise ValueError(f"{path}/{name}: {error}") from error
    return merged
