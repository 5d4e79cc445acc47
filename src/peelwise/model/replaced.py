"""Let a module compute something else for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

CALL = "_call_impl"  # what torch calls, which runs the hooks and the forward


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any], *, hooks: bool = True) -> Iterator[None]:
    """Let a module compute something else inside the context; nothing of it is changed afterwards.

    Args:
        module: whose calls are meant.
        forward: what they return, of the same arguments.
        hooks: whether hooks of the module run as ever.
    """
    name = "forward" if hooks else CALL
    own = module.__dict__.get(name)
    try:
        module.__dict__[name] = forward
        yield
    finally:
        # After an interrupt this may come late, when another is in its place.
        if module.__dict__.get(name) is forward:
            if own is None:
                del module.__dict__[name]
            else:
                module.__dict__[name] = own
