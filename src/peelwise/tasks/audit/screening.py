"""Screening: which blocks can gain no more than so much, by one pass back over report, before they are refined.

The slope of the loss along a block's direction, times the step that the block would take, bounds its gain where the
loss is convex along it. The step is not known before the block is refined, and is nearly the same for all blocks of a
model (NOTES.md), so it is taken from those that were refined, twice over.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from peelwise.engine.refine import Refined
from peelwise.engine.session import Session, combined, rounded
from peelwise.engine.slopes import first_order_gains
from peelwise.engine.sweep import DIRECTIONS, Direction
from peelwise.tasks.audit.findings import Findings

Steps = Mapping[Direction, float]

# The largest step that a block takes, in units of those of the blocks refined: 1.74 was the most over six models.
STEPS_OVER = 2.0
# The step to try where there is no time to search for one: half of the best gains three quarters of what that does, and
# one that is half as long as the best of another block still gains something if that is four times longer.
STEP_UNDER = 0.5
PASSES = 4.0  # forward passes over report that one screening takes


def steps_of(refined: Collection[Refined]) -> Steps:
    """Return per direction the longest first step of blocks that were refined by themselves."""
    first = [each.rounds[0] for each in refined if each.rounds]
    return {d: max(steps) for d in DIRECTIONS if (steps := [r.step for r in first if r.direction == d])}


def take_step(session: Session, findings: Findings, order: Iterable[int], steps: Steps) -> None:
    """Evaluate blocks on report after one step of a length that others give; no search, so one pass for each.

    What a step gains is a lower bound of the solo gain, on text that had no part in choosing it. Nothing is said of
    other lengths: that takes the slope, too.

    Args:
        session: model and traces.
        findings: gets the blocks in ``alone``.
        order: indices of blocks that have proposals.
        steps: of blocks that were refined, `steps_of`.
    """
    direction = _direction(steps)
    if direction is None:
        return
    for index in order:
        proposals = {index: findings.proposals[index]}
        changes = combined({}, proposals, direction, STEP_UNDER * steps[direction])
        losses = session.losses(session.report, changes, index)
        findings.alone[index] = Refined(changes, (), session.select.mean, losses, index)


def screen(session: Session, findings: Findings, steps: Steps) -> bool:
    """Bound what every block gains along its direction for which no step was searched.

    Nothing is done without a step to go by, for low-bit formats, in which there are no small steps, or where proposals
    are of the model with factors in place.

    Args:
        session: model and traces.
        findings: gets the directions at the longest step, and what they gain to first order on report.
        steps: of blocks that were refined, `steps_of`.

    Returns whether there is a bound.
    """
    direction = _direction(steps)
    if direction is None or session.held or findings.factors is not None:
        return False
    findings.screened = {
        index: {
            linear: rounded(STEPS_OVER * steps[direction] * proposal.change.float())
            for linear, proposal in proposals.changes[direction].items()
        }
        for index, proposals in findings.proposals.items()
        if direction in proposals.changes and not findings.searched(index)
    }
    findings.first_order = first_order_gains(session, session.report, findings.screened)
    findings.screened = {index: each for index, each in findings.screened.items() if index in findings.first_order}
    return bool(findings.first_order)


def _direction(steps: Steps) -> Direction | None:
    """Return the direction to go by: the better one as a rule, where there is a step for it."""
    return next((direction for direction in ("two-sided", "input-whitened") if direction in steps), None)
