"""LoRA adapters of Hugging Face PEFT, read and written without PyTorch.

The format is that of https://huggingface.co/docs/peft/developer_guides/checkpoint.
"""

import collections
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from oplora_jax.adapters.paths import leaf_name
from oplora_jax.matrix import LowRank, check_factors, is_low_rank

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."

# What an adapter_config.json may say without changing what the adapter computes: names, defaults of training,
# and where the adapter is, which the tensors' names say as well. Anything else that is set would be dropped.
_HARMLESS = {
    *("peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "task_type"),
    *("inference_mode", "lora_dropout", "init_lora_weights", "fan_in_fan_out", "ensure_weight_tying"),
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("megatron_core", "qalora_group_size"),
}
# These change the base model's weights too: the adapter is none for the weights as they are published.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

Names = Mapping[str, str | Sequence[str]] | Callable[[str], Any]


def save_adapter(
    folder: str | os.PathLike[str],
    lora: Any,
    *,
    names: Names | None = None,
    base_model: str | None = None,
    task_type: str | None = None,
    fan_in_fan_out: bool = False,
) -> None:
    """Writes LoRA parameters as a PEFT adapter, which `peft.PeftModel.from_pretrained` loads.

    The factors are written bit for bit; the `roles` of a kernel's axes are not.

    Args:
      folder: made if need be; its adapter_model.safetensors and adapter_config.json are replaced.
      lora: LoRA parameters by path, as `init_lora` and `to_low_rank` return them, or any tree with `LowRank`
        nodes, of any ranks and scales. Other leaves are not written.
      names: the PyTorch module of each path, a dict or a function of the path: "layer_0/query/kernel" may be
        "bert.encoder.layer.0.attention.self.query". For a parameter of stacked layers, (layers, n, m), one
        name per layer. By default "a/b/kernel" is the module "a.b".
      base_model, task_type: for the config; PEFT's task types are "CAUSAL_LM", "SEQ_CLS" and so on.
      fan_in_fan_out: True where the modules are `Conv1D`, as GPT-2's; PEFT only warns without it.

    Raises:
      ValueError: no LoRA parameter, names that are missing, repeated or too few, factors that do not fit.

    Example:
      >>> import tempfile, jax.numpy as jnp
      >>> from oplora_jax import LowRank
      >>> from oplora_jax.peft import load_adapter, save_adapter
      >>> lora = {"query/kernel": LowRank(jnp.ones((4, 2)), jnp.ones((2, 6)), scale=4.0)}
      >>> names = {"query/kernel": "model.layers.0.self_attn.q_proj"}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...   save_adapter(folder, lora, names=names, task_type="CAUSAL_LM")
      ...   loaded = load_adapter(folder, names=names)["query/kernel"]
      >>> loaded.shape, loaded.scale
      ((4, 6), 4.0)
    """
    modules: dict[str, LowRank] = {}
    for path, node in jax.tree.leaves_with_path(lora, is_leaf=is_low_rank):
        if not is_low_rank(node):
            continue
        name = leaf_name(path)
        check_factors(node, name)
        for module, layer in _layers(name, node, names):
            if module in modules:
                raise ValueError(f"{name}: another parameter has the module name {module!r} as well")
            modules[module] = layer
    if not modules:
        raise ValueError("no LoRA parameters: save_adapter takes a dict or a tree with LowRank nodes")
    tensors = {  # in PyTorch's layout; safetensors writes an array's memory as it lies there
        f"{_PREFIX}{module}.lora_{name}.weight": np.ascontiguousarray(np.asarray(factor).T)
        for module, node in modules.items()
        for name, factor in (("A", node.a), ("B", node.b))
    }
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        **_ranks_and_alphas(modules),
        "use_rslora": False,
        "target_modules": sorted(modules),
        "fan_in_fan_out": fan_in_fan_out,
        "bias": "none",
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    _replace(folder, _WEIGHTS, safetensors.numpy.save(tensors, metadata={"format": "pt"}))
    _replace(folder, _CONFIG, (json.dumps(config, indent=2) + "\n").encode())


def load_adapter(folder: str | os.PathLike[str], *, names: Names | None = None) -> dict[str, LowRank]:
    """Reads a PEFT adapter.

    Args:
      folder: with adapter_model.safetensors and adapter_config.json.
      names: as for `save_adapter` if a dict, in which names that the adapter lacks are ignored; a function
        takes the PyTorch module's name instead, and returns the path. By default the module "a.b" is the
        path "a/b/kernel". Where a path has several names, their layers are stacked.

    Returns:
      A dict from paths to `LowRank` parameters in the file's types, whose scale is lora_alpha / r, or
      lora_alpha / sqrt(r) with use_rslora. `dataclasses.replace` gives one its `roles`, where need be.

    Raises:
      FileNotFoundError: a file that is missing.
      ValueError: anything besides plain LoRA of dense layers, which would be left out otherwise; factors that
        do not fit, a module without a name, or layers of a stack that do not match.

    Example:
      >>> import tempfile, jax.numpy as jnp
      >>> from oplora_jax import LowRank
      >>> from oplora_jax.peft import load_adapter, save_adapter
      >>> with tempfile.TemporaryDirectory() as folder:
      ...   save_adapter(folder, {"encoder.query": LowRank(jnp.ones((3, 1)), jnp.ones((1, 2)))})
      ...   {path: p.shape for path, p in load_adapter(folder).items()}
      {'encoder/query/kernel': (3, 2)}
    """
    folder = pathlib.Path(folder)
    for name in (_CONFIG, _WEIGHTS):
        if not (folder / name).is_file():
            found = ", ".join(sorted(os.listdir(folder))) if folder.is_dir() else "no such folder"
            raise FileNotFoundError(f"{folder}: no {name}; found {found or 'nothing'}")
    config = json.loads((folder / _CONFIG).read_text())
    _check_config(config, folder / _CONFIG)
    with safetensors.safe_open(folder / _WEIGHTS, framework="numpy") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    modules = {name: _from_tensors(name, both, config) for name, both in _pair_tensors(tensors).items()}
    if isinstance(names, Mapping):
        return _by_dict(modules, names)
    lora: dict[str, LowRank] = {}
    for module, node in modules.items():
        path = module.replace(".", "/") + "/kernel" if names is None else names(module)
        if not isinstance(path, str) or path in lora:
            raise ValueError(f"names({module!r}) is {path!r}; expected a path of its own for each module")
        lora[path] = node
    return lora


def _layers(path: str, node: LowRank, names: Names | None) -> list[tuple[str, LowRank]]:
    """(module name, matrix) of each layer of a parameter."""
    if isinstance(names, Mapping) and path not in names:
        raise ValueError(f"{path}: no module name; names has {', '.join(sorted(names)) or 'none'}")
    if names is None:
        given = path.removesuffix("/kernel").replace("/", ".")
    else:
        given = names[path] if isinstance(names, Mapping) else names(path)
    if node.a.ndim == 2 and isinstance(given, str):
        return [(given, node)]
    several = isinstance(given, Sequence) and not isinstance(given, str)
    if not several or node.a.ndim != 3 or len(given) != len(node.a):
        of_each = f"a module name for each of the {node.shape[:-2]} layers"
        expected = "one module name" if node.a.ndim == 2 else of_each
        raise ValueError(f"{path}: a parameter {node.shape} needs {expected}; names gives {given!r}")
    return [(name, node.with_factors(*factors)) for name, *factors in zip(given, node.a, node.b, strict=True)]


def _ranks_and_alphas(modules: dict[str, LowRank]) -> dict[str, Any]:
    """r and lora_alpha, the most common ones, and the patterns for the modules that differ."""
    ranks = {module: node.a.shape[-1] for module, node in modules.items()}
    alphas = {module: _alpha(node.scale, ranks[module]) for module, node in modules.items()}
    out = {}
    for key, pattern, values in (("r", "rank_pattern", ranks), ("lora_alpha", "alpha_pattern", alphas)):
        [(usual, _)] = collections.Counter(values.values()).most_common(1)
        out[key] = usual
        # PEFT takes the first key that, as a regular expression, is found at the end of a module's name.
        out[pattern] = {f"^{re.escape(m)}": value for m, value in values.items() if value != usual}
    return out


def _alpha(scale: float | int, rank: int) -> float | int:
    """lora_alpha, for which lora_alpha / rank is the scale, exactly if any is; a whole number if one is."""
    product = scale * rank
    near = [round(product), product, math.nextafter(product, 0), math.nextafter(product, math.inf)]
    return min(near, key=lambda alpha: abs(alpha / rank - scale))


def _replace(folder: str | os.PathLike[str], name: str, content: bytes) -> None:
    """Writes a file, so that whoever reads it sees the old one or the new one."""
    temporary = pathlib.Path(folder, f".{name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, temporary.with_name(name))
    finally:
        temporary.unlink(missing_ok=True)


def _check_config(config: dict[str, Any], path: pathlib.Path) -> None:
    """Raises ValueError unless the adapter is plain LoRA."""
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type is {config.get('peft_type')!r}; expected 'LORA'")
    wrong = {key: value for key, value in config.items() if value and key not in _HARMLESS}
    if config.get("bias", "none") != "none":
        wrong["bias"] = config["bias"]
    if wrong:
        what = ", ".join(f"{key} is {value!r}" for key, value in wrong.items())
        raise ValueError(f"{path}: {what}; only plain LoRA is supported: it would not be the same adapter")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(_CHANGED_BASE):
        raise ValueError(
            f"{path}: init_lora_weights is {init!r}, which changes the base model's weights too; save it "
            "from PEFT with path_initial_model_for_weight_conversion, for the weights as they are published"
        )


def _pair_tensors(tensors: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """{module: {"A": (r, n), "B": (m, r)}}."""
    modules = collections.defaultdict(dict)
    for key, tensor in tensors.items():
        match = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_([AB])\.weight", key)
        if match is None:
            raise ValueError(f"{key}: only lora_A.weight and lora_B.weight of dense layers are supported")
        if tensor.ndim != 2:
            raise ValueError(f"{key} is {tensor.shape}; only dense layers, with two axes, are supported")
        modules[match[1]][match[2]] = tensor
    if not modules:
        raise ValueError("the adapter has no tensors")
    for module, factors in modules.items():
        if len(factors) < 2:
            raise ValueError(f"{module}: lora_{next(iter(factors))} without the other factor")
    return modules


def _from_tensors(module: str, factors: dict[str, np.ndarray], config: dict[str, Any]) -> LowRank:
    rank = _by_pattern(config.get("rank_pattern") or {}, module, config.get("r", 8))
    alpha = _by_pattern(config.get("alpha_pattern") or {}, module, config.get("lora_alpha", 8))
    shapes = factors["A"].shape, factors["B"].shape
    if not shapes[0][0] == shapes[1][1] == rank:
        factors = f"lora_A {shapes[0]} and lora_B {shapes[1]} do not fit"
        raise ValueError(f"{module}: {factors}; the config's rank is {rank}: expected (r, n) and (m, r)")
    for tensor in factors.values():
        if jax.dtypes.canonicalize_dtype(tensor.dtype) != tensor.dtype:
            raise ValueError(f"{module}: the factors are {tensor.dtype}; set jax_enable_x64 to load them")
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    node = LowRank(jnp.asarray(factors["A"].T), jnp.asarray(factors["B"].T), scale)
    check_factors(node, module)
    return node


def _by_pattern(patterns: dict[str, Any], module: str, default: Any) -> Any:
    """The value of a module, as PEFT's get_pattern_key finds it."""
    keys = (key for key in patterns if re.match(rf"(.*\.)?({key})$", module))
    return patterns.get(next(keys, module), default)


def _by_dict(modules: dict[str, LowRank], names: Mapping[str, Any]) -> dict[str, LowRank]:
    """The modules by the paths of a dict {path: module or modules}."""
    wanted = {path: [of] if isinstance(of, str) else list(of) for path, of in names.items()}
    counts = collections.Counter(module for several in wanted.values() for module in several)
    repeated = [module for module, count in counts.items() if count > 1]
    if repeated:
        raise ValueError(f"{', '.join(repeated)}: names has this module more than once")
    unnamed = [module for module in modules if module not in counts]
    if unnamed:
        raise ValueError(f"{', '.join(unnamed)}: no path; names has the modules {', '.join(counts)}")
    lora = {}
    for path, several in wanted.items():
        nodes = [modules[module] for module in several if module in modules]
        if nodes and len(nodes) < len(several):
            absent = ", ".join(module for module in several if module not in modules)
            raise ValueError(f"{path}: the adapter lacks some of its layers, {absent}")
        kinds = sorted({str((z.a.shape, z.b.shape, z.a.dtype, z.b.dtype, z.scale)) for z in nodes})
        if len(kinds) > 1:
            raise ValueError(f"{path}: layers of one stack differ in shape, type or scale: {kinds}")
        if nodes:
            stack = lambda *factors: jnp.stack(factors)
            lora[path] = nodes[0] if isinstance(names[path], str) else jax.tree.map(stack, *nodes)
    return lora
