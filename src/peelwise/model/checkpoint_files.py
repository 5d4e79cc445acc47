"""Checks of weight files before anything loads them: present, complete, and free of code.

Loaders answer a damaged file with a message about their own internals, or fill the gap with random
numbers. Here the file itself is named.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from peelwise.errors import MissingExtraError, ModelError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_LFS_MARK = b"version https://git-lfs"


def read_config(folder: Path) -> dict[str, Any]:
    """Return ``config.json`` of a Hugging Face folder.

    Raises:
        ModelError: If it is missing, no JSON object, or names no architecture.
    """
    file = folder / "config.json"
    if not file.is_file():
        hint = "Give a folder written by save_pretrained, a .gguf file or smollm2."
        if (folder / "adapter_config.json").is_file():
            hint = "It holds an adapter only: merge it into its base model and save that."
        raise ModelError(f"{folder} has no config.json. {hint}")
    config = _read_json(file)
    if not config.get("model_type"):
        raise ModelError(f"{file} names no architecture: expected a model_type such as 'llama'. Add it.")
    return config


def check_weights(folder: Path, *, allow_pickle: bool) -> bool:
    """Check the weight files of a Hugging Face folder.

    Args:
        folder: The folder.
        allow_pickle: Whether pickled weights will do if there are no others.

    Returns:
        Whether the weights are safetensors.

    Raises:
        ModelError: If weights are missing, damaged, or pickled without leave.
    """
    if (folder / _SINGLE).is_file():
        check_safetensors(folder / _SINGLE)
        return True
    if (folder / _INDEX).is_file():
        _check_shards(folder / _INDEX)
        return True
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLE_SUFFIXES)
    if not pickles:
        raise ModelError(f"{folder} has no weights: expected {_SINGLE} or {_INDEX}. Save the model there.")
    if not allow_pickle:
        raise ModelError(
            f"{folder} has only pickled weights ({pickles[0]}), which can run code when opened: expected "
            f"{_SINGLE}. Save it with save_pretrained, or allow pickle if you trust the source."
        )
    if not any((folder / name).is_file() for name in _PICKLES):
        raise ModelError(f"{folder / pickles[0]}: pickled weights must be called {_PICKLES[0]}. Rename the file.")
    return False


def check_safetensors(file: Path) -> set[str]:
    """Return the names of the tensors in one safetensors file, whose header must account for every byte.

    Raises:
        ModelError: If the file is missing, truncated or of another format.
    """
    _check_present(file)
    try:
        with safe_open(file, framework="pt") as opened:
            return set(opened.keys())
    except Exception as error:  # the reader documents no common base
        raise ModelError(
            f"{file} is damaged or cut short: {brief(error)} ({file.stat().st_size} bytes). Copy it again."
        ) from error


def read_tensors(folder: Path, names: Collection[str]) -> dict[str, Tensor]:
    """Return those of the named tensors that the folder's safetensors files hold; call `check_weights` first."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            found.update({name: opened.get_tensor(name) for name in opened.keys() if name in names})  # noqa: SIM118
    return found


def check_gguf(file: Path) -> None:
    """Check that a GGUF file has its magic and holds every tensor that it announces.

    Raises:
        ModelError: If it does not.
        MissingExtraError: If the gguf package is not installed.
    """
    _check_present(file)
    with file.open("rb") as opened:
        magic = opened.read(4)
    if magic != b"GGUF":
        raise ModelError(f"{file} is not a GGUF file: expected it to begin with b'GGUF', got {magic!r}.")
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise MissingExtraError("Opening a .gguf file", "gguf") from error
    size = file.stat().st_size
    try:
        tensors = GGUFReader(file).tensors
    except Exception as error:  # numpy errors of any kind, wherever the bytes end
        raise ModelError(f"{file} is damaged or cut short at {size} bytes. Copy it again.") from error
    end = max((tensor.data_offset + tensor.n_bytes for tensor in tensors), default=0)
    if not tensors or end > size:
        raise ModelError(f"{file} is damaged: {len(tensors)} tensors need {end} bytes, got {size}. Copy it again.")


def brief(error: Exception) -> str:
    """Return the first line of an error's message, at most 200 characters, without its final stop."""
    line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    prefix = "unknown name " if isinstance(error, KeyError) else ""  # its message is the bare key
    return prefix + line.strip()[:200].rstrip(".:")


def _check_shards(index: Path) -> None:
    shard_of = _read_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise ModelError(f"{index} has no weight_map: expected the shard of every tensor. Copy it again.")
    for shard in sorted(set(shard_of.values())):
        found = check_safetensors(index.parent / shard)
        missing = sorted(name for name, where in shard_of.items() if where == shard and name not in found)
        if missing:
            raise ModelError(f"{index.parent / shard} lacks {missing[0]!r}, which {index.name} says it holds.")


def _check_present(file: Path) -> None:
    if not file.is_file():
        raise ModelError(f"{file} is missing. Copy the whole model again.")
    with file.open("rb") as opened:
        if opened.read(len(_LFS_MARK)) == _LFS_MARK:
            raise ModelError(f"{file} is a Git LFS pointer, not the weights themselves. Run: git lfs pull")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # ValueError covers JSON and UTF-8 alike
        raise ModelError(f"{file} is not valid JSON: {brief(error)}. Copy it again.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file}: expected a JSON object, got {type(content).__name__}.")
    return content
