"""The weights that a linear layer computes with, and the codes that it stores: one small adapter per kind of module.

A module says so itself by a method ``effective_weight()`` that returns ``[d_out, d_in]`` and an attribute ``format``
(a `Format` or its name); ``encoded()`` may hand out its codes, otherwise they are read from the values. Other people's
modules are known by their class, so that nothing is imported which the model does not use already.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from peelwise.errors import UnsupportedModelError
from peelwise.formats.base import Encoded
from peelwise.model.weights import bitnet, bitsandbytes, float8, protocol, refused, torch_ao, torchao
from peelwise.model.weights.held import Adapter, Held

# The first that matches reads; a new kind of module is a file with such rows of its own.
ADAPTERS: tuple[Adapter, ...] = (
    *protocol.ADAPTERS,
    *bitnet.ADAPTERS,
    *torchao.ADAPTERS,
    *torch_ao.ADAPTERS,
    *bitsandbytes.ADAPTERS,
    *float8.ADAPTERS,
    *refused.ADAPTERS,
)


def held(module: nn.Module) -> Held | None:
    """Return what a module holds inside a format, or ``None`` if its weights are plain floating-point numbers.

    Raises:
        FormatError: If the module does not store what its format says.
        UnsupportedModelError: If its codes cannot be read; by name, with what to do.
    """
    for adapter in ADAPTERS:
        if adapter.matches(module):
            with torch.no_grad():
                return adapter.read(module)
    return None


@torch.no_grad()
def hold_(module: nn.Module, encoded: Encoded) -> None:
    """Let a low-bit module compute with other codes, scales and zero points of its format, in place.

    Args:
        module: one that `held` knows.
        encoded: what it shall hold, on any device.

    Raises:
        FormatError: If the module's own ``hold_`` says so.
        UnsupportedModelError: If modules of its kind cannot be given codes.
    """
    write = getattr(module, "hold_", None)
    if not callable(write):
        own = next((adapter.write for adapter in ADAPTERS if adapter.matches(module)), None)
        write = None if own is None else partial(own, module)
    if write is None:
        raise UnsupportedModelError(f"{type(module).__name__} cannot be given other codes.")
    write(encoded)


def unread(module: nn.Module) -> str | None:
    """Return why a module's packed weights cannot be read, and what to do; ``None`` if they can, or are not packed."""
    known = any(adapter.matches(module) for adapter in ADAPTERS if adapter not in refused.ADAPTERS)
    return None if known else refused.refusal(module)


def is_low_bit(module: nn.Module) -> bool:
    """Whether `held` knows the module."""
    return any(adapter.matches(module) for adapter in ADAPTERS)


def effective_weight(module: nn.Module) -> Tensor | None:
    """Return the weight ``[d_out, d_in]`` that a low-bit module computes with, ``None`` for any other module."""
    found = held(module)
    return None if found is None else found.weight
