"""Tensors that accelerate keeps for offloaded modules: those in memory as they are, those on disk as views of files.

Accelerate looks tensors up by name in a mapping: a dictionary of tensors, or a loader that knows of some of them in
which file each lies (safetensors, or its own ``.dat`` files: the bare numbers). The loader copies a ``.dat`` file
whenever it is asked; here files are mapped into memory, and the operating system reads what is used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from peelwise.errors import ModelError
from peelwise.model.checkpoint_files import brief, check_present, check_safetensors
from peelwise.model.spill import Spill


class WeightsMap:
    """Finds tensors of offloaded modules; what is found twice is one tensor.

    Attributes:
        on_disk: whether any tensor that was found lies in a file.
    """

    def __init__(self) -> None:
        self.on_disk = False
        self._spill = Spill()
        self._opened: dict[str, Any] = {}  # one handle a file, whose tensors then are views of one mapping
        self._found: dict[tuple[object, ...], Tensor] = {}

    def tensor(self, weights: Any, name: str) -> Tensor:
        """Return the tensor of a name; one that is stored in another dtype than the model's is converted, on disk.

        Args:
            weights: the mapping of a module's hook, name -> tensor.
            name: the tensor's name in the module.

        Raises:
            ModelError: If its file is missing, damaged or cut short.
            OutputError: If the disk has no room for it in the model's dtype.
        """
        # Accelerate gives each module a view of one mapping under the module's name.
        while hasattr(weights, "dataset") and hasattr(weights, "prefix"):
            weights, name = weights.dataset, f"{weights.prefix}{name}"
        in_files: Mapping[str, Mapping[str, Any]] = getattr(weights, "index", {})
        try:
            if name not in in_files or name in getattr(weights, "state_dict", {}):
                found: Tensor = weights[name].detach()
                return found
            self.on_disk = True
            about = in_files[name]
            if about.get("safetensors_file") is not None:
                return self._of_safetensors(about, name)
            return self._mapped(Path(str(getattr(weights, "save_folder", ""))) / f"{name}.dat", about)
        except KeyError as error:
            raise ModelError(f"{name} was offloaded, and accelerate does not know where to: {brief(error)}.") from error
        except ModelError as error:
            raise ModelError(f"{name} was offloaded: {error}") from error

    def _of_safetensors(self, about: Mapping[str, Any], name: str) -> Tensor:
        file, stored = str(about["safetensors_file"]), about.get("weight_name", name)
        if file not in self._opened:
            check_safetensors(Path(file))
            self._opened[file] = safe_open(file, framework="pt")
        key = file, stored, about.get("dtype")
        if key not in self._found:
            opened = self._opened[file]
            if stored not in opened.keys():  # noqa: SIM118
                raise ModelError(f"{file} has no tensor {stored}. Load the model again.")
            tensor = opened.get_tensor(stored)
            dtype = getattr(torch, about["dtype"]) if "dtype" in about else tensor.dtype
            self._found[key] = tensor if tensor.dtype == dtype else self._spill.kept(tensor.to(dtype))
        return self._found[key]

    def _mapped(self, file: Path, about: Mapping[str, Any]) -> Tensor:
        check_present(file)
        shape, dtype = tuple(about["shape"]), getattr(torch, about["dtype"])
        count = math.prod(shape)
        held, expected = file.stat().st_size, count * dtype.itemsize
        if held != expected:
            raise ModelError(
                f"{file} is damaged or cut short: {held} bytes, expected {expected}. Load the model again."
            )
        key = (str(file),)
        if key not in self._found:
            self._found[key] = torch.from_file(str(file), shared=False, size=count, dtype=dtype).view(shape)
        return self._found[key]
