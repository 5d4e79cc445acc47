"""Audit one model at one moment: every arrow of the design is one call here."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from peelwise.distributed.processes import ONE_PROCESS, Processes, check_same
from peelwise.engine.clock import Watcher
from peelwise.engine.opening import check_dense, checked_blocks, format_names, open_session
from peelwise.engine.permute import shuffled_targets
from peelwise.engine.provenance import identified
from peelwise.engine.session import Session
from peelwise.errors import IllConditionedWarning
from peelwise.model.guard import untouched
from peelwise.model.splice import frozen
from peelwise.probe.probe import Probe
from peelwise.records.audit import AuditRecord
from peelwise.records.base import Note, note
from peelwise.tasks.audit import controls, stages
from peelwise.tasks.audit.findings import Findings
from peelwise.tasks.audit.settings import AuditSettings
from peelwise.tasks.audit.summary import summarise

# Stages are cut short so that the next ones get their turn: no further joint round and no untrained control is begun
# after these parts of the budget; leaving one out gets a part of what is left, the head one of the whole.
_LOOK_SHARE = 0.25
_REMOVAL_SHARE, _JOINT_SHARE, _CONTROL_SHARE, _UNIQUE_SHARE, _HEAD_SHARE = 0.1, 0.4, 0.8, 0.6, 0.02
_UNIQUE_SHARE_ELSEWHERE = 0.9  # on text that is not training text leaving one out decides


@dataclass(frozen=True)
class AuditOutcome:
    """The record of an audit and the tensors that prove it, by name of the witness file."""

    record: AuditRecord
    witness: dict[str, Tensor]
    probe: Probe


def run_audit(
    model: nn.Module,
    probe: Probe,
    settings: AuditSettings,
    *,
    name: str = "model",
    source: str | None = None,
    watcher: Watcher | None = None,
    notes: Sequence[Note] = (),
    factors: bool = True,
    processes: Processes = ONE_PROCESS,
) -> AuditOutcome:
    """Audit ``model`` on ``probe`` and leave the model exactly as it was.

    Ctrl-C ends the audit early with what was finished, once the model's own losses are known.

    Several processes share sequences and solves, go by the clock of the first, and return the same: its record, with
    its time and memory.

    Args:
        model: a language model, or of batches any whose blocks feed each other; see `find_blocks`. Spread over the
            processes (``fully_shard``) or whole in each of them.
        probe: the text or batches, split in three.
        settings: budget and limits.
        name: the model's name in the record.
        source: where it was opened from, for ``verify``.
        watcher: told about progress.
        notes: what is known of the model already.
        factors: whether joint rounds begin with factors on blocks unlike their neighbours, where one helps.
        processes: those that share the work; each calls this with the same model, probe and settings.

    Raises:
        OptionError: If processes hold different models, probes or settings.
        OtherProcessError: If another process failed.
        UnsupportedModelError: If the architecture cannot be audited.
        ModelError: If the model holds NaN or Inf, or its loss is not finite.
        ProbeError: If the probe's tokens do not fit the model's vocabulary, or its sequences the context.
    """
    with processes.agreeing():
        blocks = checked_blocks(
            model, probe, settings.refine, batches=True, stack=settings.stack, shared=True, spread=True
        )
        check_dense(blocks)
        setup = identified(model, blocks, name, source, settings.plain(), seed=probe.seed, processes=processes)
        check_same(processes, (setup.identity.fingerprint, probe.fingerprint, probe.in_distribution, setup.settings))
        linears = [linear for block in blocks for linear in block.linears]
        with untouched(model), frozen(linears), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", IllConditionedWarning)
            with processes.interruptible():
                session = open_session(
                    model,
                    blocks,
                    probe,
                    name=name,
                    budget_seconds=settings.budget_seconds,
                    micro_batch_tokens=settings.micro_batch_tokens,
                    watcher=watcher,
                    processes=processes,
                )
                findings = Findings(notes=[*notes, *session.notes])
                if session.held:
                    findings.notes.append(note("low-bit", layers=len(session.held), formats=format_names(session.held)))
                try:
                    findings.complete = _stages(session, findings, settings, factors=factors)
                except KeyboardInterrupt:
                    findings.notes.append(note("stopped"))
            record, witness = summarise(session, findings, setup, settings.margin)
        record = processes.broadcast(_with_warnings(record, caught))
    return AuditOutcome(record, witness, probe)


def _stages(session: Session, findings: Findings, settings: AuditSettings, *, factors: bool) -> bool:
    """Run the stages in the order of what they are worth; return whether all of them ended by themselves."""
    null = None
    if settings.controls:
        null = shuffled_targets(session.fit, session.seed, shift_first=True, processes=session.runner.processes)
    complete = stages.look_over_depth(session, findings, share=_LOOK_SHARE)
    if factors and settings.joint_rounds:
        stages.begin_with_factors(session, findings)
    complete &= stages.first_sweep(session, findings, null=null)
    taken_out = stages.take_out(session, findings, share=_REMOVAL_SHARE)
    complete &= stages.joint_rounds(session, findings, rounds=settings.joint_rounds, share=_JOINT_SHARE)
    share = _UNIQUE_SHARE if session.probe.in_distribution else _UNIQUE_SHARE_ELSEWHERE
    complete &= stages.leave_one_out(session, findings, share=share)
    _shuffled(session, findings)
    if settings.controls:
        clock = session.clock
        affordable = clock.elapsed < _CONTROL_SHARE * clock.budget
        if affordable:
            _untrained(session, findings)
        if session.probe.examples is None:
            _head(session, findings)
        complete &= affordable
    if not (taken_out or session.probe.in_distribution):  # there, solo gains come before
        taken_out = stages.take_out(session, findings, share=1.0)
    complete &= stages.refine_alone(session, findings, rounds=settings.solo_rounds) and taken_out
    if not complete:
        findings.notes.append(note("budget-ended"))
    return complete


def _shuffled(session: Session, findings: Findings) -> None:
    proposals, findings.shuffled_proposals = findings.shuffled_proposals, None
    if proposals:
        findings.shuffled = controls.shuffled_control(session, proposals)


def _untrained(session: Session, findings: Findings) -> None:
    findings.untrained = controls.untrained_control(session)
    if findings.untrained is None:
        findings.notes.append(note("not-initialised"))


def _head(session: Session, findings: Findings) -> None:
    found = controls.head_reference(session, share=_HEAD_SHARE)
    if found is None:
        findings.notes.append(note("no-head" if session.runner.head is None else "logits-changed"))
    else:
        findings.head, findings.head_control = found
    findings.without_blocks = controls.embedding_baseline(session, share=_HEAD_SHARE)


def _with_warnings(record: AuditRecord, caught: list[warnings.WarningMessage]) -> AuditRecord:
    """Put warnings of ill-conditioned sums into the record's notes once, and hand on all others."""
    own: dict[str, IllConditionedWarning] = {}  # each round may find the same again
    for warning in caught:
        if isinstance(warning.message, IllConditionedWarning):
            own.setdefault(str(warning.message), warning.message)
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    if not own:
        return record
    first = next(iter(own.values()))
    more = {"more": len(own) - 1} if len(own) > 1 else {}
    return record.model_copy(update={"notes": (*record.notes, Note(code=first.code, values=first.values | more))})
