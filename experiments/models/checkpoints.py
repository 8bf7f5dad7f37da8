"""Folders of Hugging Face checkpoints: config.json, and the tensors as safetensors."""

import json
from pathlib import Path
from typing import Any

import safetensors

from experiments import ExperimentError

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def open_tensors(folder: Path) -> dict[str, tuple[Any, str]]:
    """(open file, name in it) of each tensor, in one file or in several shards with an index, by its name.

    Raises:
      ExperimentError: a file that is missing or cannot be read.
    """
    if (folder / _SINGLE).is_file() or not (folder / _INDEX).is_file():
        names = [_SINGLE]
    else:
        names = sorted(set(read_json(folder, _INDEX).get("weight_map", {}).values()))
    files = [_open(folder, name) for name in names]
    return {key: (file, key) for file in files for key in file.keys()}  # noqa: SIM118 (no mapping)


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """What a JSON file of the folder holds.

    Raises:
      ExperimentError: it is missing or no JSON.
    """
    _check_file(folder, name)
    try:
        return json.loads((folder / name).read_text())
    except ValueError as error:
        raise ExperimentError(f"{folder / name} is no JSON: {error}") from error


def _open(folder, name):
    _check_file(folder, name)
    try:
        return safetensors.safe_open(folder / name, framework="numpy")
    except safetensors.SafetensorError as error:
        raise ExperimentError(f"{folder / name} is no safetensors file: {error}") from error


def _check_file(folder: Path, name: str) -> None:
    if (folder / name).is_file():
        return
    if not folder.is_dir():
        raise ExperimentError(f"no folder {folder}; expected one with config.json and model.safetensors")
    hint = ""
    if name == _SINGLE and (folder / "pytorch_model.bin").is_file():
        hint = (
            " pytorch_model.bin is not read; where PyTorch and transformers are installed, save it as "
            'safetensors: transformers.AutoModel.from_pretrained(folder).save_pretrained("new_folder")'
        )
    raise ExperimentError(f"{folder}: no {name}; expected config.json and model.safetensors.{hint}")
