"""Refinement rounds: linearise, propose, choose direction and step on select, repeat while select improves.

The same round serves one block by itself, all blocks together, and the null controls.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from peelwise.engine.proposals import BlockProposals, Direction
from peelwise.engine.session import Changes, Session, combined, output_change
from peelwise.formats.base import Encoded
from peelwise.model.layers import LinearLayer
from peelwise.model.trace import Trace
from peelwise.records.audit import RoundRecord
from peelwise.records.base import NATS
from peelwise.references.step_search import search_step

Proposals = dict[int, BlockProposals]

# Where nothing is known of the right step length, the first is the one that would win so much were the loss linear.
FIRST_GAIN_NATS = 0.05
_FIRST_SHARE = 0.02  # of a loss in another unit, whose size nobody knows before


@dataclass(frozen=True)
class Refined:
    """Weight changes of some blocks after a number of rounds, and how they do.

    Attributes:
        changes: the changes of all rounds added up.
        rounds: what was chosen in each round.
        select_loss: nats per token on select.
        report_losses: nats per sequence on report, or ``None`` where it was not evaluated.
        start: the lowest block that is changed.
        codes: of low-bit maps, what ``changes`` comes from; empty for a dense witness.
    """

    changes: Changes
    rounds: tuple[RoundRecord, ...]
    select_loss: float
    report_losses: Tensor | None
    start: int
    codes: dict[LinearLayer, Encoded] = field(default_factory=dict)


def unrefined(select: Trace, start: int = 0) -> Refined:
    """Return the state before the first round."""
    return Refined({}, (), select.mean, None, start)


def take_round(
    session: Session,
    before: Refined,
    proposals: Proposals,
    *,
    output_changes: dict[Direction, float],
    evaluations: int = 8,
) -> Refined | None:
    """Try the directions of ``proposals`` on top of ``before``; return the better, or ``None`` if none helps.

    Args:
        session: model and select tokens.
        before: the changes so far.
        proposals: what the sweep proposed, linearised at ``before``.
        output_changes: per direction the step length to try first, in units of output change; updated with the
            one that was chosen, as a first guess for the next round or block.
        evaluations: most evaluations of the select loss per direction.
    """
    select, spill = session.select, session.runner.spill
    best: Refined | None = None
    for direction in _directions(proposals):
        unit = output_change(proposals, direction, 1.0)
        slope = sum(p.slope for block in proposals.values() for p in block.changes[direction].values())
        start = _first_step(output_changes.get(direction), unit, slope, first_gain(session))
        if not 0 < start < math.inf:
            continue

        def loss_at(step: float, direction: Direction = direction) -> float:
            changes = combined(before.changes, proposals, direction, step, spill)
            return select.mean_of(session.losses(select, changes, before.start))

        choice = search_step(
            loss_at,
            before.select_loss,
            start,
            slope=slope,
            evaluations=evaluations,
            beat=best.select_loss if best else math.inf,
        )
        change = output_change(proposals, direction, choice.step)
        if choice.step == 0 or not math.isfinite(change):
            continue
        output_changes[direction] = choice.step * unit
        if best is None or choice.loss < best.select_loss:
            best = Refined(
                combined(before.changes, proposals, direction, choice.step, spill),
                (
                    *before.rounds,
                    RoundRecord(
                        direction=direction,
                        step=choice.step,
                        output_change=change,
                        select_before=before.select_loss,
                        select_after=choice.loss,
                    ),
                ),
                choice.loss,
                None,
                before.start,
            )
    return best


def first_gain(session: Session) -> float:
    """Return what the first step would gain were the loss linear, in the probe's unit."""
    return FIRST_GAIN_NATS if session.probe.unit == NATS else _FIRST_SHARE * session.select.mean


def _first_step(wanted: float | None, unit: float, slope: float, gain: float) -> float:
    """Return the step to try first; 0 where there is none: downhill to nothing, or numbers that overflow."""
    if not (0 < unit < math.inf and 0 < slope < math.inf):
        return 0.0
    return gain / slope if wanted is None else wanted / unit


def _directions(proposals: Proposals) -> Sequence[Direction]:
    first = next(iter(proposals.values()), None)
    return tuple(first.changes) if first is not None else ()
