"""What follows from the numbers of a record, and whether a record agrees with itself. No model, no tensors.

Verdicts, the conclusion and whether the bound is informative are functions of the recorded numbers. They are
computed here once, so whoever checks a certificate can compute them again without running anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Literal, get_args

from peelwise.evidence.intervals import Paired
from peelwise.evidence.verdict import (
    RULE,
    TIES_BY_MARGINAL,
    Evidence,
    Verdict,
    default_margin,
    harmful,
    judge,
    leaders,
    own_gains_decide,
)
from peelwise.records.audit import (
    AuditConclusion,
    AuditRecord,
    BlockRecord,
    HeadRecord,
    LeadingGain,
    LookFirst,
    LossRecord,
)
from peelwise.records.base import Interval, SealedRecord, unit_of
from peelwise.records.codes import Baseline
from peelwise.records.options import LEAST_MARGIN, MOST_MARGIN, Refine, is_margin

# Sums of the same numbers in another order and precision; far below anything that is shown.
_ROUNDING = 1e-5
# Nats per token: above what any vocabulary costs a model that knows nothing, 12.5 for 262,144 ids.
_WORST = 50.0
_LOSSES = (
    "current",
    "composed",
    "head_control",
    "shuffled",
    "untrained",
    "untrained_start",
    "dense",
    "without_blocks",
    "unigram",
)
_SETTINGS: dict[str, type | tuple[type, ...]] = {
    "budget_seconds": (int, float),
    "joint_rounds": int,
    "alone_rounds": int,
    "rounds": int,
    "beam_width": int,
    "most_witnesses": int,
    "layers_of": int,
    "signals": str,
    "path": bool,
    "micro_batch_tokens": int,
    "controls": bool,
    "steps": bool,
    "weighted": bool,
    "dense_references": bool,
    "maps": str,
    "start": str,
    "stack": str,
}
# More blocks than these that are not distinguishable point nowhere.
_MOST_NAMED = 3


def conclusion(
    blocks: Sequence[BlockRecord],
    margin: float,
    losses: LossRecord | None = None,
    *,
    in_distribution: bool = True,
    rule: int = RULE,
) -> AuditConclusion:
    """Return what follows for all blocks together, and no more than that.

    Args:
        blocks: with their verdicts.
        margin: nats per token.
        losses: of the model and the baselines.
        in_distribution: whether the text is training text; it decides which number points at a block.
        rule: by which the verdicts follow.
    """
    red = tuple(b.index for b in blocks if b.verdict == "red")
    yellow = tuple(b.index for b in blocks if b.verdict == "yellow")
    either = own_gains_decide(in_distribution, rule)
    measured = tuple(b.index for b in blocks if b.recoverable_nats or b.first_order_nats or (either and b.unique_nats))
    removals = [None if b.removal_nats is None else Paired.of(b.removal_nats) for b in blocks]
    worse = tuple(blocks[i].index for i in harmful(removals, margin))
    case: Literal["certified", "recoverable", "none-found", "not-measured"]
    above = None if losses is None else above_baseline(losses)
    if red or yellow:
        first = _look_first(blocks, in_distribution, rule)
        case = "certified" if red else "recoverable"
        return AuditConclusion(case=case, blocks=red or yellow, look_first=first, harmful=worse, above=above)
    case = "none-found" if measured else "not-measured"
    return AuditConclusion(case=case, blocks=measured, harmful=worse, above=above)


def above_baseline(losses: LossRecord) -> Baseline | None:
    """Return the baseline that does best, if it has a lower loss than the whole model."""
    best = best_baseline(losses)
    return best[0] if best is not None and best[1] < losses.current else None


def best_baseline(losses: LossRecord) -> tuple[Baseline, float] | None:
    """Return which baseline has the lowest loss, and that loss in nats per token; ``None`` if none was measured."""
    known: list[tuple[Baseline, float | None]] = [
        ("unigram", losses.unigram),
        ("without-blocks", losses.without_blocks),
    ]
    return min(((name, loss) for name, loss in known if loss is not None), key=lambda pair: pair[1], default=None)


def conclusion_of(record: AuditRecord) -> AuditConclusion:
    """Return the conclusion that follows from a record's numbers."""
    known = record.probe.in_distribution
    return conclusion(record.blocks, record.margin_nats, record.loss, in_distribution=known, rule=record.rule)


