"""Let a module compute something else for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module compute something else inside the context; nothing of it is changed afterwards."""
    own = module.__dict__.get("forward")
    try:
        module.__dict__["forward"] = forward
        yield
    finally:
        # After an interrupt this may come late, when another is in its place.
        if module.__dict__.get("forward") is forward:
            if own is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = own
