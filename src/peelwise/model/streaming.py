"""Weights that stay in their files: mapped into memory, read as they are needed, dropped where memory is short.

A safetensors file holds every tensor as it lies in memory, so one that is taken in its own dtype on the CPU is no copy
but a view of the file. The operating system reads its pages when a block runs and takes them back for others: alive at
any time are one block's weights, not the model's.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import torch

from peelwise.errors import DeviceError, PeelwiseWarning
from peelwise.model.checkpoint_files import check_folder, check_weights, read_config

_OF_FLOAT32 = 4  # bytes
_BESIDE = 1.5  # what a model needs in all, in units of its weights
# Where Linux says how much a container may take and has taken, by the version of its control groups.
_GROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def check_streamable(path: Path, dtype: str, device: torch.device) -> None:
    """Check that the weights of a model can stay in their files.

    Raises:
        DeviceError: If they are to be on another device or in another dtype, or are in no safetensors folder.
    """
    if device.type != "cpu":
        raise DeviceError(f"--stream leaves weights in files, for the CPU; got device {device}. Leave one of them out.")
    if dtype != "auto":
        raise DeviceError(
            f"--stream takes weights in the dtype that is stored; got dtype {dtype}. Leave one of them out."
        )
    if not path.is_dir():
        raise DeviceError(
            f"--stream needs a folder with safetensors, got {path.name}, which is dequantised into memory."
        )


def must_stream(path: Path) -> bool:
    """Whether a folder's weights are safetensors that would not fit into memory in float32; one warning says so."""
    if not path.is_dir():
        return False
    check_folder(path)
    if not any(path.glob("*.safetensors")):  # whether pickled weights will do is asked when they are opened
        return False
    if "quantization_config" in read_config(path):  # packed weights are unpacked into memory
        return False
    stored, free = check_weights(path, allow_pickle=True), available_memory()
    needed = _OF_FLOAT32 * sum(math.prod(shape) for shape in stored.shapes.values())
    if not stored.safetensors or free is None or _BESIDE * needed <= free:
        return False
    warnings.warn(
        f"{path.name} takes {needed / 2**30:.1f} GiB in float32 and {free / 2**30:.1f} GiB are free: its weights stay "
        "in their files, in the stored dtype (--stream). --dtype float32 loads them all the same.",
        PeelwiseWarning,
        stacklevel=3,
    )
    return True


def available_memory() -> int | None:
    """Return the bytes that this process may still take, as Linux and its container say, or ``None`` if they do not."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None
    for limit, usage in _GROUPS:
        try:
            left = int(Path(limit).read_text(encoding="ascii")) - int(Path(usage).read_text(encoding="ascii"))
        except (OSError, ValueError):  # no such group, or "max": no limit
            continue
        free = min(free, left)
    return max(free, 0)
