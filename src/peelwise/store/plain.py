"""Values as a history may hold them: whole numbers, floats, text and nothing. SQLite would store others as bytes."""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Iterable, Mapping
from typing import Any

from peelwise.errors import StoreError

_MOST = 2**63  # SQLite's whole numbers have 64 bits


def plain(value: Any) -> int | float | str | bytes | None:
    """Return a value as SQLite stores it: numbers of NumPy and torch become Python's, text becomes valid UTF-8.

    Raises:
        StoreError: If it is no number, text or ``None``, or a whole number beyond 64 bits.
    """
    if value is None or type(value) in (float, bytes):
        return value  # type: ignore[no-any-return]
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    for convert in (operator.index, float):
        try:
            number = convert(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):  # a tensor of many numbers
            continue
        if isinstance(number, int) and not -_MOST <= number < _MOST:
            raise StoreError(f"{number} cannot be recorded: whole numbers must lie within 64 bits.")
        return number
    raise StoreError(f"A {type(value).__name__} cannot be recorded: a number or a text is expected.")


def whole(value: Any, what: str = "step") -> int:
    """Return a whole number.

    Raises:
        StoreError: If it is none.
    """
    number = plain(value)
    if isinstance(number, float) and number.is_integer():
        number = plain(int(number))
    if not isinstance(number, int):
        raise StoreError(f"A {what} must be a whole number to be recorded, got {value!r}.")
    return number


def number(value: Any) -> float | int | None:
    """Return a number, ``None`` where it is NaN, as SQLite itself has it."""
    found = plain(value)
    if isinstance(found, (str, bytes)):
        raise StoreError(f"A number is expected to be recorded, got {value!r}.")
    return None if isinstance(found, float) and math.isnan(found) else found


def row(values: Iterable[Any]) -> tuple[Any, ...]:
    """Return a row of plain values."""
    return tuple(plain(value) for value in values)


def as_json(facts: Mapping[str, Any]) -> str:
    """Return facts as JSON; what JSON has no word for is written as text."""
    return json.dumps(dict(facts), default=_worded)


def _worded(value: Any) -> Any:
    try:
        return plain(value)
    except StoreError:
        return str(value)
