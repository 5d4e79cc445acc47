"""Models whose weights are spread over processes as they are opened: each process keeps its part of every block."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import distributed, nn

from peelwise.distributed.sharding import shard_
from peelwise.errors import DeviceError, UnsupportedModelError
from peelwise.model.architectures import find_blocks
from peelwise.model.checkpoint_files import read_config
from peelwise.model.spill import give_back_freed_memory


def check_shardable(path: Path, *, as_stored: bool) -> None:
    """Check that there are processes to spread a model over, and that its weights are numbers of their own.

    Raises:
        DeviceError: If this process is alone.
        UnsupportedModelError: If the weights are codes of a low-bit format.
    """
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        raise DeviceError(
            "--shard spreads the weights over several processes, and there is one: start "
            "torchrun --nproc-per-node N -m peelwise audit MODEL --shard."
        )
    if as_stored or (path.is_dir() and "quantization_config" in read_config(path)):
        raise UnsupportedModelError(
            f"Not yet: low-bit codes spread over processes, such as those of {path.name}. Leave out --shard, or "
            "open it dequantised."
        )


def shard_opened_(model: nn.Module, dtype: torch.dtype | str, device: torch.device) -> None:
    """Spread a model that is in memory, or in its files, over all processes, in place.

    Args:
        model: as it was opened, on the CPU.
        dtype: of its weights afterwards; ``"auto"``: as they are.
        device: where the parts are to lie.
    """
    give_back_freed_memory()  # of every block that was gathered, which are as many as there are passes
    own = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    blocks = [block.module for block in find_blocks(model)]
    shard_(model, blocks, dtype if isinstance(dtype, torch.dtype) else own, device)
