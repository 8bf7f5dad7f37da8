"""What the adapter_config.json of a PEFT adapter says: ranks, scales, modules that are trained whole."""

import collections
import math
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from oplora_jax.adapters.init import positive_number
from oplora_jax.matrix import LowRank

# What an adapter_config.json may say without changing what the adapter computes: names, defaults of training,
# and where the adapter is, which the tensors' names say as well. Anything else that is set would be dropped.
_HARMLESS = {
    *("peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "task_type"),
    *("inference_mode", "lora_dropout", "init_lora_weights", "fan_in_fan_out", "ensure_weight_tying"),
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("megatron_core", "qalora_group_size"),
}
# These change the base model's weights too: the adapter is none for the weights as they are published.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# The modules that PEFT trains and saves whole for a task, if the model has them.
_HEADS = {
    "SEQ_CLS": ["classifier", "score"],
    "TOKEN_CLS": ["classifier", "score"],
    "QUESTION_ANS": ["qa_outputs"],
}
# What models in PyTorch call heads, whose weights with two axes are dense layers', (out, in); and embeddings.
DENSE = ("classifier", "score", "qa_outputs", "classification_head", "lm_head")
EMBEDDINGS = (
    *("embed_tokens", "embed_positions", "word_embeddings", "position_embeddings", "token_type_embeddings"),
    *("wte", "wpe", "shared"),
)


def heads_of(task_type: str | None) -> list[str]:
    """The names of the modules that PEFT saves for a task, whatever else it saves."""
    return list(_HEADS.get(task_type, ()))


def saved_modules(module: str, names: Iterable[str]) -> list[str]:
    """What PEFT finds by names in modules_to_save at a module or above it, outer ones first."""
    parts, endings = module.split("."), tuple(names)
    above = (".".join(parts[: i + 1]) for i in range(len(parts)))
    return [name for name in above if name.endswith(endings)]


def trained_config(
    parameters: Mapping[str, Collection[str]], lora: Collection[str], task_type: str | None
) -> dict[str, Any]:
    """bias and modules_to_save, from the names of the parameters that are trained in modules besides LoRA's.

    PEFT knows three kinds: parameters of layers that have LoRA, biases alone, and modules as a whole.
    """
    heads, biases, saved = heads_of(task_type), set(), []
    for module, names in parameters.items():
        if not names:
            raise ValueError(f"modules_to_save[{module!r}] has no parameters")
        if module not in lora and set(names) != {"bias"}:
            saved.append(module)
        elif "bias" in names:
            biases.add(module)
    if heads and not saved:
        raise ValueError(
            f"task_type {task_type!r} needs the trained head, all its parameters by its name in PyTorch "
            f'({" or ".join(heads)}): modules_to_save={{"{heads[0]}": {{"kernel": ..., "bias": ...}}}}. '
            "For LoRA alone leave task_type out"
        )
    for module in lora:
        if outer := saved_modules(module, [*heads, *saved]):
            raise ValueError(f"{module} has a LoRA parameter, but {outer[0]} is trained and saved as a whole")
    others = lambda module: [*heads, *(other for other in saved if other != module)]
    listed = [*heads, *(module for module in saved if not saved_modules(module, others(module)))]
    bias = "all" if biases.difference(lora) else "lora_only" if biases else "none"
    return {"bias": bias, "modules_to_save": listed or None}


def ranks_and_alphas(modules: Mapping[str, LowRank]) -> dict[str, Any]:
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


def rank_and_scale(module: str, config: Mapping[str, Any]) -> tuple[int, float]:
    """Those of a module; raises ValueError for what is no positive number."""
    found = {}
    for key, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        value = _by_pattern(config.get(pattern) or {}, module, config.get(key, 8))
        if positive_number(value) is None or (key == "r" and value != int(value)):
            kind = "whole number" if key == "r" else "number"
            raise ValueError(f"{module}: the config's {key} is {value!r}; expected a positive {kind}")
        found[key] = value
    rank, alpha = int(found["r"]), found["lora_alpha"]
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of a module, as PEFT's get_pattern_key finds it."""
    keys = (key for key in patterns if re.match(rf"(.*\.)?({key})$", module))
    return patterns.get(next(keys, module), default)


def check_config(config: Any, path: Any) -> None:
    """Raises ValueError unless the adapter is plain LoRA, beside modules that are trained whole."""
    if not isinstance(config, Mapping) or config.get("peft_type") != "LORA":
        found = config.get("peft_type") if isinstance(config, Mapping) else config
        raise ValueError(f"{path}: peft_type is {found!r}; expected 'LORA'")
    wrong = {key: value for key, value in config.items() if value and key not in _HARMLESS}
    if config.get("bias", "none") not in ("none", "lora_only", "all"):
        wrong["bias"] = config["bias"]
    for key, kind in (("rank_pattern", dict), ("alpha_pattern", dict), ("modules_to_save", list)):
        if not isinstance(config.get(key) or kind(), kind):
            wrong[key] = config[key]
    if wrong:
        what = ", ".join(f"{key} is {value!r}" for key, value in wrong.items())
        raise ValueError(f"{path}: {what}; only plain LoRA is supported: it would not be the same adapter")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(_CHANGED_BASE):
        raise ValueError(
            f"{path}: init_lora_weights is {init!r}, which changes the base model's weights too; save it "
            "from PEFT with path_initial_model_for_weight_conversion, for the weights as they are published"
        )
