"""What the record of a comparison claims: where it contradicts itself, and where it differs from one made again."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from peelwise.certificate.base import Check
from peelwise.evidence.audit import wrong_settings
from peelwise.evidence.compare import conclusion
from peelwise.evidence.intervals import Paired
from peelwise.evidence.verdict import default_margin
from peelwise.records.base import Interval, unit_of
from peelwise.records.compare import BlockChange, CompareRecord, EndChange
from peelwise.records.options import is_margin
from peelwise.tasks.compare.measures import Part

_ROUNDING = 1e-6  # nats per token: sums of recorded numbers against recorded numbers
_OFF = 0.01  # relative: what a distance may be off on another machine
_LEAST = 1e-4  # of a distance: below it there is nothing but rounding
_INTERVALS = ("repairs_nats", "breaks_nats", "path_from_first_nats", "path_from_last_nats")
_CODES = ("kind_of_change", "same_weights", "same_code")
_DISTANCES = ("relative_distance", "output_distance")
SomePart = BlockChange | EndChange


def said_of(record: CompareRecord, parts: Sequence[Part]) -> list[tuple[Part, SomePart]]:
    """Return the parts of two models with what the record says of each; parts that it does not name are left out."""
    ends = {end.unit: end for end in record.ends}
    blocks = {block.index: block for block in record.blocks}
    found = [(part, ends.get(part.unit) if part.block is None else blocks.get(part.block)) for part in parts]
    return [(part, said) for part, said in found if said is not None]


def parts_of_record(record: CompareRecord) -> list[SomePart]:
    """Return all parts: blocks, then ends."""
    return [*record.blocks, *record.ends]


def name_of(part: SomePart) -> str:
    """Return what a part is called in a verification."""
    return part.name if isinstance(part, BlockChange) else part.unit


def contradictions(record: CompareRecord) -> Iterator[str]:
    """Yield, in words, where a record of a comparison contradicts itself."""
    yield from wrong_settings(record)
    loss, parts = record.loss, parts_of_record(record)
    asked = record.settings.get("margin")
    due = default_margin(min(loss.old, loss.new), unit_of(record)) if asked is None else asked
    if not is_margin(record.margin_nats) or not math.isclose(float(due), record.margin_nats, rel_tol=1e-9):
        yield f"The margin is {record.margin_nats:g}, by the settings and losses it is {float(due):g}."
    if [block.index for block in record.blocks] != list(range(len(record.blocks))):
        yield "The blocks are not numbered from the first to the last."
    elif record.conclusion != conclusion(loss, record.blocks, record.ends, record.margin_nats):
        yield "The conclusion does not follow from the numbers."
    if abs(loss.new - loss.old - loss.damage.mean) > _ROUNDING:
        yield f"NEW - OLD is {loss.new - loss.old:.6f} by the losses, {loss.damage.mean:.6f} is recorded."
    for interval in _intervals(record):
        if not interval.low <= interval.mean <= interval.high:
            yield f"An interval from {interval.low:g} to {interval.high:g} has the mean {interval.mean:g}."
        elif interval.sequences != record.probe.report_sequences or not _follows(interval):
            yield f"The interval around {interval.mean:g} does not follow from its standard error and skewness."
    for part in parts:
        same = part.kind_of_change == "unchanged"
        if same and any(each and (each.low, each.high) != (0, 0) for each in _effects_of(part)):
            yield f"{name_of(part)} is said to be the same in both models, and to have an effect."
        if same != (part.same_weights and part.same_code is not False):
            yield f"{name_of(part)}: its kind of change does not fit what is said of its weights and code."
    yield from _wrong_sums(record, parts)


def _follows(interval: Interval) -> bool:
    due = Paired.of(interval).interval()
    return max(abs(due.low - interval.low), abs(due.high - interval.high)) <= _ROUNDING


def _wrong_sums(record: CompareRecord, parts: Sequence[SomePart]) -> Iterator[str]:
    loss = record.loss
    repairs = [part.repairs_nats for part in parts]
    known = [each.mean for each in repairs if each is not None]
    interaction = loss.damage.mean - sum(known) if len(known) == len(repairs) else None
    if (interaction is None) != (loss.interaction is None) or abs((interaction or 0) - (loss.interaction or 0)) > 1e-6:
        yield "The interaction is not the damage minus all repairs."
    for way in ("path_from_first_nats", "path_from_last_nats"):
        steps = [getattr(part, way) for part in parts]
        if all(step is not None for step in steps):
            total = sum(step.mean for step in steps)
            if abs(total - loss.damage.mean) > _ROUNDING:
                yield f"The steps of a way add up to {total:.6f}, the damage is {loss.damage.mean:.6f}."
    for part in parts:
        steps = [part.path_from_first_nats, part.path_from_last_nats]
        if None in (*steps, part.repairs_nats):
            continue
        due = sum(step.mean for step in steps if step) / 2 - (part.repairs_nats.mean if part.repairs_nats else 0.0)
        if part.interaction_nats is None or abs(due - part.interaction_nats) > _ROUNDING:
            yield f"{name_of(part)}: its interaction is not its mean step minus what it repairs."


def _effects_of(part: SomePart) -> list[Interval | None]:
    return [getattr(part, key) for key in _INTERVALS]


def _intervals(record: CompareRecord) -> Iterator[Interval]:
    yield record.loss.damage
    if record.mended is not None:
        yield record.mended.gain
    for part in parts_of_record(record):
        yield from (each for each in _effects_of(part) if each is not None)
        yield from (tensor.repairs_nats for tensor in part.tensors if tensor.repairs_nats is not None)


def all_numbers(record: CompareRecord, again: CompareRecord, tolerance: float) -> Iterator[Check]:
    """Yield every effect and distance of a record beside that of the comparison made again."""
    for one, two in zip(parts_of_record(record), parts_of_record(again), strict=True):
        for key in _INTERVALS:
            before, after = getattr(one, key), getattr(two, key)
            for end in ("mean", "low", "high") if before is not None and after is not None else ():
                recorded, found = getattr(before, end), getattr(after, end)
                name = f"{name_of(one)} {key.removesuffix('_nats')}.{end}"
                yield Check(name, recorded, found, abs(recorded - found) <= tolerance)
        for key in _DISTANCES:
            recorded, found = getattr(one, key), getattr(two, key)
            holds = math.isclose(recorded, found, rel_tol=_OFF, abs_tol=_LEAST)
            yield Check(f"{name_of(one)} {key}", recorded, found, holds)


def other_codes(record: CompareRecord, again: CompareRecord) -> Iterator[str]:
    """Yield, in words, what a record says of the kind of a change that the comparison made again does not say."""
    for one, two in zip(parts_of_record(record), parts_of_record(again), strict=True):
        for key in _CODES:
            if getattr(one, key) != getattr(two, key):
                yield f"{name_of(one)}: {key} {getattr(one, key)} was certified, {getattr(two, key)} was found."
        kinds = [[(t.name, t.kind_of_change) for t in each.tensors] for each in (one, two)]
        differing = next((pair for pair in zip(*kinds, strict=False) if pair[0] != pair[1]), None)
        if differing or len(kinds[0]) != len(kinds[1]):
            yield f"{name_of(one)}: its tensors changed in another way than was certified."
    first, found = record.first_difference, again.first_difference
    if (first and (first.unit, first.block, first.cause)) != (found and (found.unit, found.block, found.cause)):
        yield "The first part that computes something else is not the one that was certified."


def first_wrong(checks: Sequence[Check]) -> str | None:
    """Say which number was not found again, or ``None``."""
    failed = next((check for check in checks if not check.holds), None)
    if failed is None:
        return None
    return f"{failed.name}: {failed.recorded:.6f} was certified, {failed.found:.6f} was found."
