"""The same architecture at initialisation, for the untrained control."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from peelwise.distributed.sharding import empty_copy, is_sharded
from peelwise.model.experts import call_experts_
from peelwise.model.layers import device_of, unwrapped
from peelwise.model.spill import Spill, keep_on_disk_, spill_of
from peelwise.nn.swap import quantize_like_


def fresh_copy(model: nn.Module, seed: int) -> nn.Module | None:
    """Return a newly initialised model of the same class and configuration, or ``None`` if it cannot be made.

    A transformers model is built from its configuration; any other is copied and each of its modules told to
    ``reset_parameters()``, which fails if one with parameters of its own cannot. Uses the global random state
    (seeded here): call it where that is restored. The weights of a streamed model's copy are on disk too.

    The copy of a model that is spread over processes is whole in each of them, on disk, and to be spread.
    """
    model = unwrapped(model)
    spread = any(is_sharded(parameter) for parameter in model.parameters())
    spill = Spill() if spread else spill_of(model)
    torch.manual_seed(seed)
    parameter = next(model.parameters())
    config: Any = getattr(model, "config", None)
    if hasattr(config, "model_type") and hasattr(type(model), "_from_config"):
        with nullcontext() if spill is None else spill.creating():
            fresh = type(model)(config)
        quantize_like_(fresh, model)
    else:
        with nullcontext() if spill is None else spill.creating():
            fresh = (empty_copy(model) if spread else copy.deepcopy(model)).cpu()  # a GPU would draw other numbers
        for module in fresh.modules():
            if list(module.parameters(recurse=False)):
                reset = getattr(module, "reset_parameters", None)
                if not callable(reset):
                    return None
                reset()
    if spread:
        call_experts_(fresh)
        return fresh.eval().requires_grad_(False)
    if spill is not None:
        _narrow_(fresh, parameter.dtype, spill)
    fresh = fresh.to(device_of(model), parameter.dtype).eval()
    call_experts_(fresh)
    return fresh.requires_grad_(False)


def _narrow_(fresh: nn.Module, dtype: torch.dtype, spill: Spill) -> None:
    """Turn parameters that are on disk into another dtype there, and note that what is kept of the model goes there."""
    for parameter in fresh.parameters():
        if parameter.is_floating_point() and parameter.dtype != dtype:
            parameter.data = spill.kept(parameter.data.to(dtype))
    keep_on_disk_(fresh, spill)
