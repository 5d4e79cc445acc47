"""The same architecture at initialisation, for the untrained control."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from peelwise.model.experts import call_experts_
from peelwise.model.layers import device_of, unwrapped
from peelwise.nn.swap import quantize_like_


def fresh_copy(model: nn.Module, seed: int) -> nn.Module | None:
    """Return a newly initialised model of the same class and configuration, or ``None`` if it cannot be made.

    A transformers model is built from its configuration; any other is copied and each of its modules told to
    ``reset_parameters()``, which fails if one with parameters of its own cannot. Uses the global random state
    (seeded here): call it where that is restored.
    """
    model = unwrapped(model)
    torch.manual_seed(seed)
    parameter = next(model.parameters())
    config: Any = getattr(model, "config", None)
    if hasattr(config, "model_type") and hasattr(type(model), "_from_config"):
        fresh = type(model)(config)
        quantize_like_(fresh, model)
    else:
        fresh = copy.deepcopy(model)
        for module in fresh.modules():
            if list(module.parameters(recurse=False)):
                reset = getattr(module, "reset_parameters", None)
                if not callable(reset):
                    return None
                reset()
    fresh = fresh.to(device_of(model), parameter.dtype).eval()
    call_experts_(fresh)
    return fresh.requires_grad_(False)
