"""Checks of weight files before anything loads them: regular, inside the folder, complete, and free of code.

Loaders answer a damaged file with a message about their own internals, or fill the gap with random
numbers, or read a device for ever. Here the file itself is named.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from safetensors import safe_open
from torch import Tensor

from peelwise.errors import ModelError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLE, _PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_WEIGHT_SUFFIXES = (*_PICKLE_SUFFIXES, ".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", ".npz")
_RANK_LOCAL = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")  # opened before all others by transformers
_LFS_MARK = b"version https://git-lfs"
_LARGEST_TEXT_BYTES = 128 * 2**20  # of a file beside the weights; the largest tokenizers have 35 MB
# Objects that are made of a file take longer than its bytes: of tensors in one file, of names in an index, of keys.
_MOST_TENSORS, _MOST_ENTRIES, _MOST_CONFIG_ENTRIES = 100_000, 1_000_000, 200_000
_LONGEST_NAME = 1024
_PICKLE_MARKS = (b"PK", b"\x80")  # torch.save: a zip archive, and long ago a bare pickle
_SPARSE_FROM_BYTES = 2**30
_LEAST_SHARE_ON_DISK = 1 / 16


@dataclass(frozen=True)
class Stored:
    """What the weight files of a model hold.

    Args:
        safetensors: Whether they are safetensors.
        size: Bytes of all files together.
        shapes: Tensor -> shape, as the files' headers say; empty where only a loader can tell (pickles).
    """

    safetensors: bool
    size: int
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)


def read_config(folder: Path) -> dict[str, Any]:
    """Return ``config.json`` of a Hugging Face folder.

    Raises:
        ModelError: If it is missing, no JSON object, or names no architecture.
    """
    file = folder / "config.json"
    if not file.exists():
        hint = "Give a folder written by save_pretrained, a .gguf file or smollm2."
        if (folder / "adapter_config.json").is_file():
            hint = "It holds an adapter only: merge it into its base model and save that."
        raise ModelError(f"{folder} has no config.json. {hint}")
    config = read_json(file, _MOST_CONFIG_ENTRIES)
    if not config.get("model_type"):
        raise ModelError(f"{file} names no architecture: expected a model_type such as 'llama'. Add it.")
    if not isinstance(config["model_type"], str):
        kind = type(config["model_type"]).__name__
        raise ModelError(f"{file}: model_type should be a name such as 'llama', got {kind}. Save the model again.")
    return config


def check_folder(folder: Path) -> None:
    """Check that everything in a folder is a regular file (or folder) of a size that files of its kind have.

    A loader opens many files beside the weights. A named pipe or a device among them would be read for ever.

    Raises:
        ModelError: If it is not.
    """
    for file in sorted(folder.iterdir()):
        try:
            found = file.stat()
        except OSError as error:
            raise ModelError(f"{file} cannot be read: {_reason(error)}. Copy the whole model again.") from error
        if stat.S_ISDIR(found.st_mode):
            continue
        if not stat.S_ISREG(found.st_mode):
            raise ModelError(f"{file} is a pipe, socket or device: expected a regular file. Remove it.")
        if file.suffix not in _WEIGHT_SUFFIXES and found.st_size > _LARGEST_TEXT_BYTES:
            _refuse_size(file, found.st_size)


def check_weights(folder: Path, *, allow_pickle: bool) -> Stored:
    """Check the weight files of a Hugging Face folder.

    Args:
        folder: The folder.
        allow_pickle: Whether pickled weights will do if there are no others.

    Returns:
        What the files hold.

    Raises:
        ModelError: If weights are missing, damaged, outside of the folder, or pickled without leave.
    """
    local = next((file.name for file in sorted(folder.iterdir()) if _RANK_LOCAL.match(file.name)), None)
    if local is not None:
        raise ModelError(
            f"{folder} holds parts of a model by process ({local}): expected {_SINGLE}. Put them together with "
            "save_pretrained where it was trained."
        )
    if (folder / _SINGLE).exists():
        shapes = check_safetensors(folder / _SINGLE)
        return Stored(True, (folder / _SINGLE).stat().st_size, shapes)
    if (folder / _INDEX).exists():
        return _check_shards(folder / _INDEX)
    return _check_pickles(folder, allow_pickle)


def check_safetensors(file: Path) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the tensors in one safetensors file, whose header must account for every byte.

    Raises:
        ModelError: If the file is missing, truncated or of another format.
    """
    check_present(file)
    with file.open("rb") as raw:
        header = raw.read(min(int.from_bytes(raw.read(8), "little"), _LARGEST_TEXT_BYTES))
    if header.count(b":") > 5 * _MOST_TENSORS:  # each has four, besides some in names
        raise ModelError(f"{file} has a header of more than {_MOST_TENSORS} tensors or remarks. Save the model again.")
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except Exception as error:  # the reader documents no common base
        raise ModelError(
            f"{file} is damaged or cut short: {brief(error)} ({file.stat().st_size} bytes). Copy it again."
        ) from error


