"""Screening: which blocks can gain no more than so much, by one pass back over report, before they are refined.

The slope of the loss along a block's direction, times the step that the block would take, bounds its gain where the
loss is convex along it. The step is not known before the block is refined, and is nearly the same for all blocks of a
model (NOTES.md), so it is taken from those that were refined, twice over.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

from peelwise.engine.proposals import DIRECTIONS, Direction
from peelwise.engine.refine import Refined, first_gain, take_round, unrefined
from peelwise.engine.session import Session, output_change, stored
from peelwise.engine.slopes import first_order_gains
from peelwise.tasks.audit.findings import Findings

Steps = Mapping[Direction, float]

# The largest step that a block takes, in units of those of the blocks refined: 1.74 was the most over six models.
STEPS_OVER = 2.0
# Of select, in a search that begins with a known step, as a rule and at most.
EVALUATIONS, _MOST_EVALUATIONS = 2, 6
_BEGIN = 0.5  # of that step: from too short a one a parabola shows where the best lies, from far too long a one not
PASSES = 4.0  # forward passes over report that one screening takes


def steps_of(refined: Collection[Refined]) -> Steps:
    """Return per direction the longest first step of blocks that were refined by themselves."""
    first = [each.rounds[0] for each in refined if each.rounds]
    return {d: max(steps) for d in DIRECTIONS if (steps := [r.step for r in first if r.direction == d])}


def refine_from(session: Session, findings: Findings, order: Iterable[int], steps: Steps) -> None:
    """Refine blocks by themselves, one round in one direction, from a step that others give.

    Args:
        session: model and traces.
        findings: gets the blocks in ``alone``.
        order: indices of blocks that have proposals.
        steps: of blocks that were refined, `steps_of`.
    """
    direction = _direction(steps)
    for index in order if direction is not None else ():
        assert direction is not None
        made = findings.proposals[index]
        own = {index: replace(made, changes={direction: made.changes[direction]})}
        slope = sum(p.slope for p in made.changes[direction].values())
        # Where the others' step would gain far more than blocks do, were the loss linear, it is too long for this one.
        begin = min(_BEGIN * steps[direction], first_gain(session) / slope) if slope > 0 else _BEGIN * steps[direction]
        first = {direction: begin * output_change(own, direction, 1.0)}
        before = unrefined(session.select, index)
        better = take_round(session, before, own, output_changes=first, evaluations=_MOST_EVALUATIONS)
        losses = session.report.losses if better is None else session.losses(session.report, better.changes, index)
        findings.alone[index] = replace(better or before, report_losses=losses)


def screen(session: Session, findings: Findings, steps: Steps) -> bool:
    """Bound what every block that was not refined gains along its direction.

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
            linear: stored(STEPS_OVER * steps[direction] * proposal.change.float(), session.runner.spill)
            for linear, proposal in proposals.changes[direction].items()
        }
        for index, proposals in findings.proposals.items()
        if direction in proposals.changes and index not in findings.alone
    }
    findings.first_order = first_order_gains(session, session.report, findings.screened)
    findings.screened = {index: each for index, each in findings.screened.items() if index in findings.first_order}
    return bool(findings.first_order)


def _direction(steps: Steps) -> Direction | None:
    """Return the direction to go by: the better one as a rule, where there is a step for it."""
    return next((direction for direction in ("two-sided", "input-whitened") if direction in steps), None)
