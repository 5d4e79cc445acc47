"""What the functions of the library take: a model or where to open it, and times like ``5m``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from peelwise.errors import PeelwiseError
from peelwise.model.checkpoints import open_model

if TYPE_CHECKING:
    from torch import nn


_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


def parse_seconds(budget: float | str) -> float:
    """Return seconds from a number or a text like ``90``, ``90s``, ``5m`` or ``1.5h``.

    Raises:
        PeelwiseError: If it is neither, or not positive.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smh]?)\s*", str(budget))
    seconds = float(match[1]) * _UNITS[match[2]] if match else 0.0
    if seconds <= 0:
        raise PeelwiseError(f"A budget is a positive time like 90s, 5m or 1h; got {budget!r}.")
    return seconds


def open_target(model: nn.Module | str | Path, device: str, dtype: str) -> tuple[nn.Module, str, str | None]:
    """Return the module to measure, what to call it, and where it was opened from (``None`` for a module)."""
    import torch

    if isinstance(model, torch.nn.Module):
        return model, type(model).__name__, None
    opened = open_model(model, device=device, dtype=dtype, with_tokenizer=False)
    return opened.model, opened.name, opened.source
