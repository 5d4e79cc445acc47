"""Certificates: write one, read one, check one against a model, merge its witness into a model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from peelwise.certificate.base import (
    LOSSES_HOLD,
    OwnText,
    Replay,
    Status,
    Verification,
    begun,
    blocks_of,
    identity_words,
    load_tensors,
    not_as_certified,
    other_model,
    read_probe,
    refused,
    tolerance_of,
    unit_loss,
    witness_bytes,
)
from peelwise.certificate.own_text import Text, audit_on, require_witness
from peelwise.certificate.recheck import Recheck
from peelwise.certificate.replay import audit_again, audit_gains, compared
from peelwise.engine.baselines import probe_unigram
from peelwise.engine.opening import open_report
from peelwise.engine.session import Changes, ReportSession
from peelwise.engine.slopes import first_order_gains
from peelwise.engine.witness import changes_of, merge_
from peelwise.errors import CertificateError, FormatError
from peelwise.evidence.audit import contradictions
from peelwise.evidence.check import wrong_part
from peelwise.evidence.verdict import Evidence, judge
from peelwise.model.architectures import find_blocks
from peelwise.model.guard import untouched
from peelwise.model.layers import LinearLayer
from peelwise.model.runner import MICRO_BATCH_TOKENS
from peelwise.model.trace import Trace
from peelwise.probe.examples import Loss
from peelwise.probe.probe import Probe
from peelwise.records.audit import AuditRecord
from peelwise.records.files import WITNESS_FILE, read_record, what_changed

_SELF = "that the record agrees with itself (intervals, gains and the losses beside them, margin, verdicts, conclusion)"
_OWN, _AGAIN = "the witness on your text", "the witness, made again from fit and select"
_BLOCKS = "every block's solo gain, marginal gain and ablation"
_UNCHECKED = (
    "the losses of the controls and of the head, energies and shares, rounds, cost, "
    "the quantisation gap of low-bit models, scores of the check that it began with, and whether the text is training "
    "text"
)
_FITTED = "that the witness was not fitted on report (--text and --replay do)"
_AUTHORS = "the name, settings, versions, date and source that the record gives, and which layers are frozen"


@dataclass(frozen=True)
class Certificate:
    """A certificate read from its folder."""

    record: AuditRecord
    witness: dict[str, Tensor]
    probe: Probe


def read_certificate(folder: Path, model: nn.Module | None = None, loss: Loss | None = None) -> Certificate:
    """Read record, witness and probe.

    Args:
        folder: the certificate.
        model: if it is known, no witness is read that is larger than one for it can be.
        loss: of batches whose loss is a function, that function.

    Raises:
        CertificateError: If a file is missing or damaged.
    """
    record = read_record(folder)
    most = None if model is None else witness_bytes(model)
    return Certificate(record, load_tensors(folder / WITNESS_FILE, most), read_probe(folder, record, loss))


def verify_certificate(
    folder: Path,
    model: nn.Module,
    *,
    full: bool = False,
    replay: bool = False,
    text: Text | None = None,
    source: str | None = None,
    loss: Loss | None = None,
    micro_batch_tokens: int = MICRO_BATCH_TOKENS,
) -> Verification:
    """Recompute the certified losses from the folder's own witness and probe, and compare.

    Before that the files must be those that were written, the model and the probe those that were certified, and
    the record must not contradict its own numbers. The tolerance follows from the model, not from the record.

    Args:
        folder: the certificate.
        model: the model it is about, in the dtype it was audited in; left untouched.
        full: also recompute every block's solo gain, marginal gain and ablation (about as long as measuring them).
        replay: also make the witness again from fit and select, and compare (as long as the audit took).
        text: also try the witness on this text, of which nothing may be in the certificate's probe.
        source: where the model was opened from.
        loss: of batches whose loss is a function, that function.
        micro_batch_tokens: tokens that go through the model at a time.

    Raises:
        CertificateError: If the folder is no readable certificate, the witness does not fit the model, or it cannot be
            made again.
        ProbeError: If a text does not fit the model, or too little of it is fresh.
    """
    record = read_record(folder)
    changed = what_changed(folder, record)
    if changed:
        return Verification("does not hold", changed)
    certificate = read_certificate(folder, model, loss)
    about = begun(folder, record, certificate.probe, model, source)
    if not about.holds:
        return about
    wrong = next(_disagreements(certificate, model, about.tolerance), None)
    if wrong:
        return replace(about, status="does not hold", reason=wrong)
    own = again = None
    with untouched(model):
        report = certificate.probe.report
        session = open_report(model, blocks_of(record, model), report, micro_batch_tokens=micro_batch_tokens)
        recheck = _Recheck(certificate, session, about.tolerance)
        try:
            recheck.run(full=full)
            wrong = recheck.wrong_number() or (recheck.wrong_verdict() if full else None)
            if text is not None and not wrong:
                require_witness(certificate.witness)
                own = audit_on(record, certificate.witness, certificate.probe, model, text)
            if replay and not wrong:
                again = _replayed(certificate, session, model, about.tolerance)
        except FormatError as error:  # a witness that is not at the same bits proves nothing
            return replace(about, status="does not hold", reason=str(error))
    wrong = wrong or refused(own, again)
    rechecked, not_rechecked = _what_was_rechecked(record, own, again, full=full)
    measured = any(b.recoverable_nats or b.unique_nats or b.first_order_nats for b in record.blocks)
    held: Status = "holds" if full or own or not measured else LOSSES_HOLD
    return replace(
        about,
        status="does not hold" if wrong else held,
        reason=wrong or f"{len(recheck.checks)} numbers found again.",
        checks=tuple(recheck.checks),
        rechecked=rechecked,
        not_rechecked=not_rechecked,
        own=own,
        replay=again,
    )


def _what_was_rechecked(
    record: AuditRecord, own: OwnText | None, again: Replay | None, *, full: bool
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return in words what was established, and what still rests on the author's word."""
    same, unknown = identity_words(record)
    rechecked = (
        "the model's loss and, where there is one, the composed loss and its gain",
        same,
        *([_BLOCKS, "the verdicts that follow from them"] if full else []),
        _SELF,
        "names of blocks and layers, formats, sizes and dtype",
        *([_OWN] if own else []),
        *([_AGAIN] if again else []),
    )
    not_rechecked = (
        *([] if full else [f"{_BLOCKS} (--full does)"]),
        *unknown,
        *([] if own or again else [_FITTED]),
        _UNCHECKED,
        _AUTHORS,
    )
    return rechecked, not_rechecked


