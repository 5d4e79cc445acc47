"""What follows from the numbers of a comparison of two models. No model, no tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from peelwise.evidence.intervals import Paired
from peelwise.evidence.verdict import harmful
from peelwise.records.base import Interval
from peelwise.records.compare import BlockChange, CompareConclusion, CompareLosses, EndChange

Effect = Literal["hurt", "helped", "undecided"]
Case = Literal["identical", "same-function", "worse", "better", "no-difference"]
_ROUNDING = 1e-5  # nats per token: two ways of computing the same loss


def conclusion(
    loss: CompareLosses, blocks: Sequence[BlockChange], ends: Sequence[EndChange], margin: float
) -> CompareConclusion:
    """Return what follows for all blocks together, and no more than that.

    Args:
        loss: of both models.
        blocks: in their order.
        ends: embedding, norm and head.
        margin: nats per token that an effect must exceed, with all blocks asked about at once (Holm).
    """
    changed = [b for b in blocks if is_changed(b)]
    return CompareConclusion(
        case=_case(loss, bool(changed) or any(map(is_changed, ends))),
        hurt=tuple(blocks[i].index for i in _hurt(blocks, margin)),
        helped=tuple(blocks[i].index for i in _helped(blocks, margin)),
        changed=tuple(b.index for b in sorted(changed, key=lambda b: -effect(b))),
        unexplained=tuple(b.index for b in blocks if b.same_code is False),
        hurt_ends=tuple(ends[i].unit for i in _hurt(ends, margin)),
    )


def effects_of(blocks: Sequence[BlockChange], margin: float) -> dict[int, Effect]:
    """Return what the change of each block did, by its index, as `conclusion` has it."""
    hurt, helped = ({blocks[i].index for i in named(blocks, margin)} for named in (_hurt, _helped))
    return {b.index: "hurt" if b.index in hurt else "helped" if b.index in helped else "undecided" for b in blocks}


def _helped(parts: Sequence[BlockChange | EndChange], margin: float) -> list[int]:
    """Return the places of the parts whose return to OLD costs more than the margin (Holm over all given)."""
    return harmful([None if p.repairs_nats is None else Paired.of(p.repairs_nats) for p in parts], margin)


def _hurt(parts: Sequence[BlockChange | EndChange], margin: float) -> list[int]:
    """Return the places of the parts that repair more than the margin (Holm over all given), the largest first."""
    repairs = [None if part.repairs_nats is None else Paired.of(part.repairs_nats) for part in parts]
    return harmful([None if r is None else replace(r, mean=-r.mean, skewness=-r.skewness) for r in repairs], margin)


def is_changed(part: BlockChange | EndChange) -> bool:
    """Whether a part differs in weights or in what it computes."""
    return part.kind_of_change != "unchanged"


def effect(part: BlockChange | EndChange) -> float:
    """Return what ranks parts: the size of what putting them back does, nats per token; unmeasured ones come last."""
    return -1.0 if part.repairs_nats is None else abs(part.repairs_nats.mean)


def within(interval: Interval, size: float) -> bool:
    """Whether an interval and its mean are zero up to ``size``."""
    return max(abs(interval.low), abs(interval.high)) <= size


def _case(loss: CompareLosses, changed: bool) -> Case:
    if not changed:
        return "identical"
    if within(loss.damage, _ROUNDING):
        return "same-function"
    if loss.damage.low > 0:
        return "worse"
    return "better" if loss.damage.high < 0 else "no-difference"
