"""The tensors of a PEFT adapter, in PyTorch's layout, and what they are in JAX."""

import collections
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from oplora_jax.adapters.paths import leaf_name
from oplora_jax.adapters.peft_config import DENSE, EMBEDDINGS, rank_and_scale, saved_modules
from oplora_jax.matrix import LowRank, check_factors, is_low_rank

Tensors = dict[str, np.ndarray]

_PREFIX = "base_model.model."
# What JAX calls PyTorch's "weight": a kernel is (in, out), the others lie as in PyTorch.
_WEIGHTS = ("kernel", "embedding", "scale", "weight")


def lora_tensors(modules: Mapping[str, LowRank], embeddings: Iterable[str]) -> Tensors:
    """The factors of the modules, of which some are embeddings."""
    tensors = {}
    for module, node in modules.items():
        names = ("lora_embedding_A", "lora_embedding_B")
        if module not in embeddings:
            names = ("lora_A.weight", "lora_B.weight")
        for name, factor in zip(names, (node.a, node.b), strict=True):
            # safetensors writes an array's memory as it lies there
            tensors[f"{_PREFIX}{module}.{name}"] = np.ascontiguousarray(np.asarray(factor).T)
    return tensors


def trained_tensors(
    trained: Mapping[str, Any], lora: Iterable[str], fan_in_fan_out: bool
) -> tuple[Tensors, dict[str, str]]:
    """What is trained besides LoRA's parameters, and what JAX calls each weight among them."""
    tensors, weights = {}, {}
    for module, tree in trained.items():
        at = f"{module}.base_layer" if module in lora else module
        for path, leaf in jax.tree.leaves_with_path(tree, is_leaf=is_low_rank):
            *inner, name = leaf_name(path).split("/")
            where = f"modules_to_save[{module!r}], {leaf_name(path)!r}"
            if not path or not _is_array(leaf):
                expected = 'arrays by their names, such as {"kernel": ..., "bias": ...}'
                raise ValueError(f"{where}: {type(leaf).__name__}; expected {expected}")
            tensor = np.asarray(leaf)
            if name == "kernel" and (tensor.ndim != 2 or _may_be_conv1d(module, fan_in_fan_out)):
                expected = "a dense layer's, (in, out); give another's as 'weight', laid out as in PyTorch"
                raise ValueError(f"{where}: a kernel {tensor.shape}; expected {expected}")
            key = _PREFIX + ".".join([at, *inner, "weight" if name in _WEIGHTS else name])
            if key in tensors:
                raise ValueError(f"{where}: another parameter is {key!r} as well")
            tensors[key] = np.ascontiguousarray(tensor.T if name == "kernel" else tensor)
            if name in _WEIGHTS:
                weights[key] = name
    return tensors, weights


def _may_be_conv1d(module: str, fan_in_fan_out: bool) -> bool:
    """Whether a module's weight may be (in, out) in PyTorch: heads are dense layers in GPT-2 too."""
    return bool(fan_in_fan_out) and not saved_modules(module, DENSE)


def _is_array(leaf: Any) -> bool:
    dtype = getattr(leaf, "dtype", None)
    return not is_low_rank(leaf) and dtype is not None and not jnp.issubdtype(dtype, jax.dtypes.extended)


def read_lora(tensors: Tensors, config: Mapping[str, Any]) -> tuple[dict[str, LowRank], set[str]]:
    """The LoRA parameters by module, and which modules are embeddings; takes their tensors out."""
    factors: dict[str, Tensors] = collections.defaultdict(dict)
    embeddings = set()
    for key in list(tensors):
        match = re.fullmatch(r"(.+)\.lora_(embedding_)?([AB])(\.weight)?", key.removeprefix(_PREFIX))
        if match is None or bool(match[2]) == bool(match[4]):
            if ".lora_" in key:
                expected = "only lora_A.weight, lora_B.weight, lora_embedding_A and lora_embedding_B"
                raise ValueError(f"{key}: {expected} are supported")
            continue
        tensor = tensors.pop(key)
        if tensor.ndim != 2:
            raise ValueError(f"{key} is {tensor.shape}; only dense layers and embeddings are supported")
        if match[2]:
            embeddings.add(match[1])
        factors[match[1]][match[3]] = tensor
    if not factors:
        raise ValueError(f"the adapter has {'no LoRA' if tensors else 'no'} tensors")
    return {module: _low_rank(module, both, config) for module, both in factors.items()}, embeddings


