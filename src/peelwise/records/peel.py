"""Frozen records of plain numbers of a peel: what its maps reached, as it stands in ``certificate.json``.

Losses are in nats per token on ``report`` unless a name says otherwise; a gain is positive where the loss falls.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from peelwise.records.base import Interval, Record, SealedRecord

REFERENCE_FORMATS = "reference_formats"  # among the settings: a field of its own would change the seal of older records


class PartLosses(Record):
    """One loss on each part of the probe, nats per token."""

    fit: float
    select: float
    report: float


class MapRecord(Record):
    """What the reference stack of one map reached.

    Attributes:
        stations: station per block, counted from 1.
        name: what the map is called.
        own_head: losses with the model's own head on the stack.
        loss: losses with a head fitted on the stack; ``None`` where that was not done within the budget.
        gain_over_model: model's loss minus ``loss`` (``own_head`` without a fitted head), paired by sequence.
        gain_over_head: the same against the model with its head re-fitted; needs a fitted head.
        unexplained: per block, share of its station's variance that the reference leaves, on select.
        blocks_fitted: references fitted for this map; the others were shared with earlier maps.
        wall_seconds, forward_equivalents: what visiting the map cost.
    """

    stations: tuple[int, ...]
    name: str
    own_head: PartLosses
    loss: PartLosses | None = None
    gain_over_model: Interval
    gain_over_head: Interval | None = None
    unexplained: tuple[float, ...]
    blocks_fitted: int
    wall_seconds: float
    forward_equivalents: float


class StationRecord(Record):
    """What is lost when a block's station is no longer a target.

    ``lost_nats`` is loss of the best map without it minus loss of the best map with it, both chosen on select:
    near zero marks the block as redundant for this data, negative says that its station misleads.
    """

    index: int  # block, counted from 0 as in an audit
    station: int  # counted from 1 as in a map
    name: str
    lost_nats: Interval | None = None
    with_map: tuple[int, ...] | None = None
    without_map: tuple[int, ...] | None = None
    verdict: Literal["needed", "redundant", "misleading", "undecided", "not measured"] = "not measured"


class PeelLossRecord(Record):
    """Losses on report. ``bound`` is the best map's, chosen on select; ``None`` = not run within the budget.

    ``head_control`` is the model with its head re-fitted on the same tokens, ``shuffled`` the best map with
    targets permuted across sequences, ``untrained`` the best map from the stations of the architecture at
    initialisation. Each ``over_..`` is that loss minus the bound, paired by sequence.
    """

    current: float
    head_control: float | None = None
    bound: float | None = None
    shuffled: float | None = None
    untrained: float | None = None
    head_control_gain: Interval | None = None
    bound_gain: Interval | None = None
    over_head_control: Interval | None = None
    over_shuffled: Interval | None = None
    over_untrained: Interval | None = None

    @property
    def certified(self) -> Interval | None:
        """What a claim stands on: the gain over the model or over its head control, whichever is less.

        A head fitted on few tokens can leave the model worse than it was; beating that proves nothing.
        """
        gains = [gain for gain in (self.bound_gain, self.over_head_control) if gain is not None]
        return min(gains, key=lambda gain: gain.low, default=None)


class PeelConclusion(Record):
    """What follows from the numbers of a peel: whether the best map beats what it has to, and which blocks stand out.

    A bound that beats the model, but not the null controls, is ``uninformative``.
    """

    case: Literal["certified", "uninformative", "none-found", "not-measured"]
    redundant: tuple[int, ...] = ()
    misleading: tuple[int, ...] = ()


class PeelRecord(SealedRecord):
    """Everything one peel found; it is informative if the bound beats both null controls."""

    kind: Literal["peel"] = "peel"
    conclusion: PeelConclusion | str | None = None
    start: Literal["warm", "cold"]
    loss: PeelLossRecord
    best_map: tuple[int, ...] | None = None
    maps: tuple[MapRecord, ...]
    maps_total: int
    blocks: tuple[StationRecord, ...]

    @model_validator(mode="after")
    def _one_station_per_block(self) -> Self:
        count = len(self.maps[0].stations) if self.maps else 0
        for place, one in enumerate(self.maps):
            if not len(one.stations) == len(one.unexplained) == count or not all(1 <= s <= count for s in one.stations):
                raise ValueError(f"map {place} has not one of {count} stations, and one error, for each block")
        return self

    @property
    def reference_formats(self) -> str | None:
        """The formats of low-bit layers that references obey; ``None`` if there are none or references are dense."""
        found = self.settings.get(REFERENCE_FORMATS)
        return str(found) if found else None
