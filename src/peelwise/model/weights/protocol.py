"""Modules that say themselves what they hold: a method ``held()``, as the layers of `peelwise.nn` have."""

from __future__ import annotations

from typing import Any

from torch import nn

from peelwise.formats.recover import check_decodes, recover
from peelwise.formats.table import parse_format
from peelwise.model.weights.held import Adapter, Held


def _read_protocol(module: Any) -> Held:
    form = parse_format(module.format) if isinstance(module.format, str) else module.format
    weight = module.effective_weight().detach()
    encoded = module.encoded() if callable(getattr(module, "encoded", None)) else recover(weight, form)
    check_decodes(encoded, weight.float(), form)
    kept = getattr(module, "weight", None)
    if isinstance(kept, nn.Parameter):
        latent = getattr(module, "latent", kept)
        if latent.shape == weight.shape:
            return Held(form, encoded, latent.detach())
    return Held(form, encoded)


def _follows_protocol(module: nn.Module) -> bool:
    return callable(getattr(module, "effective_weight", None)) and hasattr(module, "format")


ADAPTERS = (Adapter("protocol", _follows_protocol, _read_protocol),)
