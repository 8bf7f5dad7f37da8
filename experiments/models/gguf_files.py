"""GGUF files: models in one file with all that belongs to them, as llama.cpp reads them."""

from pathlib import Path
from typing import Any

import gguf

from experiments import ExperimentError


def read_gguf(path: Path) -> gguf.GGUFReader:
    """The file, mapped into memory; tensors are read when they are asked for."""
    if not path.is_file():
        raise ExperimentError(f"no file {path}; expected a GGUF file")
    try:
        return gguf.GGUFReader(path)
    except (IndexError, KeyError, OSError, ValueError) as error:
        raise ExperimentError(f"{path} is no GGUF file, or not all of one: {error}") from error


def gguf_value(reader: gguf.GGUFReader, key: str, default: Any = None) -> Any:
    """The value of a key: a number, a string, a bool or a list of them."""
    field = reader.get_field(key)
    return default if field is None else field.contents()
