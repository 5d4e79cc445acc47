"""What measuring costs in a run, and what it takes to decide a block."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Pace:
    """What measuring costs.

    Attributes:
        tokens: to report on, per sequence.
        seconds: that a measurement takes for each of them, all that comes with it included.
        budget: share of wall time that measurements may take, or ``None`` for no limit.
    """

    tokens: float
    seconds: float
    budget: float | None


def missing(sequences: int, held: int, pace: Pace) -> tuple[float, float | None]:
    """Return how many tokens decide a block, and in how many seconds a run pays for those that it has not yet.

    Args:
        sequences: to report on, all in all.
        held: of them, those whose evidence is kept and counts on; 0 where a measurement stands for itself.
        pace: what measuring costs.

    Returns:
        ``sequences * tokens``, and ``(sequences - held) * tokens * seconds / budget``, ``None`` without a budget.
    """
    seconds = None
    if pace.budget is not None:
        seconds = max(0, sequences - held) * pace.tokens * pace.seconds / pace.budget
    return sequences * pace.tokens, seconds
