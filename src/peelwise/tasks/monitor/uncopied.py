"""Hooks that stay with the model they were set on."""

from __future__ import annotations

from typing import Any


class Uncopied:
    """A hook that copies of a module or a parameter, in memory or on disk, do without: there it does nothing."""

    def __reduce__(self) -> Any:
        return _nothing, ()


def _nothing() -> Any:
    return _ignore


def _ignore(*_: Any, **__: Any) -> None:
    return None
