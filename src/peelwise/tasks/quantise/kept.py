"""The codes of finished blocks on disk, so that an interrupted run goes on where it ended."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from peelwise.errors import OutputError
from peelwise.formats.base import Encoded
from peelwise.records.quantise import QuantisedLayer

Found = Mapping[str, tuple[Encoded, QuantisedLayer]]
_PARTS = ("codes", "scales", "zeros", "support")


class Kept:
    """A folder with a file per finished block, of one run and no other.

    Args:
        folder: made at the first block; removed by `done`.
        key: what the codes depend on: fingerprints of model and probe, settings. A folder of another key is begun anew.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any]) -> None:
        self.folder = folder
        self._key = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()

    def get(self, block: int) -> dict[str, tuple[Encoded, QuantisedLayer]] | None:
        """Return what is kept of a block; ``None`` if there is nothing, or of another run, or damaged."""
        try:
            with safe_open(self._file(block), framework="pt") as file:
                said = file.metadata() or {}
                if said.get("key") != self._key:
                    return None
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            lines = [QuantisedLayer.model_validate(each) for each in json.loads(said["layers"])]
        except (OSError, SafetensorError, ValueError, KeyError):
            return None
        return {line.name: (_encoded(tensors, line.name), line) for line in lines}

    def put(self, block: int, found: Found) -> None:
        """Keep the layers of a block, whole or not at all.

        Raises:
            OutputError: If the folder cannot be written.
        """
        tensors = {
            f"{name}:{part}": tensor.contiguous()
            for name, (encoded, _) in found.items()
            for part in _PARTS
            if (tensor := getattr(encoded, part)) is not None
        }
        lines = json.dumps([line.model_dump() for _, line in found.values()])
        file = self._file(block)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            new = file.with_suffix(".new")
            save_file(tensors or {"none": torch.zeros(1)}, new, metadata={"key": self._key, "layers": lines})
            new.replace(file)
        except (OSError, SafetensorError) as error:
            raise OutputError(f"{file} cannot be written: {error}. Nothing before it is lost.") from error

    def done(self) -> None:
        """Remove the folder: what it was for is written elsewhere."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, block: int) -> Path:
        return self.folder / f"block-{block:04d}.safetensors"


def _encoded(tensors: Mapping[str, Tensor], name: str) -> Encoded:
    codes, scales, zeros, support = (tensors.get(f"{name}:{part}") for part in _PARTS)
    if codes is None:
        raise KeyError(name)
    return Encoded(codes, scales, zeros, support)