def _replayed(certificate: Certificate, session: ReportSession, model: nn.Module, tolerance: float) -> Replay:
    record = certificate.record
    made, left_out = audit_again(record, certificate.probe, model)
    stored = certificate.witness
    if left_out:
        stored, made = ({n: t for n, t in each.items() if n.startswith("composed/")} for each in (stored, made))
    gains = audit_gains(record, made, session, blocks=not left_out)
    return compared(record, stored, made, gains, tolerance=tolerance, left_out=left_out)


def check_certified(folder: Path, certificate: Certificate, model: nn.Module) -> None:
    """Refuse a certificate whose files, model, probe or own numbers are not as certified; without a forward pass.

    Raises:
        CertificateError: With what is not so.
    """
    other = not_as_certified(folder, certificate.record, certificate.probe, model)
    if other:
        raise CertificateError(f"{folder}: {other.status}: {other.reason}")
    wrong = next(_disagreements(certificate, model, tolerance_of(model, unit_loss(certificate.record))), None)
    if wrong:
        raise CertificateError(f"{folder} does not hold: {wrong}")


def merged_model(certificate: Certificate, model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` with the composed witness in its weights: added, or as the codes of low-bit layers.

    Raises:
        CertificateError: If the model is not the certified one, there is no composed witness, or a low-bit layer is of
            a kind that cannot be given other codes.
        FormatError: If the witness is not of the formats that low-bit layers hold.
    """
    other = other_model(certificate.record.model, model)
    if other:
        raise CertificateError(f"This is not the same model: {other}")
    changed = copy.deepcopy(model)
    if not merge_(certificate.witness, "composed", blocks_of(certificate.record, changed)):
        raise CertificateError("The certificate holds no composed witness: the audit found none, so nothing to apply.")
    return changed


def report_loss(model: nn.Module, probe: Probe) -> float:
    """Return the model's loss on a probe's report part, nats per token."""
    with untouched(model):
        return open_report(model, find_blocks(model), probe.report).report.mean


class _Recheck(Recheck):
    """Recomputes the numbers of one audit, in its order."""

    def __init__(self, certificate: Certificate, session: ReportSession, tolerance: float) -> None:
        super().__init__(session, tolerance)
        self.record, self.witness, self.probe = certificate.record, certificate.witness, certificate.probe
        self.blocks = session.runner.blocks
        self.evidence = [Evidence(frozen=block.frozen) for block in self.record.blocks]

    def run(self, *, full: bool) -> None:
        loss, session = self.record.loss, self.session
        report = session.report
        self.loss("loss.current", loss.current, report.losses)
        if loss.composed is not None:
            composed = changes_of(self.witness, "composed", self.blocks)
            after = session.refreshed(report, composed) if full else None
            losses = after.losses if after else session.losses(report, composed)
            self.loss("loss.composed", loss.composed, losses)
            self.gain("loss.composed_gain", loss.composed_gain, report.losses, losses)
            if after is not None:
                self._unique(composed, after)
        counted = probe_unigram(self.probe, session.runner.model)
        if loss.unigram is not None and counted is not None:
            self.compare("loss.unigram", loss.unigram, counted)
        if full:
            self._alone()
            self._first_order()
            self._removal()

    def _unique(self, composed: Changes, after: Trace) -> None:
        for block, recorded in zip(self.blocks, self.record.blocks, strict=True):
            if recorded.unique_nats is None:
                continue
            others = {m: c for m, c in composed.items() if m not in set(block.linears)}
            losses = self.session.losses(after, others, block.index)
            found = self.gain(f"{block.name} unique", recorded.unique_nats, losses, after.losses)
            self.evidence[block.index] = replace(self.evidence[block.index], unique=found)

    def _alone(self) -> None:
        report = self.session.report
        for block, recorded in zip(self.blocks, self.record.blocks, strict=True):
            if recorded.recoverable_nats is None:
                continue
            losses = self.session.losses(report, changes_of(self.witness, "alone", (block,)), block.index)
            found = self.gain(f"{block.name} recoverable", recorded.recoverable_nats, report.losses, losses)
            self.evidence[block.index] = replace(self.evidence[block.index], alone=found)

    def _first_order(self) -> None:
        session, blocks = self.session, self.blocks
        said = {b.index: b.first_order_nats for b in self.record.blocks if b.first_order_nats is not None}
        changes = {index: changes_of(self.witness, "slope", (blocks[index],)) for index in said}
        gained = first_order_gains(session, session.report, changes)
        for index, interval in said.items():
            nothing = torch.zeros_like(session.report.losses)
            found = self.gain(f"{blocks[index].name} first-order bound", interval, gained.get(index, nothing), nothing)
            self.evidence[index] = replace(self.evidence[index], bound=found)

    def _removal(self) -> None:
        report = self.session.report
        for block, recorded in zip(self.blocks, self.record.blocks, strict=True):
            if recorded.removal_nats is not None:
                losses = self.session.losses_without(report, block.index)
                self.gain(f"{block.name} removal", recorded.removal_nats, losses, report.losses)

    def wrong_verdict(self) -> str | None:
        """Return which block's colour does not follow from the numbers found, or ``None``; after a full run."""
        record = self.record
        # A number within the tolerance of the margin may fall on either side of it elsewhere.
        # But a gain within the tolerance of nothing is no evidence, whatever the margin is.
        margins = [max(record.margin_nats + shift, self.tolerance) for shift in (0.0, -self.tolerance, self.tolerance)]
        judged = [
            judge(self.evidence, m, in_distribution=record.probe.in_distribution, rule=record.rule) for m in margins
        ]
        for index, block in enumerate(record.blocks):
            if block.verdict not in {verdicts[index].colour for verdicts in judged}:
                follows = judged[0][index].colour
                return f"{block.name}: {block.verdict} was certified, {follows} follows from its numbers."
        return None


def _disagreements(certificate: Certificate, model: nn.Module, tolerance: float) -> Iterator[str]:
    """Yield, in words, what the record says of its probe, its model or itself that is not so."""
    record, blocks = certificate.record, blocks_of(certificate.record, model)
    yield from contradictions(record, tolerance)
    if record.check is not None:
        yield from wrong_part(record.check, record.model.blocks)
    linears = {linear.name: linear for block in blocks for linear in block.linears}
    for said in record.blocks:
        for matrix in said.matrices:
            linear = linears.get(f"{said.name}.{matrix.name}")
            if linear is None:
                yield f"{said.name}: the model has no linear layer {matrix.name}."
            elif matrix.format is not None and matrix.format != _format_of(linear):
                yield f"{linear.name}: {matrix.format} was certified, {_format_of(linear) or 'no format'} was found."
    kinds: dict[str, set[str]] = {"composed": set(), "alone": set(), "slope": set()}
    for name in certificate.witness:
        kind, _, rest = name.partition("/")
        owner = next((n for n in (rest, rest.rpartition(".")[0]) if n in linears), None)
        if kind not in kinds or owner is None:
            yield f"The witness names {name}, which the model does not have."
        else:
            kinds[kind].add(owner)
    if kinds["composed"] and record.loss.composed is None:
        yield "The witness changes all blocks together, and the record does not say what that gains."
    every = set().union(*kinds.values())
    for recorded, block in zip(record.blocks, blocks, strict=True):
        has = any(linear.name in kinds["alone"] for linear in block.linears)
        if recorded.frozen and any(linear.name in every for linear in block.linears):
            yield f"{block.name}: it is said to be frozen, and the witness has weights for it."
        if has and recorded.recoverable_nats is None:
            yield f"{block.name}: the witness has weights for it, and the record does not say what they gain."
        if any(linear.name in kinds["slope"] for linear in block.linears) != (recorded.first_order_nats is not None):
            yield f"{block.name}: a first-order bound and the direction that it is of stand together or not at all."


def _format_of(linear: LinearLayer) -> str | None:
    held = linear.held() if linear.low_bit else None
    return None if held is None else held.format.name
