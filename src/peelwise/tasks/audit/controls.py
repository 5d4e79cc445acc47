"""Null controls: what a bound must beat before it may be believed (METHOD: head, shuffled, untrained)."""

from __future__ import annotations

import warnings
from dataclasses import replace

from peelwise.engine import heads
from peelwise.engine.opening import untrained_session
from peelwise.engine.refine import Proposals, unrefined
from peelwise.engine.rounds import next_round
from peelwise.engine.session import Session
from peelwise.engine.sweep import sweep
from peelwise.errors import IllConditionedWarning
from peelwise.probe.rows import Split
from peelwise.records.audit import HeadRecord
from peelwise.tasks.audit.findings import Control


def head_reference(session: Session, *, share: float = 1.0) -> tuple[HeadRecord, Control] | None:
    """Fit the convex output head on the fit tokens; it is a reference and the head control at once.

    It takes at most ``share`` of the whole budget; stopped early, its lower bound is only looser. Returns ``None``
    where there is no such head: none was found, or logits are changed behind it, and it is not this problem.
    """
    clock = session.clock
    if session.runner.head is None:
        return None
    with clock.stage("head"):
        stop = clock.elapsed + share * clock.budget
        found = heads.fit(session, keep_going=lambda: clock.elapsed < stop)
        if found is None:
            return None
        reference, report = found.reference, found.report
        before, after = report.token_losses(), report.token_losses(reference.change)
        difference = session.gain(report.per_sequence(before), report.per_sequence(after))
        record = HeadRecord(
            current=reference.current,
            achieved=reference.achieved,
            relaxed=reference.relaxed,
            penalty=reference.penalty,
            steps=reference.steps,
            recoverable_nats=difference.interval(),
        )
        return record, Control(float(after.mean()), difference)


def embedding_baseline(session: Session, *, share: float) -> float | None:
    """Return the report loss of a new head on the embedding, nats per token: what the text costs without any block.

    It takes about ``share`` of the whole budget; ``None`` where one step would take more, or there is no such head.
    """
    step = session.seconds_for(3.0 * session.runner.head_share * session.fit.predicted)
    if step > share * session.clock.budget:
        return None
    with session.clock.stage("head"):
        return heads.without_blocks(session, seconds=share * session.clock.budget)


def shuffled_control(session: Session, proposals: Proposals) -> Control:
    """Take one joint step along the proposals for targets permuted across sequences: inputs without their labels."""
    with session.clock.stage("shuffled-control"):
        return _joint_step(session, proposals)


def untrained_control(session: Session) -> Control | None:
    """Run one joint round on the same architecture at initialisation, on a third of the fit and select tokens.

    An untrained model is a long way above any trained one, so fewer tokens lose nothing of the comparison. Returns
    ``None`` where the model cannot be initialised again.
    """
    with session.clock.stage("untrained-control"):
        probe = session.probe
        fresh = untrained_session(session, replace(probe, fit=_third(probe.fit), select=_third(probe.select)))
        if fresh is None:
            return None
        with warnings.catch_warnings():
            # Rank deficiency in a control is no finding about the model.
            warnings.simplefilter("ignore", IllConditionedWarning)
            (proposals,) = sweep(
                fresh.runner,
                fresh.fit,
                fresh.select,
                directions=("input-whitened",),
                after_block=fresh.tell_block,
            )
        return _joint_step(fresh, proposals)


def _third(split: Split) -> Split:
    few = max(split.sequences // 3, 1)
    return split.at(slice(few))


def _joint_step(session: Session, proposals: Proposals) -> Control:
    """Return what one joint step along ``proposals`` gains on report."""
    before = session.report.losses
    better = next_round(session, unrefined(session.select), proposals, output_changes={}, evaluations=6)
    after = before if better is None or better.report_losses is None else better.report_losses
    return Control(session.report.mean_of(after), session.gain(before, after), session.report.mean)
