"""What follows from the numbers of a comparison of two models. No model, no tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from peelwise.evidence.intervals import Paired
from peelwise.evidence.verdict import harmful
from peelwise.records.base import Interval
from peelwise.records.compare import BlockChange, CompareConclusion, CompareLosses, EndChange

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
    repairs = [None if b.repairs_nats is None else Paired.of(b.repairs_nats) for b in blocks]
    worse = [None if r is None else replace(r, mean=-r.mean, skewness=-r.skewness) for r in repairs]
    changed = [b for b in blocks if is_changed(b)]
    return CompareConclusion(
        case=_case(loss, bool(changed) or any(map(is_changed, ends))),
        hurt=tuple(blocks[i].index for i in harmful(worse, margin)),
        helped=tuple(blocks[i].index for i in harmful(repairs, margin)),
        changed=tuple(b.index for b in sorted(changed, key=lambda b: -effect(b))),
        unexplained=tuple(b.index for b in blocks if b.same_code is False),
    )


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