def _low_rank(module: str, factors: Tensors, config: Mapping[str, Any]) -> LowRank:
    if len(factors) < 2:
        raise ValueError(f"{module}: lora_{next(iter(factors))} without the other factor")
    rank, scale = rank_and_scale(module, config)
    shapes = factors["A"].shape, factors["B"].shape
    if not shapes[0][0] == shapes[1][1] == rank:
        found = f"lora_A {shapes[0]} and lora_B {shapes[1]} do not fit"
        raise ValueError(f"{module}: {found}; the config's rank is {rank}: expected (r, n) and (m, r)")
    node = LowRank(*(_to_jax(factors[name].T, module) for name in "AB"), scale)
    check_factors(node, module)
    return node


def read_trained(
    tensors: Tensors,
    weights: Mapping[str, str],
    lora: Iterable[str],
    embeddings: Iterable[str],
    saved: Iterable[str],
    fan_in_fan_out: bool,
) -> dict[str, dict[str, Any]]:
    """Trees of all other parameters by module, as `trained_tensors` takes them.

    `weights` is what JAX calls them, where the file says so, and `saved` the names in modules_to_save.
    """
    trained: dict[str, dict[str, Any]] = {}
    for key, tensor in _without_copies(tensors).items():
        inside, _, name = key.removeprefix(_PREFIX).rpartition(".")
        base = inside.removesuffix(".base_layer")
        if base != inside and base not in lora:
            raise ValueError(f"{key}: the base of a layer that has no LoRA parameter")
        found = [base] if base in lora else saved_modules(inside, saved)
        if len(found) > 1:
            twice = f"PEFT saves both {' and '.join(found)}, one within the other, not the numbers it uses"
            raise ValueError(f"{key}: {twice}; give it the whole names of modules in modules_to_save")
        module = found[0] if found else inside
        if name == "weight":
            if not jnp.issubdtype(tensor.dtype, jnp.floating):
                raise ValueError(
                    f"{key}: a quantised weight, {tensor.dtype}; dequantise the module in PyTorch"
                )
            dense = (module in lora and not fan_in_fan_out) or saved_modules(module, DENSE)
            looked_up = module in embeddings or base.rpartition(".")[2] in EMBEDDINGS
            usual = "embedding" if looked_up else "kernel" if dense else name
            name = weights.get(key, usual if tensor.ndim == 2 else name)
        node = trained.setdefault(module, {})
        for part in filter(None, base.removeprefix(module).split(".")):
            node = node.setdefault(part, {})
        node[name] = _to_jax(tensor.T if name == "kernel" else tensor, key)
    return trained


def _without_copies(tensors: Tensors) -> Tensors:
    """The tensors without those that PEFT writes once more, under the names of its wrappers."""
    kept = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(r"(.+)\.(original_module|modules_to_save)\.(.+)", key)
        if match is None:
            kept[key] = tensor
            continue
        module, wrapper, inside = match.groups()  # inside may begin with the adapter's name
        names = [f"{module}.{rest}" for rest in (inside, inside.partition(".")[2]) if rest]
        plain = next((tensors[name] for name in names if name in tensors), None)
        # The original module is the base model's: whatever it was, the trained one stands in its place.
        if plain is None or (wrapper == "modules_to_save" and not np.array_equal(plain, tensor)):
            raise ValueError(
                f"{key}: expected a copy of {' or '.join(names)}, which is another or is missing"
            )
    return kept


def _to_jax(tensor: np.ndarray, name: str) -> jax.Array:
    if jax.dtypes.canonicalize_dtype(tensor.dtype) != tensor.dtype:
        raise ValueError(f"{name}: the numbers are {tensor.dtype}; set jax_enable_x64 to load them")
    return jnp.asarray(tensor)