def _look_first(blocks: Sequence[BlockRecord], in_distribution: bool, rule: int) -> LookFirst | None:
    """Return the block most likely at fault, if few enough are not distinguishable from it.

    On training text that is the one with the largest solo gain, and of several that are not distinguishable the one
    with the largest marginal gain, what no other block can make up for; on other text all gain by adapting to it, which
    cancels in the marginal gain (docs/truth.md).
    """
    blocks = [b for b in blocks if not b.frozen]
    solo = [_paired(b.recoverable_nats) for b in blocks]
    marginal = [_paired(b.unique_nats) for b in blocks]
    by: LeadingGain = "marginal" if not in_distribution and all(marginal) else "solo"
    found = marginal if by == "marginal" else solo
    order = leaders(found)
    if by == "solo" and rule >= TIES_BY_MARGINAL and len(order) > 1 and all(marginal):
        fewer = leaders([gain if i in order else None for i, gain in enumerate(marginal)])
        order, by = (fewer, "marginal-of-tied") if len(fewer) < len(order) else (order, by)
    if not all(found) or len(order) > _MOST_NAMED or len(blocks) <= len(order):
        return None
    first, *tied = (blocks[i].index for i in order)
    return LookFirst(block=first, by=by, tied=tuple(sorted(tied)))


def informative(losses: LossRecord) -> bool | None:
    """Whether the composed bound beats the null controls; ``None`` if they were not run.

    It must gain more than the shuffled construction could (intervals apart), and end below the untrained one.
    """
    gained, shuffled = losses.composed_gain, losses.shuffled_gain
    if gained is None or losses.composed is None or shuffled is None:
        return None
    beats_untrained = losses.untrained is None or losses.composed < losses.untrained
    return gained.low > max(shuffled.high, 0.0) and beats_untrained


def tokens_needed(verdict: Verdict, report_tokens: int, report_sequences: int) -> int | None:
    """Return how many report tokens would decide an undecided block, at the length of its sequences."""
    needed = verdict.sequences_needed
    return None if needed is None else round(needed * max(report_tokens / report_sequences, 1.0))


def contradictions(record: AuditRecord, tolerance: float) -> Iterator[str]:
    """Yield, in words, every place where the record contradicts its own numbers.

    Args:
        record: of an audit.
        tolerance: nats per token by which losses of two implementations may differ (the head's and the model's).
    """
    yield from wrong_settings(record)
    yield from wrong_intervals(_named_intervals(record), record.probe.report_sequences)
    yield from _losses(record.loss, tolerance)
    yield from _impossible(record)
    yield from _left_out(record)
    yield from _of_tokens(record)
    yield from _frozen(record)
    yield from _head(record.head, record.loss)
    yield from _rounds(record)
    yield from _splits(record)
    yield from _verdicts(record)
    if record.informative != informative(record.loss):
        yield instead("informative", record.informative, informative(record.loss))
    # A record of old holds a sentence there, which follows from nothing and is not shown either.
    if isinstance(record.conclusion, AuditConclusion) and record.conclusion != conclusion_of(record):
        yield instead("conclusion", record.conclusion, conclusion_of(record))


def wrong_settings(record: SealedRecord) -> Iterator[str]:
    """Yield what is wrong with the margin, and with settings that no run can have had.

    A margin that was asked for lies within `records.options`' bounds, the default follows from the loss.
    """
    asked = record.settings.get("margin_nats")
    if asked is not None and not is_margin(asked):
        yield f"settings.margin_nats: {asked!r} was certified, {LEAST_MARGIN:g} to {MOST_MARGIN:g} is allowed."
    for name, value in record.settings.items():
        kind = _SETTINGS.get(name)
        # A boolean is an integer to Python, and not to whoever reads a record.
        if (
            kind is not None
            and value is not None
            and (not isinstance(value, kind) or isinstance(value, bool) != (kind is bool))
        ):
            yield f"settings.{name}: {value!r} was certified, which is no value of it."
        elif isinstance(value, int | float) and name != "margin_nats" and value < 0:
            yield f"settings.{name}: {value!r} was certified, which is below 0."


def margin_of(record: SealedRecord, loss: float) -> float:
    """Return the margin that a record's settings and loss give, nats per token."""
    asked = record.settings.get("margin_nats")
    return float(asked) if asked is not None and is_margin(asked) else default_margin(loss, unit_of(record))


def _impossible(record: AuditRecord) -> Iterator[str]:
    """A loss is not negative, so no witness gains more than there is."""
    loss = record.loss
    for name, value in loss:
        if name in _LOSSES and value is not None and value < 0:
            yield f"loss.{name}: {value:.6f} was certified, and no loss is below 0."
    for block in record.blocks:
        gain, marginal = block.recoverable_nats, block.unique_nats
        if gain is not None and gain.mean > loss.current + _ROUNDING:
            yield f"{block.name} recoverable: {gain.mean:.6f} was certified, more than the whole loss."
        if marginal is not None and (loss.composed is None or marginal.mean > max(loss.current, _WORST)):
            yield f"{block.name} unique: {marginal.mean:.6f} was certified, which no loss leaves room for."