def read_tensors(folder: Path, names: Collection[str]) -> dict[str, Tensor]:
    """Return those of the named tensors that the folder's safetensors files hold; call `check_weights` first."""
    return dict(each_tensor(folder, names))


def each_tensor(folder: Path, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield what `read_tensors` returns, one tensor in memory at a time."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                if name in names:
                    yield name, opened.get_tensor(name)


def check_present(file: Path) -> None:
    """Check that a weight file is a regular file with bytes behind its length, and no pointer to one.

    Raises:
        ModelError: If it is not.
    """
    try:
        found = file.stat()
    except OSError as error:
        raise ModelError(f"{file} is missing ({_reason(error)}). Copy the whole model again.") from error
    if not stat.S_ISREG(found.st_mode):
        raise ModelError(f"{file} is a folder, pipe or device: expected a regular file. Copy the model again.")
    on_disk = getattr(found, "st_blocks", 0) * 512  # some network file systems say 0, which tells nothing
    if found.st_size > _SPARSE_FROM_BYTES and 0 < on_disk < found.st_size * _LEAST_SHARE_ON_DISK:
        raise ModelError(
            f"{file} is mostly a hole: {found.st_size} bytes long, {on_disk} of them on disk. Copy it again."
        )
    try:
        with file.open("rb") as opened:
            start = opened.read(len(_LFS_MARK))
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {_reason(error)}. Copy it again.") from error
    if start == _LFS_MARK:
        raise ModelError(f"{file} is a Git LFS pointer, not the weights themselves. Run: git lfs pull")


def read_json(file: Path, entries: int = _MOST_ENTRIES) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Args:
        file: the file.
        entries: of objects that it may have.

    Raises:
        ModelError: If it is no regular file, too large, no JSON, or another value.
    """
    try:
        found = file.stat()
        if not stat.S_ISREG(found.st_mode):
            raise ModelError(f"{file} is a folder, pipe or device: expected a regular file. Copy the model again.")
        if found.st_size > _LARGEST_TEXT_BYTES:
            _refuse_size(file, found.st_size)
        text = file.read_text(encoding="utf-8")
        if text.count(":") > entries:
            raise ModelError(f"{file} has more than {entries} entries, which no model needs. Copy it again.")
        content = json.loads(text)
    except RecursionError as error:
        raise ModelError(f"{file} is not valid JSON: nested too deeply. Copy it again.") from error
    except (OSError, ValueError) as error:  # ValueError covers JSON and UTF-8 alike
        raise ModelError(f"{file} is not valid JSON: {brief(error)}. Copy it again.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file}: expected a JSON object, got {type(content).__name__}. Copy it again.")
    return content


def brief(error: BaseException) -> str:
    """Return the first line of an error's message, at most 200 characters, without its final stop."""
    line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    prefix = "unknown name " if isinstance(error, KeyError) else ""  # its message is the bare key
    return prefix + line.strip()[:200].rstrip(".:")


def _check_pickles(folder: Path, allow_pickle: bool) -> Stored:
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLE_SUFFIXES)
    if not pickles:
        raise ModelError(f"{folder} has no weights: expected {_SINGLE} or {_INDEX}. Save the model there.")
    if not allow_pickle:
        raise ModelError(
            f"{folder} has only pickled weights ({pickles[0]}), which can run code when opened: expected "
            f"{_SINGLE}. Save it with save_pretrained, or allow pickle if you trust the source."
        )
    if (folder / _PICKLE).exists():
        _check_pickle(folder / _PICKLE)
        return Stored(False, (folder / _PICKLE).stat().st_size)
    if not (folder / _PICKLE_INDEX).exists():
        raise ModelError(f"{folder / pickles[0]}: pickled weights must be called {_PICKLE}. Rename the file.")
    shards = _shards(folder / _PICKLE_INDEX, _weight_map(folder / _PICKLE_INDEX))
    for shard in shards.values():
        _check_pickle(shard)
    return Stored(False, sum(shard.stat().st_size for shard in shards.values()))


