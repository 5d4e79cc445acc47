"""What a block could recover beside what training itself is about to gain: a red too soon, an undecided one settled."""

from __future__ import annotations

from peelwise.evidence.trends import Slope, equivalent_steps
from peelwise.evidence.verdict import Verdict
from peelwise.records.base import Interval

_SOON = 0.25  # of the window of the loss's slope
_OPEN = ("more-tokens", "not-refined")


def unless_soon(verdict: Verdict, gain: Interval, slope: Slope) -> Verdict:
    """Return a red verdict, but yellow where training may make its gain by itself in a quarter of the slope's window.

    That losses are not shown to fall does not say that they stand still. How fast they may fall, their slope says:
    ``gain.low / -slope.low < slope.steps / 4``.
    """
    worth = equivalent_steps(gain, slope).low
    soon = worth is not None and worth < _SOON * slope.steps
    return Verdict("yellow", "still-falling", interaction=verdict.interaction) if soon else verdict


def within_progress(verdict: Verdict, gain: Interval, slope: Slope) -> Verdict:
    """Return an undecided verdict, but yellow where training makes up for the most that there may be to gain.

    Green or red takes an interval on one side of the margin. But no block is in the way of training whose gain is at
    most what the loss falls by, at the least that its slope allows, in as many steps as that slope was seen over:
    ``gain.high / -slope.high < slope.steps``.
    """
    if verdict.reason not in _OPEN or verdict.interaction:
        return verdict
    worth = equivalent_steps(gain, slope).high
    return Verdict("yellow", "within-progress") if worth is not None and worth < slope.steps else verdict
