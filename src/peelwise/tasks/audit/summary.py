"""From findings to the frozen record and the witness tensors."""

from __future__ import annotations

import datetime
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from peelwise.engine.baselines import probe_unigram
from peelwise.engine.provenance import Setup, model_record, versions
from peelwise.engine.refine import unrefined
from peelwise.engine.session import Session
from peelwise.engine.witness import dense_tensors, witness_tensors
from peelwise.evidence.audit import conclusion, informative, tokens_needed
from peelwise.evidence.intervals import Paired
from peelwise.evidence.unlike import THRESHOLD
from peelwise.evidence.verdict import RULE, Evidence, Verdict, default_margin, judge
from peelwise.model.layers import Block, device_of
from peelwise.records.audit import AuditRecord, BlockRecord, LossRecord
from peelwise.records.base import Interval
from peelwise.records.check import CheckPart
from peelwise.tasks.audit.findings import Control, Findings
from peelwise.tasks.audit.loss_parts import coded_matrices, matrices_of, split_of


def summarise(
    session: Session, findings: Findings, setup: Setup, margin: float | None
) -> tuple[AuditRecord, dict[str, Tensor]]:
    """Return the record of everything found, and the witness tensors by name.

    Args:
        session: the model's own losses and the clock.
        findings: what the stages left.
        setup: what was audited.
        margin: nats per token, or ``None`` for the default.
    """
    current = session.report.mean
    margin = default_margin(current, session.probe.unit) if margin is None else margin
    every = session.runner.blocks  # without the layers that never run
    evidence = [evidence_of(session, findings, block.index) for block in every]
    verdicts = judge(evidence, margin, in_distribution=session.probe.in_distribution)
    losses = _losses(session, findings)
    blocks = tuple(
        _block_record(session, findings, block, e, v) for block, e, v in zip(every, evidence, verdicts, strict=True)
    )
    record = AuditRecord(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        conclusion=conclusion(blocks, margin, losses, in_distribution=session.probe.in_distribution),
        complete=findings.complete,
        rule=RULE,
        margin_nats=margin,
        informative=informative(losses),
        model=model_record(setup),
        probe=session.probe.record(),
        loss=losses,
        blocks=blocks,
        head=findings.head,
        rounds=findings.composed.rounds if findings.composed else (),
        check=_check(findings),
        cost=session.clock.record(_probe_tokens(session), device_of(setup.model)),
        notes=tuple(findings.notes),
        settings=setup.settings,
        seed=setup.seed,
        versions=versions(),
    )
    return record, _witness(session, findings)


def evidence_of(session: Session, findings: Findings, index: int) -> Evidence:
    """Return what was measured of one block on report."""
    if not session.runner.blocks[index].linears:
        return Evidence(frozen=True)
    alone = findings.alone.get(index)
    measured = None
    if alone is not None and alone.report_losses is not None:
        measured = session.gain(session.report.losses, alone.report_losses)
    unique = None
    composed = findings.composed
    if index in findings.without and composed is not None and composed.report_losses is not None:
        unique = session.gain(findings.without[index], composed.report_losses)
    bound = None
    if findings.bounded(index):
        gained = findings.first_order[index]
        bound = session.gain(gained, torch.zeros_like(gained))
    return Evidence(measured, unique, bound=bound)


def _block_record(
    session: Session, findings: Findings, block: Block, evidence: Evidence, verdict: Verdict
) -> BlockRecord:
    proposals = findings.proposals.get(block.index)
    parts = split_of(session, findings.alone.get(block.index), findings.dense_alone.get(block.index))
    return BlockRecord(
        index=block.index,
        name=block.name,
        verdict=verdict.colour,
        reason_code=verdict.reason,
        recoverable_nats=_interval(evidence.alone),
        unique_nats=_interval(evidence.unique),
        first_order_nats=_interval(evidence.bound),
        removal_nats=_removal(session, findings, block.index),
        rounds=len(findings.alone[block.index].rounds) if block.index in findings.alone else 0,
        **_signals(proposals.signals if proposals else {}),
        tokens_needed=tokens_needed(verdict, session.probe.report.tokens, session.probe.report.sequences),
        interaction=verdict.interaction,
        matrices=coded_matrices(session, findings, block) if session.held else matrices_of(block, proposals),
        split=parts[0] if parts else None,
        price_nats=parts[1] if parts else None,
        frozen=not block.linears,
    )


def _check(findings: Findings) -> CheckPart | None:
    look = findings.look
    if look is None or look.scored is None:
        return None
    return CheckPart(
        threshold=THRESHOLD,
        scores=tuple(map(float, look.scored.scores)),
        unlike=look.unlike(),
        signals=tuple(look.table.of_block(index) for index in range(look.table.blocks)),
    )


def _signals(found: dict[str, float]) -> dict[str, Any]:
    """Return a block's signals by the record's fields: those that have one of their own, and all others together."""
    own = {name: value for name, value in found.items() if name in BlockRecord.model_fields}
    return own | {"signals": {name: value for name, value in found.items() if name not in own}}


def _removal(session: Session, findings: Findings, index: int) -> Interval | None:
    losses = findings.removed.get(index)
    return None if losses is None else session.gain(losses, session.report.losses).interval()


def _losses(session: Session, findings: Findings) -> LossRecord:
    composed = findings.composed
    value, composed_gain = None, None
    if composed is not None and composed.report_losses is not None:
        value = session.report.mean_of(composed.report_losses)
        composed_gain = session.gain(session.report.losses, composed.report_losses).interval()
    inside = composed or replace(unrefined(session.select), report_losses=session.report.losses)
    parts = split_of(session, inside, findings.dense_composed)
    head, shuffled, untrained = findings.head_control, findings.shuffled, findings.untrained
    return LossRecord(
        current=session.report.mean,
        composed=value,
        head_control=head.loss if head else None,
        shuffled=shuffled.loss if shuffled else None,
        untrained=untrained.loss if untrained else None,
        untrained_start=untrained.start if untrained else None,
        composed_gain=composed_gain,
        head_control_gain=_control_interval(head),
        shuffled_gain=_control_interval(shuffled),
        untrained_gain=_control_interval(untrained),
        dense=parts[0].irreducible if parts else None,
        price=parts[1] if parts else None,
        split=parts[0] if parts else None,
        without_blocks=findings.without_blocks,
        unigram=probe_unigram(session.probe, session.runner.model),
    )


def _interval(value: Paired | None) -> Interval | None:
    return None if value is None else value.interval()


def _control_interval(control: Control | None) -> Interval | None:
    return None if control is None else control.gain.interval()


def _probe_tokens(session: Session) -> int:
    return session.probe.fit.tokens + session.probe.select.tokens + session.probe.report.tokens


def _witness(session: Session, findings: Findings) -> dict[str, Tensor]:
    """Return what was found of all blocks together and of each alone, as it was evaluated."""
    out: dict[str, Tensor] = {}
    if findings.composed is not None:
        out.update(witness_tensors("composed", findings.composed, session.held))
    for refined in findings.alone.values():
        out.update(witness_tensors("alone", refined, session.held))
    for index, changes in findings.screened.items():
        if findings.bounded(index):
            out.update(dense_tensors("slope", changes))
    return out