def _frozen(record: AuditRecord) -> Iterator[str]:
    """Nothing was asked about a frozen block, so nothing was found."""
    for block in record.blocks:
        gains = block.recoverable_nats, block.unique_nats, block.first_order_nats
        if block.frozen and (any(gains) or block.matrices or block.rounds):
            yield f"{block.name}: it is said to be frozen, and what its layers gain is certified."
    asked = record.settings.get("refine", "all")  # records of old asked about everything
    if asked not in get_args(Refine):
        yield f"settings.refine: {asked!r} was certified, which is no value of it."
    elif asked == "all" and any(block.frozen for block in record.blocks):
        yield "blocks: some are said to be frozen, and settings.refine says that all were asked about."
    if record.blocks and all(block.frozen for block in record.blocks):
        yield "blocks: every one is said to be frozen, so nothing was asked."


def _left_out(record: AuditRecord) -> Iterator[str]:
    """An audit that is complete measured the same of all blocks; without solo rounds, what factors gain of some."""
    fields = [("unique_nats", "unique"), ("removal_nats", "removal")]
    if record.settings.get("alone_rounds") != 0:
        fields.append(("recoverable_nats", "recoverable"))
    for field, name in fields:
        asked = [block for block in record.blocks if field == "removal_nats" or not block.frozen]
        missing = [block.name for block in asked if getattr(block, field) is None]
        if record.complete and 0 < len(missing) < len(asked):
            yield f"{missing[0]} {name}: it is missing, though the audit is said to be complete."


def _of_tokens(record: AuditRecord) -> Iterator[str]:
    """Batches have no next tokens to count, and no head over a vocabulary; nothing would recheck such a number."""
    if record.probe.loss is None:
        return
    for name in ("unigram", "without_blocks", "head_control"):
        if getattr(record.loss, name) is not None:
            yield f"loss.{name}: it was certified, and a probe of batches has none."
    if record.head is not None:
        yield "head: it was certified, and of a probe of batches none is fitted."


def wrong_intervals(named: Iterable[tuple[str, Interval]], sequences: int) -> Iterator[str]:
    """Yield what is wrong with intervals over ``sequences`` report sequences: ends, method, standard error."""
    for name, interval in named:
        n = interval.sequences
        if n != sequences:
            yield instead(f"{name}.sequences", n, sequences)
        elif n < 2 or interval.standard_error < 0 or abs(interval.skewness) > n**0.5 + _ROUNDING:
            yield f"{name}: no {n} sequences have this standard error and skewness."
        else:
            follows = Paired.of(interval).interval()
            slack = 1e-6 * interval.standard_error + 1e-12
            for end in ("low", "high"):
                recorded, derived = getattr(interval, end), getattr(follows, end)
                if abs(recorded - derived) > slack:
                    yield instead(f"{name}.{end}", recorded, derived)
            if interval.method != follows.method:
                yield instead(f"{name}.method", interval.method, follows.method)


def _named_intervals(record: AuditRecord) -> Iterator[tuple[str, Interval]]:
    loss = record.loss
    found = {
        "loss.composed_gain": loss.composed_gain,
        "loss.head_control_gain": loss.head_control_gain,
        "loss.shuffled_gain": loss.shuffled_gain,
        "loss.untrained_gain": loss.untrained_gain,
        "loss.price": loss.price,
        "head.recoverable_nats": record.head.recoverable_nats if record.head else None,
    }
    for block in record.blocks:
        found[f"{block.name} recoverable"] = block.recoverable_nats
        found[f"{block.name} unique"] = block.unique_nats
        found[f"{block.name} first-order bound"] = block.first_order_nats
        found[f"{block.name} removal"] = block.removal_nats
        found[f"{block.name} price"] = block.price_nats
    yield from ((name, interval) for name, interval in found.items() if interval is not None)


