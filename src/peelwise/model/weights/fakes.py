"""Fake quantisers of quantisation-aware training: which are on, and which are off so that they do nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peelwise.model.layers import plain_name, unwrapped
from peelwise.records.base import Note, note


@dataclass(frozen=True)
class FakeQuantisers:
    """Names of a model's fake quantisers that are on and off."""

    on: tuple[str, ...] = ()
    off: tuple[str, ...] = ()


def fake_quantisers(model: nn.Module) -> FakeQuantisers:
    """Return those of torchao and torch.ao in a model, in its order."""
    states = list(_states(unwrapped(model)))
    return FakeQuantisers(
        tuple(name for name, on in states if on),
        tuple(name for name, on in states if not on),
    )


@contextmanager
def observers_paused(model: nn.Module) -> Iterator[None]:
    """Let fake quantisers of torch.ao keep their scales while a model is measured; in eval mode they follow it too."""
    owners = [m for m in unwrapped(model).modules() if {"observer_enabled", "fake_quant_enabled"} <= m._buffers.keys()]
    before = [owner._buffers["observer_enabled"] for owner in owners]
    try:
        for owner, switch in zip(owners, before, strict=True):
            owner._buffers["observer_enabled"] = None if switch is None else torch.zeros_like(switch)
        yield
    finally:
        for owner, switch in zip(owners, before, strict=True):
            owner._buffers["observer_enabled"] = switch


def fake_notes(model: nn.Module) -> Iterator[Note]:
    """Yield a note where fake quantisers are off: what is measured there is not what conversion will make of it."""
    found = fake_quantisers(model)
    if found.off:
        yield note("fake-quant-off", off=len(found.off), of=len(found.off) + len(found.on), name=found.off[0])


def _states(model: nn.Module) -> Iterator[tuple[str, bool]]:
    for name, module in model.named_modules():
        kind: Any = type(module)
        if not kind.__name__.endswith(("FakeQuantizer", "FakeQuantize", "FakeQuantizerBase")):
            continue
        enabled = getattr(module, "enabled", getattr(module, "fake_quant_enabled", None))
        if enabled is not None:
            yield plain_name(name), bool(enabled.any()) if isinstance(enabled, Tensor) else bool(enabled)