def _check_pickle(file: Path) -> None:
    check_present(file)
    with file.open("rb") as opened:
        start = opened.read(2)
    if not start.startswith(_PICKLE_MARKS):
        raise ModelError(f"{file} is no file of torch.save: it begins with {start!r}. Copy it again.")


def _check_shards(index: Path) -> Stored:
    shard_of = _weight_map(index)
    files = _shards(index, shard_of)
    shapes: dict[str, tuple[int, ...]] = {}
    for shard, file in files.items():
        found = check_safetensors(file)
        missing = sorted(name for name, where in shard_of.items() if where == shard and name not in found)
        if missing:
            raise ModelError(f"{file} lacks {missing[0]!r}, which {index.name} says it holds. Copy both again.")
        shapes.update(found)
    return Stored(True, sum(file.stat().st_size for file in files.values()), shapes)


def _weight_map(index: Path) -> dict[str, str]:
    shard_of = read_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise ModelError(f"{index} has no weight_map: expected the shard of every tensor. Copy it again.")
    for name, shard in shard_of.items():
        if not isinstance(shard, str) or not shard.isprintable() or not 0 < len(shard) <= _LONGEST_NAME:
            raise ModelError(
                f"{index}: the shard of {name!r} should be the name of a file, got {brief(ValueError(repr(shard)))}. "
                "Copy it again."
            )
    return shard_of


def _shards(index: Path, shard_of: dict[str, str]) -> dict[str, Path]:
    """Return shard -> file, all of them inside the folder; its weights are no other files of the machine."""
    folder = index.parent.resolve()
    # The hub's cache keeps files once, in blobs/, with links to them in snapshots/<revision>/.
    allowed = [folder] + ([folder.parent.parent / "blobs"] if folder.parent.name == "snapshots" else [])
    files = {}
    for shard in sorted(set(shard_of.values())):
        named = PurePath(shard)
        try:
            real = (folder / shard).resolve()
            inside = any(real.is_relative_to(place) for place in allowed)
        except (OSError, RuntimeError) as error:  # links in a circle, names that are too long
            raise ModelError(f"{index} names {shard[:80]!r}: {brief(error)}. Copy the model again.") from error
        if named.is_absolute() or ".." in named.parts or not inside:
            raise ModelError(
                f"{index} names {shard[:200]!r}, which lies outside of the folder: expected files beside it. "
                "Copy the files into the folder, if you trust them."
            )
        files[shard] = index.parent / shard
    return files


def _refuse_size(file: Path, size: int) -> None:
    raise ModelError(f"{file} has {size} bytes: expected at most {_LARGEST_TEXT_BYTES} of such a file. Copy it again.")


def _reason(error: OSError) -> str:
    return (error.strerror or type(error).__name__).lower()
