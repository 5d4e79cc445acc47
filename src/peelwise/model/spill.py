"""Tensors that there is one of for every block, kept on disk: what is alive in memory does not grow with depth.

Each lies in a file without a name, mapped into memory. The operating system writes its pages out and takes them back
where memory is short, and frees the disk when the tensor is gone, however the process ends.
"""

from __future__ import annotations

import copy
import ctypes
import math
import os
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from peelwise.errors import OutputError

_MMAP_THRESHOLD = -3  # of glibc's mallopt
_SMALL = 1 << 16  # bytes: smaller ones are no burden, and a process may map so many files only
_ZEROS = 1 << 20  # bytes written at a time


class Spill:
    """Keeps tensors in files of one folder.

    Args:
        folder: where; by default what ``TMPDIR`` says, else ``/var/tmp``: ``/tmp`` may be in memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or _usual_folder()

    def kept(self, tensor: Tensor) -> Tensor:
        """Return a copy on disk of a tensor in memory; small ones, and those of other devices, are left where they are.

        Raises:
            OutputError: If the disk has no room.
        """
        if tensor.device.type != "cpu" or tensor.numel() * tensor.element_size() < _SMALL:
            return tensor
        return self.empty(tensor.shape, tensor.dtype).copy_(tensor.detach())

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Return a tensor on disk whose values are 0.

        Raises:
            OutputError: If the disk has no room.
        """
        count = math.prod(shape)
        size = count * dtype.itemsize
        try:
            handle, name = tempfile.mkstemp(prefix="peelwise-", dir=self.folder)
            try:
                _reserve(handle, size)
                found = torch.from_file(name, shared=True, size=count, dtype=dtype)
            finally:
                os.close(handle)
                os.unlink(name)  # the mapping holds what is in it
        except (OSError, RuntimeError) as error:
            raise OutputError(
                f"{self.folder} has no room for {size / 2**20:.0f} MiB that a streamed model keeps on disk "
                f"({getattr(error, 'strerror', None) or 'it cannot be mapped'}). Name a larger folder in TMPDIR."
            ) from error
        return found.view(shape)

    @contextmanager
    def creating(self) -> Iterator[None]:
        """Let modules that are made inside have their parameters on disk."""
        with _OnDisk(self):
            yield


class _OnDisk(TorchFunctionMode):
    """Makes what ``torch.empty`` is asked for on disk, which is how modules make their parameters."""

    def __init__(self, spill: Spill) -> None:
        super().__init__()
        self._spill = spill

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is not torch.empty or found.device.type != "cpu" or found.numel() * found.element_size() < _SMALL:
            return found
        # An empty tensor whose pages nobody has written takes no memory yet.
        return self._spill.empty(found.shape, found.dtype).requires_grad_(found.requires_grad)


def is_mapped(tensor: Tensor) -> bool:
    """Whether the numbers of a tensor are in a file that PyTorch has mapped, as those are that are kept here."""
    return tensor.layout is torch.strided and tensor.untyped_storage().filename is not None


_OF_MODELS: weakref.WeakKeyDictionary[nn.Module, Spill] = weakref.WeakKeyDictionary()


def keep_on_disk_(model: nn.Module, spill: Spill | None = None) -> None:
    """Note that what is kept of a model's blocks is kept on disk, as its weights are."""
    _OF_MODELS[model] = spill or Spill()
    _give_back_freed_memory()


@contextmanager
def kept_on_disk(model: nn.Module) -> Iterator[None]:
    """Keep what is kept of a model's blocks on disk inside the context."""
    if model in _OF_MODELS:
        yield
        return
    keep_on_disk_(model)
    try:
        yield
    finally:
        _OF_MODELS.pop(model, None)


def copied(model: nn.Module) -> nn.Module:
    """Return a deep copy; its parameters are on disk where what is kept of the model is."""
    spill, memo = spill_of(model), dict[int, nn.Parameter]()
    for parameter in model.parameters() if spill is not None else ():
        found = spill.kept(parameter) if spill is not None else parameter
        if found is not parameter:  # small ones, and what is on no CPU, are copied as ever
            memo[id(parameter)] = nn.Parameter(found, requires_grad=parameter.requires_grad)
    made = copy.deepcopy(model, memo)
    if spill is not None:
        keep_on_disk_(made, spill)
    return made


def spill_of(model: nn.Module) -> Spill | None:
    """Return where what is kept of a model's blocks goes to; ``None``: it stays in memory."""
    return _OF_MODELS.get(model)


def _give_back_freed_memory() -> None:
    """Have freed tensors given back to the system at once: glibc keeps pieces of up to 32 MB, blocks' worth of them."""
    try:
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _SMALL)
    except (OSError, AttributeError):  # another C library, which does as it likes
        return


def _usual_folder() -> Path:
    large = Path("/var/tmp")
    if "TMPDIR" not in os.environ and os.access(large, os.W_OK):
        return large
    return Path(tempfile.gettempdir())


def _reserve(handle: int, size: int) -> None:
    """Take the room of a file now: a mapped page that finds none later ends the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, size)
        return
    zeros = bytes(_ZEROS)
    while size > 0:
        size -= os.write(handle, zeros[:size])
