"""What a record says of where it comes from: the model, the versions, the settings."""

from __future__ import annotations

import platform
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import nn

from peelwise.distributed.processes import Processes
from peelwise.distributed.sharding import is_sharded, original_class
from peelwise.model.checkpoints import gguf_file
from peelwise.model.fingerprint import Identity, identify
from peelwise.model.layers import Block, parameter_count, unwrapped
from peelwise.records.base import ModelRecord
from peelwise.records.options import Plain

_VERSIONED = ("peelwise", "torch", "numpy", "transformers", "safetensors")


@dataclass(frozen=True)
class Setup:
    """What was known before the audit began."""

    model: nn.Module
    blocks: tuple[Block, ...]
    name: str
    source: str | None
    identity: Identity
    settings: dict[str, bool | int | float | str | None]
    seed: int


def identified(
    model: nn.Module,
    blocks: tuple[Block, ...],
    name: str,
    source: str | None,
    settings: Plain,
    *,
    seed: int,
    processes: Processes,
) -> Setup:
    """Return a `Setup` with the model's fingerprint, for which one that is spread over processes is gathered."""
    spread = any(is_sharded(parameter) for parameter in model.parameters())
    with processes.gathering() if spread else nullcontext():
        return Setup(model, blocks, name, source, identify(model), settings, seed)


def versions() -> dict[str, str]:
    """Return the versions and the machine that the numbers were made with."""
    found = {
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
    for package in _VERSIONED:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def model_record(setup: Setup) -> ModelRecord:
    """Return what was measured: name, fingerprint, size and dtype."""
    parameter = next(setup.model.parameters())
    return ModelRecord(
        name=setup.name,
        fingerprint=setup.identity.fingerprint,
        configuration=setup.identity.configuration,
        parameters=parameter_count(setup.model),
        blocks=len(setup.blocks),
        architecture=original_class(unwrapped(setup.model)).__name__,
        dtype=str(parameter.dtype).removeprefix("torch."),
        source=setup.source,
        as_stored=gguf_file(setup.source) is not None and any(m.low_bit for b in setup.blocks for m in b.linears),
    )
