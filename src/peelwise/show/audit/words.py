"""What an audit found, in sentences: made from its numbers and codes, never read from the record."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from peelwise.evidence.audit import best_baseline, conclusion_of, verdicts_of
from peelwise.evidence.intervals import Paired
from peelwise.evidence.reds import are_most
from peelwise.evidence.verdict import idle, own_gains_decide
from peelwise.records.audit import AuditConclusion, AuditRecord, BlockRecord
from peelwise.records.base import Interval
from peelwise.records.codes import INTERACTS
from peelwise.show.words import (
    BASELINES,
    SHARED,
    UNDAMAGED,
    VERDICTS,
    behind,
    is_bounded,
    is_of_batches,
    reason_words,
    this_data,
)

_MOST_LISTED, _MOST_HARMFUL = 6, 3
GAINS = {
    "solo": "solo gain",
    "marginal": "marginal gain (leave-one-out)",
    "marginal-of-tied": "marginal gain (leave-one-out) of those with the largest solo gain",
}


def conclusion(record: AuditRecord) -> str:
    """Return a few sentences that say what was found, and no more than that."""
    # A record of old holds a sentence in its place, which nobody checked.
    found = record.conclusion if isinstance(record.conclusion, AuditConclusion) else conclusion_of(record)
    parts = (
        _first(record, found),
        _together(record),
        _most_red(record, found),
        _look_first(record, found),
        _harm(record, found),
        _idle(record),
        _above(record, found),
        _green(record, found),
        _below(record, found),
        _frozen(record),
    )
    return " ".join(filter(None, parts))


def reasons(record: AuditRecord) -> tuple[str, ...]:
    """Return for every block why it has its colour; for a record without codes, from its numbers."""
    follows = verdicts_of(record) if any(block.reason_code is None for block in record.blocks) else []
    found = []
    for place, block in enumerate(record.blocks):
        code = block.reason_code
        if code is None and follows[place].colour == block.verdict:
            code = follows[place].reason
        words = VERDICTS[block.verdict].words
        found.append(reason_words(code + (INTERACTS if block.interaction else "")) if code else words)
    return tuple(said.replace("probe tokens", "examples") for said in found) if is_of_batches(record) else tuple(found)


def _first(record: AuditRecord, found: AuditConclusion) -> str:
    blocks, count = len(record.blocks), len(found.blocks)
    if found.case == "certified":
        named = f"block{'' if count == 1 else 's'} {listed(found.blocks)}"
        return f"{count} of {blocks} blocks certified under-optimised ({named})."
    if found.case == "recoverable":
        return (
            f"No block is certified under-optimised; {count} of {blocks} have recoverable loss on {this_data(record)}."
        )
    if found.case == "none-found" and own_gains_decide(record.probe.in_distribution, record.rule):
        return (
            f"None found: of {count} blocks measured (of {blocks}), none is shown to have more than "
            f"{record.margin_nats:.3f}{behind(record)} to gain of its own."
        )
    if found.case == "none-found":
        bounded = sum(map(is_bounded, record.blocks))
        alone = (
            "1 block refined by itself" if count - bounded == 1 else f"{count - bounded} blocks refined by themselves"
        )
        more = f" and {bounded} bounded by the slope of the loss" if bounded else ""
        return (
            f"None found: of {alone}{more} (of {blocks}), none is shown to have a solo gain above "
            f"{record.margin_nats:.3f}{behind(record)}."
        )
    return "No verdict yet: no block was refined by itself within the budget."


def _together(record: AuditRecord) -> str:
    composed = record.loss.composed_gain
    if composed is None:
        return ""
    interval, unit = f"(95 % interval {composed.low:.3f} to {composed.high:.3f})", behind(record)
    if composed.high < 0:
        interval = f"(95 % interval {-composed.high:.3f} to {-composed.low:.3f})"
        return f"Refined together, the blocks raise the loss by {-composed.mean:.3f}{unit} {interval}."
    largest = of_its_own(record)
    if largest is None and composed.low <= 0:
        said = f"{composed.mean:+.3f}{unit} {interval}"
        return f"Refined together, the blocks are not shown to lower the loss: gain {said}."
    if largest is None:
        return f"Refined together, the blocks lower the loss by {composed.mean:.3f}{unit} {interval}."
    block, own = largest
    return (
        f"All blocks together could adapt to {this_data(record)} by {composed.mean:.3f}{unit} {interval}; of its own, "
        f"block {block} has most to gain: {own.mean:.3f}."
    )


def of_its_own(record: AuditRecord) -> tuple[int, Interval] | None:
    """Return the block with the largest marginal gain, and that gain, on text where marginal gains decide."""
    found = [(block.index, block.unique_nats) for block in record.blocks if block.unique_nats is not None]
    if not found or not own_gains_decide(record.probe.in_distribution, record.rule):
        return None
    return max(found, key=lambda pair: pair[1].mean)


def two_gains(record: AuditRecord) -> str:
    """Return what all blocks could gain together and the most that one gains of its own, to stand beside a strip."""
    together, largest = record.loss.composed_gain, of_its_own(record)
    if together is None or largest is None or together.mean <= 0:
        return ""
    block, own = largest
    return f"could adapt together {together.mean:+.3f}, of its own at most {own.mean:+.3f} (block {block})"


def _most_red(record: AuditRecord, found: AuditConclusion) -> str:
    """Linear layers make up for whatever is wrong with all blocks, so each of them gains."""
    if found.above is not None or not _are_most_red(record):
        return ""
    return f"Most blocks are red, so first rule out what they share: {SHARED}."


def _are_most_red(record: AuditRecord) -> bool:
    asked = [block for block in record.blocks if not block.frozen]
    return are_most(sum(block.verdict == "red" for block in asked), len(asked))


def _look_first(record: AuditRecord, found: AuditConclusion) -> str:
    first = found.look_first
    if first is None:
        return ""
    block = _block(record, first.block)
    value = None if block is None else block.recoverable_nats if first.by == "solo" else block.unique_nats
    size = "" if value is None else f": {value.mean:.3f}{behind(record)}"
    begin = "Of single blocks, look first" if _are_most_red(record) else "Look first"
    said = f"{begin} at block {first.block}, which has the largest {GAINS[first.by]}{size}."
    if first.tied:
        one = len(first.tied) == 1
        said += f" Block{'' if one else 's'} {listed(first.tied)} {'is' if one else 'are'} not distinguishable from it."
    return said


def _harm(record: AuditRecord, found: AuditConclusion) -> str:
    named = []
    for index in found.harmful[:_MOST_HARMFUL]:
        block = _block(record, index)
        if block is not None and block.removal_nats is not None:
            named.append(f"{index} ({-block.removal_nats.mean:.3f}{behind(record)})")
    return f"The model is better without block {', without block '.join(named)}." if named else ""


def _idle(record: AuditRecord) -> str:
    measured = [(block.index, block.removal_nats) for block in record.blocks if block.removal_nats is not None]
    removals = [Paired.of(interval) for _, interval in measured]
    named = [
        f"block {index} ({interval.mean:+.3f}, 95 % interval {interval.low:.3f} to {interval.high:.3f})"
        for index, interval in (measured[place] for place in idle(removals, record.margin_nats))
    ]
    if not named:
        return ""
    usual = float(median(interval.mean for _, interval in measured))
    said = f"{', '.join(named)} {'does' if len(named) == 1 else 'do'} no work"
    return (
        f"{said[0].upper()}{said[1:]}: the loss without it is the same within the margin, where leaving out the "
        f"median block costs {usual:.3f}{behind(record)}."
    )


def _above(record: AuditRecord, found: AuditConclusion) -> str:
    best = best_baseline(record.loss)
    if found.above is None or best is None:
        return ""
    who, cost = BASELINES[best[0]], best[1]
    return (
        f"The loss of {record.loss.current:.3f} is above what this text costs {who}, {cost:.3f}: look "
        "first outside of the linear layers (tokenizer, positions, norms, order of the blocks), or the text is not "
        "what the model is for."
    )


def _green(record: AuditRecord, found: AuditConclusion) -> str:
    if not _nothing_found(record, found):
        return ""
    green = any(block.verdict == "green" for block in record.blocks)
    return f"{'Green' if green else 'None found'} {UNDAMAGED}"


def _below(record: AuditRecord, found: AuditConclusion) -> str:
    """Of a model above the baselines something else is said."""
    best = best_baseline(record.loss)
    if found.above is not None or best is None:
        return ""
    between = "; a damaged one may lie between" if _nothing_found(record, found) else ""
    return (
        f"This text costs {BASELINES[best[0]]} {best[1]:.3f} nats per token and this model "
        f"{record.loss.current:.3f}{between}."
    )


def _nothing_found(record: AuditRecord, found: AuditConclusion) -> bool:
    return found.case == "none-found" or any(block.verdict == "green" for block in record.blocks)


def _frozen(record: AuditRecord) -> str:
    frozen = tuple(block.index for block in record.blocks if block.frozen)
    if not frozen:
        return ""
    one = len(frozen) == 1
    what = f"Block {frozen[0]} is" if one else f"{len(frozen)} blocks ({listed(frozen)}) are"
    return f"{what} frozen and {'was' if one else 'were'} not asked about."


def _block(record: AuditRecord, index: int) -> BlockRecord | None:
    return next((block for block in record.blocks if block.index == index), None)


def listed(blocks: Sequence[int]) -> str:
    """Return indices of blocks with commas between them; of many the first few."""
    return ", ".join(map(str, blocks[:_MOST_LISTED])) + (", ..." if len(blocks) > _MOST_LISTED else "")
