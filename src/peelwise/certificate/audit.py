"""Certificates: write one, read one, check one against a model, merge its witness into a model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from peelwise.certificate.base import (
    WITNESS_FILE,
    Verification,
    load_tensors,
    not_as_certified,
    read_probe,
    tolerance_of,
)
from peelwise.certificate.recheck import Recheck
from peelwise.engine.opening import open_report
from peelwise.engine.session import Changes, ReportSession
from peelwise.engine.witness import changes_of, merge_
from peelwise.errors import CertificateError, FormatError
from peelwise.evidence.audit import contradictions
from peelwise.evidence.verdict import Evidence, judge
from peelwise.model.architectures import find_blocks
from peelwise.model.fingerprint import fingerprint
from peelwise.model.guard import untouched
from peelwise.model.layers import parameter_count
from peelwise.model.runner import MICRO_BATCH_TOKENS, Trace
from peelwise.probe.probe import Probe
from peelwise.records.audit import AuditRecord
from peelwise.records.files import read_record

_SELF = "that the record agrees with itself (intervals, gains and the losses beside them, margin, verdicts, conclusion)"
_BLOCKS = "every block's solo gain, marginal gain and ablation"
_UNCHECKED = (
    "the losses of the controls and of the head, energies and shares, rounds, cost, "
    "the quantisation gap of low-bit models, and whether the text is training text"
)


@dataclass(frozen=True)
class Certificate:
    """A certificate read from its folder."""

    record: AuditRecord
    witness: dict[str, Tensor]
    probe: Probe


def read_certificate(folder: Path) -> Certificate:
    """Read record, witness and probe.

    Raises:
        CertificateError: If a file is missing or damaged.
    """
    record = read_record(folder)
    return Certificate(record, load_tensors(folder / WITNESS_FILE), read_probe(folder, record))


def verify_certificate(
    folder: Path, model: nn.Module, *, full: bool = False, micro_batch_tokens: int = MICRO_BATCH_TOKENS
) -> Verification:
    """Recompute the certified losses from the folder's own witness and probe, and compare.

    Before that the files must be those that were written, the model and the probe those that were certified, and
    the record must not contradict its own numbers. The tolerance follows from the model, not from the record.

    Args:
        folder: the certificate.
        model: the model it is about, in the dtype it was audited in; left untouched.
        full: also recompute every block's solo gain, marginal gain and ablation (about as long as measuring them).
        micro_batch_tokens: tokens that go through the model at a time.
    """
    certificate = read_certificate(folder)
    record = certificate.record
    other = not_as_certified(folder, record, certificate.probe, model)
    if other is not None:
        return other
    tolerance = tolerance_of(model)
    wrong = next(_disagreements(certificate, model, tolerance), None)
    if wrong:
        return Verification("does not hold", wrong, tolerance=tolerance)
    with untouched(model):
        session = open_report(
            model, find_blocks(model), certificate.probe.report, micro_batch_tokens=micro_batch_tokens
        )
        recheck = _Recheck(certificate, session, tolerance)
        try:
            recheck.run(full=full)
        except FormatError as error:  # a witness that is not at the same bits proves nothing
            return Verification("does not hold", str(error), tolerance=tolerance)
        wrong = recheck.wrong_number() or (recheck.wrong_verdict() if full else None)
    losses = "the model's loss and, where there is one, the composed loss and its gain"
    return Verification(
        "does not hold" if wrong else "holds",
        wrong or f"{len(recheck.checks)} numbers found again.",
        tuple(recheck.checks),
        tolerance,
        rechecked=(losses, *([_BLOCKS, "the verdicts that follow from them"] if full else []), _SELF),
        not_rechecked=(*([] if full else [f"{_BLOCKS} (--full does)"]), _UNCHECKED),
    )


def merged_model(certificate: Certificate, model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` with the composed witness in its weights: added, or as the codes of low-bit layers.

    Raises:
        CertificateError: If the model is not the certified one, there is no composed witness, or a low-bit layer is of
        a
            kind that cannot be given other codes.
        FormatError: If the witness is not of the formats that low-bit layers hold.
    """
    if fingerprint(model) != certificate.record.model.fingerprint:
        raise CertificateError("The model's tensors are not those that were certified: not the same model.")
    changed = copy.deepcopy(model)
    if not merge_(certificate.witness, "composed", find_blocks(changed)):
        raise CertificateError("The certificate holds no composed witness: the audit found none, so nothing to apply.")
    return changed


def report_loss(model: nn.Module, certificate: Certificate) -> float:
    """Return the model's loss on the certificate's report part, nats per token."""
    with untouched(model):
        return open_report(model, find_blocks(model), certificate.probe.report).report.mean


class _Recheck(Recheck):
    """Recomputes the numbers of one audit, in its order."""

    def __init__(self, certificate: Certificate, session: ReportSession, tolerance: float) -> None:
        super().__init__(session, tolerance)
        self.record, self.witness = certificate.record, certificate.witness
        self.blocks = session.runner.blocks
        self.evidence = [Evidence() for _ in self.blocks]

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
        if full:
            self._alone()
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
        margins = [record.margin_nats + shift for shift in (0.0, -self.tolerance, self.tolerance)]
        judged = [judge(self.evidence, m, in_distribution=record.probe.in_distribution) for m in margins]
        for index, block in enumerate(record.blocks):
            if block.verdict not in {verdicts[index].colour for verdicts in judged}:
                follows = judged[0][index].colour
                return f"{block.name}: {block.verdict} was certified, {follows} follows from its numbers."
        return None


def _disagreements(certificate: Certificate, model: nn.Module, tolerance: float) -> Iterator[str]:
    """Yield, in words, what the record says of its probe, its model or itself that is not so."""
    record, probe = certificate.record, certificate.probe.record()
    facts: list[tuple[str, object, object]] = [
        (f"probe.{key}", getattr(record.probe, key), getattr(probe, key)) for key in type(probe).model_fields
    ]
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    facts.append(("model.dtype", record.model.dtype, dtype))
    facts.append(("model.parameters", record.model.parameters, parameter_count(model)))
    facts.append(("model.blocks", record.model.blocks, len(find_blocks(model))))
    for name, recorded, found in facts:
        if recorded != found:
            yield f"{name}: {recorded} was certified, {found} was found."
    yield from contradictions(record, tolerance)
