"""What follows from the numbers of a peel's record, and whether it agrees with itself. No model, no tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from peelwise.evidence.audit import instead, margin_of, wrong_intervals, wrong_settings
from peelwise.records.base import Interval
from peelwise.records.peel import MapRecord, PeelConclusion, PeelLossRecord, PeelRecord, StationRecord

_ROUNDING = 1e-5


def conclusion(
    losses: PeelLossRecord,
    maps: tuple[MapRecord, ...],
    blocks: tuple[StationRecord, ...],
    *,
    informative: bool | None,
) -> PeelConclusion:
    """Return what follows for the whole peel, and no more than that."""
    if losses.bound is None or not maps:
        return PeelConclusion(case="not-measured")
    over = losses.certified
    case: Literal["certified", "uninformative", "none-found"] = "certified"
    if over is None or over.low <= 0:
        case = "none-found"
    elif informative is False:
        case = "uninformative"
    redundant, misleading = (
        tuple(block.index for block in blocks if block.verdict == verdict) for verdict in ("redundant", "misleading")
    )
    return PeelConclusion(case=case, redundant=redundant, misleading=misleading)


def conclusion_of(record: PeelRecord) -> PeelConclusion:
    """Return the conclusion that follows from a record's numbers."""
    return conclusion(record.loss, record.maps, record.blocks, informative=record.informative)


def station_verdict(lost: Interval, margin: float) -> Literal["needed", "redundant", "misleading", "undecided"]:
    """Return what a block's station is worth as a target: ``lost`` is what leaving it out costs, nats per token."""
    if lost.high < 0:
        return "misleading"
    if lost.high < margin:
        return "redundant"
    return "needed" if lost.low > 0 else "undecided"


def informative(losses: PeelLossRecord) -> bool | None:
    """Whether the bound beats both null controls, each by an interval above zero; ``None`` if not run.

    Where a model cannot be initialised again, the shuffled control decides alone.
    """
    if losses.over_shuffled is None:
        return None
    over = [losses.over_shuffled] + ([losses.over_untrained] if losses.over_untrained else [])
    return all(interval.low > 0 for interval in over)


def contradictions(record: PeelRecord) -> Iterator[str]:
    """Yield, in words, every place where the record contradicts its own numbers."""
    yield from wrong_settings(record)
    yield from wrong_intervals(_named_intervals(record), record.probe.report_sequences)
    yield from _losses(record.loss)
    margin = margin_of(record, record.loss.current)
    if abs(record.margin_nats - margin) > 1e-9:
        yield instead("margin_nats", record.margin_nats, margin)
    best = record.maps[0] if record.maps else None
    if record.best_map != (best.stations if best else None):
        yield instead("best_map", record.best_map, best.stations if best else None)
    if best is not None and len(best.stations) != record.model.blocks:
        yield f"maps: they have stations for {len(best.stations)} blocks, the model has {record.model.blocks}."
    if best is not None and record.loss.bound != (best.loss or best.own_head).report:
        yield instead("loss.bound", record.loss.bound, (best.loss or best.own_head).report)
    for block in record.blocks:
        follows = station_verdict(block.lost_nats, record.margin_nats) if block.lost_nats else "not measured"
        if block.verdict != follows:
            yield instead(f"{block.name} verdict", block.verdict, follows)
    if record.informative != informative(record.loss):
        yield instead("informative", record.informative, informative(record.loss))
    # A record of old holds a sentence there, which follows from nothing and is not shown either.
    if isinstance(record.conclusion, PeelConclusion) and record.conclusion != conclusion_of(record):
        yield instead("conclusion", record.conclusion, conclusion_of(record))


def _losses(loss: PeelLossRecord) -> Iterator[str]:
    """A gain is the difference of the two losses that it stands between."""
    rows = (
        ("head_control_gain", loss.current, loss.head_control, loss.head_control_gain),
        ("bound_gain", loss.current, loss.bound, loss.bound_gain),
        ("over_head_control", loss.head_control, loss.bound, loss.over_head_control),
        ("over_shuffled", loss.shuffled, loss.bound, loss.over_shuffled),
        ("over_untrained", loss.untrained, loss.bound, loss.over_untrained),
    )
    for name, before, after, gain in rows:
        if before is None or after is None:
            if gain is not None:
                yield f"loss.{name}: it stands without the losses that it is the difference of."
        elif gain is None or abs(before - after - gain.mean) > _ROUNDING:
            yield instead(f"loss.{name}.mean", gain.mean if gain else None, before - after)


def _named_intervals(record: PeelRecord) -> Iterator[tuple[str, Interval]]:
    found: dict[str, Interval | None] = {
        f"loss.{name}": value for name, value in record.loss if isinstance(value, Interval)
    }
    for one in record.maps:
        found[f"map {one.stations} over the model"] = one.gain_over_model
        found[f"map {one.stations} over the head control"] = one.gain_over_head
    for block in record.blocks:
        found[f"{block.name} lost"] = block.lost_nats
    yield from ((name, interval) for name, interval in found.items() if interval is not None)
