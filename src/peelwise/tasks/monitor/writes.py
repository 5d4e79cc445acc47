"""How often parameters were written, as far as can be told without looking at their numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from peelwise.distributed.sharding import local_shard

Writes = tuple[int, float]  # version counter, steps that the optimiser counted; they only ever grow


def writes(parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer | None) -> list[Writes]:
    """Return per parameter a mark that is another one after every step that wrote it.

    In-place operations move a tensor's version counter, but those of fused optimisers do not, nor does writing into
    ``.data``; optimisers that do so count their steps in ``state[parameter]["step"]``. The counts are read all at once,
    since each may lie on a device.

    Args:
        parameters: any.
        optimizer: what steps them, or ``None`` if that is not known.
    """
    steps = [_steps(optimizer, parameter) for parameter in parameters]
    on_device = [step.detach().reshape(()).float() for step in steps if isinstance(step, Tensor)]
    values = iter(torch.stack([step.to(on_device[0].device) for step in on_device]).tolist() if on_device else [])
    counts = [next(values) if isinstance(step, Tensor) else step for step in steps]
    return [(parameter._version, count) for parameter, count in zip(parameters, counts, strict=True)]


def _steps(optimizer: torch.optim.Optimizer | None, parameter: Tensor) -> Tensor | float:
    state = getattr(optimizer, "state", None)
    own = state.get(parameter) if isinstance(state, Mapping) else None
    step = own.get("step") if isinstance(own, Mapping) else None
    if isinstance(step, Tensor):
        step = local_shard(step)
        return step if step.numel() == 1 else 0.0
    return float(step) if isinstance(step, (int, float)) else 0.0
