"""Null controls: what a bound must beat before it may be believed (METHOD: head, shuffled, untrained)."""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch
from torch import Tensor

from peelwise.engine.heads import per_sequence
from peelwise.engine.opening import low_bit_layers
from peelwise.engine.refine import Proposals, unrefined
from peelwise.engine.rounds import improved
from peelwise.engine.session import Session, gain
from peelwise.engine.sweep import sweep
from peelwise.errors import IllConditionedWarning
from peelwise.model.architectures import find_blocks
from peelwise.model.fresh import fresh_copy
from peelwise.model.runner import Runner
from peelwise.model.splice import spliced
from peelwise.probe.probe import Split
from peelwise.records.audit import HeadRecord
from peelwise.records.base import note
from peelwise.references.head import fit_head, token_cross_entropy
from peelwise.tasks.audit.findings import Control, Findings


def head_reference(session: Session, findings: Findings, *, share: float = 1.0) -> None:
    """Fit the convex output head on the fit tokens; it is a reference and the head control at once.

    It takes at most ``share`` of the whole budget; stopped early, its lower bound is only looser.
    """
    runner, clock = session.runner, session.clock
    head = runner.head
    if head is None:
        findings.notes.append(note("no-head"))
        return
    with clock.stage("head"):
        # Some models (soft-capped logits) compute something behind the head; then it is not this problem.
        fit_x, fit_y, agree = runner.head_inputs(session.fit)
        if not bool(agree):
            findings.notes.append(note("logits-changed"))
            return
        select_x, select_y, _ = runner.head_inputs(session.select)
        report_x, report_y, _ = runner.head_inputs(session.report)
        dtype = next(head.parameters()).dtype

        stop = clock.elapsed + share * clock.budget

        def logits(x: Tensor) -> Tensor:
            out: Tensor = head(x.to(dtype))
            return out

        with torch.no_grad():
            reference = fit_head(
                (fit_x, fit_y),
                (select_x, select_y),
                logits,
                keep_going=lambda: clock.elapsed < stop,
            )
            before = token_cross_entropy(report_x, report_y, logits)
            after = token_cross_entropy(report_x, report_y, logits, reference.change)
        runner.work.add(runner.head_share, 3.0 * (reference.steps + 1) * len(fit_y))
    difference = gain(per_sequence(before, session.report), per_sequence(after, session.report), session.report)
    findings.head_control = Control(float(after.mean()), difference)
    findings.head = HeadRecord(
        current=reference.current,
        achieved=reference.achieved,
        relaxed=reference.relaxed,
        penalty=reference.penalty,
        steps=reference.steps,
        recoverable_nats=difference.interval(),
    )


def shuffled_control(session: Session, findings: Findings) -> None:
    """Take one joint step along the proposals for targets permuted across sequences: inputs without their labels."""
    proposals, findings.shuffled_proposals = findings.shuffled_proposals, None
    if proposals is not None:
        with session.clock.stage("shuffled-control"):
            findings.shuffled = _joint_step(session, proposals)


def untrained_control(session: Session, findings: Findings) -> None:
    """Run one joint round on the same architecture at initialisation, on a third of the fit and select tokens.

    An untrained model is a long way above any trained one, so fewer tokens lose nothing of the comparison.
    """
    with session.clock.stage("untrained-control"):
        fresh = fresh_copy(session.runner.model, session.seed)
        if fresh is None:
            findings.notes.append(note("not-initialised"))
            return
        blocks = find_blocks(fresh)
        runner = Runner(fresh, blocks, micro_batch_tokens=session.runner.micro_batch_tokens)
        runner.work = session.runner.work
        fit, select = runner.trace(_third(session.probe.fit)), runner.trace(_third(session.probe.select))
        report = runner.trace(session.probe.report)
        own = replace(session, runner=runner, fit=fit, select=select, report=report, held=low_bit_layers(blocks))
        with warnings.catch_warnings():
            # Rank deficiency in a control is no finding about the model.
            warnings.simplefilter("ignore", IllConditionedWarning)
            (proposals,) = sweep(
                runner,
                fit,
                select,
                directions=("input-whitened",),
                after_block=lambda done: session.clock.tell(done, len(runner.blocks)),
            )
        findings.untrained = _joint_step(own, proposals)


def _third(split: Split) -> Split:
    few = max(split.sequences // 3, 1)
    return Split(split.ids[:few], split.mask[:few])


def _joint_step(session: Session, proposals: Proposals) -> Control:
    """Return what one joint step along ``proposals`` gains on report."""
    runner = session.runner
    better = improved(session, unrefined(session.select), proposals, output_changes={}, evaluations=6)
    after = session.report.losses
    if better is not None:
        with spliced(better.changes):
            after = runner.losses_from(session.report, 0)
    tokens = float(session.report.tokens.sum())
    difference = gain(session.report.losses, after, session.report)
    return Control(float(after.sum()) / tokens, difference, session.report.mean)
