"""Finished parts of a long run on disk, so that an interrupted one goes on where it ended."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from peelwise.errors import OutputError
from peelwise.formats.base import Encoded

_PARTS = ("codes", "scales", "zeros", "support")


class KeptFiles:
    """A folder with a file per finished part, of one run and no other.

    Args:
        folder: made at the first part; removed by `done`.
        key: what the parts depend on: fingerprints of model and probe, settings. A folder of another key is begun anew.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any]) -> None:
        self.folder = folder
        self._key = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()

    def read(self, name: str) -> tuple[dict[str, Tensor], Any] | None:
        """Return tensors and plain values of a part; ``None`` if there is none, or of another run, or damaged."""
        try:
            with safe_open(self._file(name), framework="pt") as file:
                said = file.metadata() or {}
                if said.get("key") != self._key:
                    return None
                return {key: file.get_tensor(key) for key in file.keys()}, json.loads(said["values"])  # noqa: SIM118
        except (OSError, SafetensorError, ValueError, KeyError):
            return None

    def write(self, name: str, tensors: Mapping[str, Tensor], values: Any) -> None:
        """Keep a part, whole or not at all.

        Raises:
            OutputError: If the folder cannot be written.
        """
        file = self._file(name)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            new = file.with_suffix(".new")
            whole = {key: tensor.contiguous() for key, tensor in tensors.items()} or {"none": torch.zeros(1)}
            save_file(whole, new, metadata={"key": self._key, "values": json.dumps(values)})
            new.replace(file)
        except (OSError, SafetensorError) as error:
            raise OutputError(f"{file} cannot be written: {error}. Nothing before it is lost.") from error

    def done(self) -> None:
        """Remove the folder: what it was for is written elsewhere."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def beside(out: str | Path) -> Path:
    """Return the folder beside a result in which finished parts of it are kept."""
    path = Path(out).absolute()
    return path.with_name(f".{path.name}.unfinished")


def begin_anew(out: str | Path) -> None:
    """Remove what an interrupted run with this result has left beside it."""
    shutil.rmtree(beside(out), ignore_errors=True)


def parts_of(name: str, encoded: Encoded) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of codes under names that `encoded_of` finds them by."""
    for part in _PARTS:
        tensor = getattr(encoded, part)
        if tensor is not None:
            yield f"{name}:{part}", tensor


def encoded_of(tensors: Mapping[str, Tensor], name: str) -> Encoded:
    """Return codes from their tensors.

    Raises:
        KeyError: If there are none of this name.
    """
    codes, scales, zeros, support = (tensors.get(f"{name}:{part}") for part in _PARTS)
    if codes is None:
        raise KeyError(name)
    return Encoded(codes, scales, zeros, support)