def _losses(loss: LossRecord, tolerance: float) -> Iterator[str]:
    """A gain is the difference of the two losses that it stands beside."""
    rows = (
        ("composed", loss.current, loss.composed, loss.composed_gain, _ROUNDING),
        ("shuffled", loss.current, loss.shuffled, loss.shuffled_gain, _ROUNDING),
        ("untrained", loss.untrained_start, loss.untrained, loss.untrained_gain, _ROUNDING),
        ("head_control", loss.current, loss.head_control, loss.head_control_gain, tolerance),
    )
    for name, before, after, gain, slack in rows:
        if (after is None) != (gain is None) or (after is not None and before is None):
            yield f"loss.{name}: a loss and its gain stand together or not at all."
        elif before is not None and after is not None and gain is not None and abs(before - after - gain.mean) > slack:
            start = "untrained_start" if name == "untrained" else "current"
            yield instead(f"loss.{name}_gain.mean", gain.mean, before - after, f"loss.{start} - loss.{name}")


def _head(head: HeadRecord | None, loss: LossRecord) -> Iterator[str]:
    if (head is None) != (loss.head_control_gain is None):
        yield "head: the head's reference and the head control stand together or not at all."
    elif head is not None:
        if head.recoverable_nats != loss.head_control_gain:
            yield "head.recoverable_nats: it is not loss.head_control_gain, though both are the re-fitted head's."
        if not head.relaxed - _ROUNDING <= head.achieved <= head.current + _ROUNDING:
            yield "head: relaxed <= achieved <= current does not hold."


def _splits(record: AuditRecord) -> Iterator[str]:
    """The parts of a loss add up to it, and are the differences that stand beside them."""
    loss = record.loss
    rows = [("loss", loss.split, loss.composed_gain, loss.price)]
    rows += [(b.name, b.split, b.recoverable_nats, b.price_nats) for b in record.blocks]
    for name, split, gained, price in rows:
        if split is None:
            if price is not None:
                yield f"{name}: a quantisation gap and its split stand together or not at all."
            continue
        total = split.irreducible + split.price_of_precision + split.left_on_the_table
        if abs(total - loss.current) > _ROUNDING:
            yield instead(f"{name}.split", total, loss.current, "loss.current")
        if abs(split.left_on_the_table - (gained.mean if gained else 0.0)) > _ROUNDING:
            yield f"{name}.split: what is recoverable at the same bit width is not the gain that was certified."
        if price is None or abs(split.price_of_precision - price.mean) > _ROUNDING:
            yield f"{name}.split: its quantisation gap is not the mean of the interval beside it."


def _rounds(record: AuditRecord) -> Iterator[str]:
    if any(r.select_after >= r.select_before for r in record.rounds):
        yield "rounds: a round was kept that does not lower the select loss."
    if any(abs(a.select_after - b.select_before) > _ROUNDING for a, b in pairwise(record.rounds)):
        yield "rounds: a round does not begin where the one before ended."
    if bool(record.rounds) != (record.loss.composed is not None):
        yield "rounds: a composed loss needs at least one round, and a round leaves one."


def _verdicts(record: AuditRecord) -> Iterator[str]:
    probe, margin = record.probe, margin_of(record, record.loss.current)
    if not 1 <= record.rule <= RULE:
        yield f"rule: verdicts follow by rule {record.rule}; this version knows 1 to {RULE}."
    if abs(record.margin_nats - margin) > 1e-9:
        yield instead("margin_nats", record.margin_nats, margin)
    if [b.index for b in record.blocks] != list(range(record.model.blocks)):
        yield f"blocks: expected one record for each of {record.model.blocks} blocks, in order."
    for block, verdict in zip(record.blocks, verdicts_of(record), strict=True):
        follows = {
            "verdict": verdict.colour,
            "reason_code": block.reason_code and verdict.reason,  # records of old have none
            "interaction": verdict.interaction,
            "tokens_needed": tokens_needed(verdict, probe.report_tokens, probe.report_sequences),
        }
        for name, value in follows.items():
            if getattr(block, name) != value:
                yield instead(f"{block.name} {name}", getattr(block, name), value)


def verdicts_of(record: AuditRecord) -> list[Verdict]:
    """Return the verdicts that follow from a record's numbers, one per block."""
    evidence = [
        Evidence(_paired(b.recoverable_nats), _paired(b.unique_nats), b.frozen, _paired(b.first_order_nats))
        for b in record.blocks
    ]
    return judge(evidence, record.margin_nats, in_distribution=record.probe.in_distribution, rule=record.rule)


def instead(name: str, recorded: object, follows: object, of: str = "its other numbers") -> str:
    """Say that a value is not the one that follows."""
    shown = [f"{v:.6f}" if isinstance(v, float) else str(v) for v in (recorded, follows)]
    return f"{name}: {shown[0]} was certified, {shown[1]} follows from {of}."


def _paired(interval: Interval | None) -> Paired | None:
    return None if interval is None else Paired.of(interval)
