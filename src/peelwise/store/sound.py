"""Whether rows are of the types that their columns have: SQLite itself stores anything anywhere."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from peelwise.errors import StoreError

_NUMBER, _NOTHING = frozenset({int, float}), frozenset({type(None)})
_KINDS: dict[frozenset[type], str] = {
    frozenset({int}): "id run_id step probe_id last_id first last rows stride of_blocks of_model has_interval pid "
    "parameters in_distribution",
    frozenset({int}) | _NOTHING: "block since_step measured_step still_falling",
    _NUMBER: "time share probe_loss seconds value",
    _NUMBER | _NOTHING: "loss slope slope_low slope_high low high to_median to_trend budget mean",
    frozenset({str}): "name started status host architecture probe settings versions kind letters matrix colour reason "
    "level text suggestion",
    frozenset({str}) | _NOTHING: "ended",
    frozenset({bytes}): "numbers",
}
_TYPES = {column: types for types, columns in _KINDS.items() for column in columns.split()}
_ANY = _NUMBER | _NOTHING | {str}


def checked(rows: list[sqlite3.Row], path: Path) -> list[sqlite3.Row]:
    """Return rows that hold what their columns should.

    Raises:
        StoreError: If one does not.
    """
    if rows:
        _check({tuple(map(type, row)) for row in rows}, rows[0].keys(), path)
    return rows


def one_by_one(rows: Iterable[sqlite3.Row], path: Path) -> Iterator[sqlite3.Row]:
    """Yield rows that hold what their columns should."""
    known: set[tuple[type, ...]] = set()
    for row in rows:
        types = tuple(map(type, row))
        if types not in known:
            _check([types], row.keys(), path)
            known.add(types)
        yield row


def _check(found: Iterable[tuple[type, ...]], columns: Sequence[str], path: Path) -> None:
    for types in found:
        for column, each in zip(columns, types, strict=True):
            if each not in _TYPES.get(column, _ANY):
                words = {bytes: "bytes", type(None): "nothing", str: "text"}.get(each, "a number")
                raise StoreError(f"{path} is damaged: a {column} in it is {words}.")
