"""What a user may choose about a peel. No torch: the command line makes its options from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from peelwise.errors import MapError, OptionError
from peelwise.records.options import (
    MARGIN_RULE,
    MICRO_BATCH_TOKENS,
    Plain,
    check_least,
    check_margin,
    option,
    parse_seconds,
)

Start = Literal["warm", "cold"]
Maps = str | Sequence[Sequence[int]]
ROUNDS: dict[Start, int] = {"warm": 3, "cold": 10}


@dataclass(frozen=True)
class PeelSettings:
    """What a user may choose about a peel.

    Attributes:
        budget: Wall time, in seconds or like 90s, 5m, 1h; what is finished by then is reported.
        maps: Station maps to visit, a station 1..L per block, like "3,3,3,4 4,4,4,4"; auto: all up to 6 blocks, named
            families and a beam search beyond. In Python also a list such as ``[[3, 3, 3, 4]]``.
        start: Where reference blocks start: warm from the block's own weights, cold from initialisation.
        weighted: Weight each coordinate of a station by its inverse variance.
        rounds: Most rounds of solves and steps per reference block. Default: 3 from a warm start, 10 from a cold one.
        steps: Also fit the parameters that have no closed form.
        dense_references: Low-bit models: let reference blocks leave the formats of their layers.
        beam_width: How many of the best maps are searched around beyond 6 blocks.
        controls: Run the null controls.
        margin: Smallest difference that matters, in nats per token. Default: the larger of 0.5 % of the loss and
            0.003 nats per token.
        micro_batch_tokens: Tokens that go through the model at a time; fewer need less memory.

    Raises:
        OptionError: If a value is not allowed.
        MapError: If ``maps`` is neither ``"auto"``, a text of maps, nor a list of lists of integers.
    """

    budget: float | str = option(
        "10m", "Wall time, in seconds or like 90s, 5m, 1h; what is finished by then is reported."
    )
    maps: Maps = option(
        "auto",
        'Station maps to visit, a station 1..L per block, like "3,3,3,4 4,4,4,4"; auto: all up to 6 blocks, named '
        "families and a beam search beyond.",
    )
    start: Start = option(
        "warm", "Where reference blocks start: warm from the block's own weights, cold from initialisation."
    )
    weighted: bool = option(True, "Weight each coordinate of a station by its inverse variance.")
    rounds: int | None = option(
        None,
        "Most rounds of solves and steps per reference block.",
        rule=f"{ROUNDS['warm']} from a warm start, {ROUNDS['cold']} from a cold one",
    )
    steps: bool = option(True, "Also fit the parameters that have no closed form.")
    dense_references: bool = option(False, "Low-bit models: let reference blocks leave the formats of their layers.")
    beam_width: int = option(4, "How many of the best maps are searched around beyond 6 blocks.")
    controls: bool = option(True, "Run the null controls.")
    margin: float | None = option(None, "Smallest difference that matters, in nats per token.", rule=MARGIN_RULE)
    micro_batch_tokens: int = option(
        MICRO_BATCH_TOKENS, "Tokens that go through the model at a time; fewer need less memory."
    )

    def __post_init__(self) -> None:
        parse_seconds(self.budget)
        parse_maps(self.maps)
        if self.start not in get_args(Start):
            raise OptionError(f'start: expected "warm" or "cold", got {self.start!r}.')
        check_least(self, 1, "rounds", "beam_width", "micro_batch_tokens")
        check_margin(self.margin)

    @property
    def budget_seconds(self) -> float:
        """Wall time in seconds."""
        return parse_seconds(self.budget)

    @property
    def station_maps(self) -> tuple[tuple[int, ...], ...] | None:
        """The maps as tuples, stations counted from 1; ``None`` for ``"auto"``."""
        return parse_maps(self.maps)

    @property
    def most_rounds(self) -> int:
        """Most rounds of solves and steps, the rule for the default applied."""
        return self.rounds or ROUNDS[self.start]

    def plain(self, formats: str) -> Plain:
        """Return the settings as plain values under the keys of the record, with the formats that references obey."""
        from peelwise.records.peel import REFERENCE_FORMATS  # pydantic, which --help does without

        maps = self.station_maps
        return {
            "budget_seconds": self.budget_seconds,
            "maps": "auto" if maps is None else str([list(stations) for stations in maps]),
            "start": self.start,
            "weighted": self.weighted,
            "rounds": self.rounds,
            "steps": self.steps,
            "dense_references": self.dense_references,
            "beam_width": self.beam_width,
            "controls": self.controls,
            "margin_nats": self.margin,
            "micro_batch_tokens": self.micro_batch_tokens,
            REFERENCE_FORMATS: None if self.dense_references else formats or None,
        }


def parse_maps(maps: Maps) -> tuple[tuple[int, ...], ...] | None:
    """Return maps as tuples, ``None`` for ``"auto"``; their stations are checked against the model later.

    Args:
        maps: ``"auto"``, a text like ``3,3,3,4 4,4,4,4``, or a list of lists of integers.

    Raises:
        MapError: If it is none of these.
    """
    if isinstance(maps, str):
        return None if maps.strip() == "auto" else _maps_of_text(maps)
    rows = list(maps)
    if not rows or not all(isinstance(row, Sequence) and not isinstance(row, str) for row in rows):
        raise MapError(f"maps: expected a list of maps such as [[3, 3, 3, 4]], got {rows!r}. Put the map in a list.")
    return tuple(tuple(row) for row in rows)


def _maps_of_text(text: str) -> tuple[tuple[int, ...], ...]:
    try:
        rows = tuple(tuple(int(station) for station in one.split(",")) for one in text.replace(";", " ").split())
    except ValueError:
        rows = ()
    if not rows:
        raise MapError(f'maps: expected "auto" or maps like "3,3,3,4 4,4,4,4", got {text!r}.')
    return rows
