"""Certificates: write one, read one, check one against a model, merge its witness into a model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from peelwise.certificate.base import (
    PROBE_FILE,
    WITNESS_FILE,
    Check,
    Verification,
    load_tensors,
    tolerance_of,
    what_changed,
)
from peelwise.engine.session import Changes, gain
from peelwise.engine.witness import changes_of, merge_
from peelwise.errors import CertificateError, FormatError
from peelwise.evidence.audit import contradictions
from peelwise.evidence.intervals import Paired
from peelwise.evidence.verdict import Evidence, judge
from peelwise.model.architectures import find_blocks
from peelwise.model.fingerprint import fingerprint
from peelwise.model.guard import untouched
from peelwise.model.layers import parameter_count
from peelwise.model.runner import MICRO_BATCH_TOKENS, Runner, Trace
from peelwise.model.splice import spliced
from peelwise.probe.probe import Probe
from peelwise.records.audit import AuditRecord
from peelwise.records.base import Interval
from peelwise.records.files import read_record

_SELF = "that the record agrees with itself (intervals, gains and the losses beside them, margin, verdicts, conclusion)"
_BLOCKS = "every block's recoverable and unique loss, and the loss without it"
_UNCHECKED = (
    "the losses of the controls and of the head, energies and shares, rounds, cost, "
    "the price of precision of low-bit models, and whether the text is training text"
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
    probe = Probe.from_tensors(
        load_tensors(folder / PROBE_FILE),
        source=record.probe.source,
        in_distribution=record.probe.in_distribution,
        seed=record.seed,
    )
    return Certificate(record, load_tensors(folder / WITNESS_FILE), probe)


def verify_certificate(
    folder: Path, model: nn.Module, *, full: bool = False, micro_batch_tokens: int = MICRO_BATCH_TOKENS
) -> Verification:
    """Recompute the certified losses from the folder's own witness and probe, and compare.

    Before that the files must be those that were written, the model and the probe those that were certified, and
    the record must not contradict its own numbers. The tolerance follows from the model, not from the record.

    Args:
        folder: the certificate.
        model: the model it is about, in the number format it was audited in; left untouched.
        full: also recompute every block's recoverable and unique loss (about as long as measuring them).
        micro_batch_tokens: tokens that go through the model at a time.
    """
    certificate = read_certificate(folder)
    record = certificate.record
    changed = what_changed(folder, record)
    if changed:
        return Verification("does not hold", changed)
    if certificate.probe.fingerprint != record.probe.fingerprint:
        return Verification("not the same model or data", f"{PROBE_FILE} is not the probe that was certified.")
    if fingerprint(model) != record.model.fingerprint:
        return Verification("not the same model or data", "The model's tensors are not those that were certified.")
    tolerance = tolerance_of(model)
    wrong = next(_disagreements(certificate, model, tolerance), None)
    if wrong:
        return Verification("does not hold", wrong, tolerance=tolerance)
    with untouched(model):
        runner = Runner(model, find_blocks(model), micro_batch_tokens=micro_batch_tokens)
        recheck = _Recheck(certificate, runner, tolerance)
        try:
            checks = recheck.run(full=full)
        except FormatError as error:  # a witness that is not at the same bits proves nothing
            return Verification("does not hold", str(error), tolerance=tolerance)
        wrong = recheck.wrong_number() or (recheck.wrong_verdict() if full else None)
    losses = "the model's loss and, where there is one, the composed loss and its gain"
    return Verification(
        "does not hold" if wrong else "holds",
        wrong or f"{len(checks)} numbers found again.",
        checks,
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
        return Runner(model, find_blocks(model)).trace(certificate.probe.report).mean


class _Recheck:
    """Recomputes the numbers of one certificate, in the order of the audit."""

    def __init__(self, certificate: Certificate, runner: Runner, tolerance: float) -> None:
        self.record = certificate.record
        self.witness = certificate.witness
        self.runner, self.blocks = runner, runner.blocks
        self.tolerance = tolerance
        self.trace: Trace = self.runner.trace(certificate.probe.report)
        self.checks: list[Check] = []
        self.evidence = [Evidence() for _ in self.blocks]

    def run(self, *, full: bool) -> tuple[Check, ...]:
        loss = self.record.loss
        self._compare("loss.current", loss.current, self.trace.mean)
        if loss.composed is not None:
            composed = changes_of(self.witness, "composed", self.blocks)
            with spliced(composed):
                after = self.runner.refreshed(self.trace) if full else None
                losses = after.losses if after else self.runner.losses_from(self.trace, 0)
            self._compare("loss.composed", loss.composed, float(losses.sum() / self.trace.tokens.sum()))
            self._interval("loss.composed_gain", loss.composed_gain, self._gain(self.trace.losses, losses))
            if after is not None:
                self._unique(composed, after)
        if full:
            self._alone()
            self._removal()
        return tuple(self.checks)

    def _unique(self, composed: Changes, after: Trace) -> None:
        for block, recorded in zip(self.blocks, self.record.blocks, strict=True):
            if recorded.unique_nats is None:
                continue
            with spliced({m: c for m, c in composed.items() if m not in set(block.linears)}):
                losses = self.runner.losses_from(after, block.index)
            found = self._gain(losses, after.losses)
            self._interval(f"{block.name} unique", recorded.unique_nats, found)
            self.evidence[block.index] = replace(self.evidence[block.index], unique=found)

    def _alone(self) -> None:
        for block, recorded in zip(self.blocks, self.record.blocks, strict=True):
            if recorded.recoverable_nats is None:
                continue
            with spliced(changes_of(self.witness, "alone", (block,))):
                losses = self.runner.losses_from(self.trace, block.index)
            found = self._gain(self.trace.losses, losses)
            self._interval(f"{block.name} recoverable", recorded.recoverable_nats, found)
            self.evidence[block.index] = replace(self.evidence[block.index], alone=found)

    def _removal(self) -> None:
        for block, recorded in zip(self.blocks, self.record.blocks, strict=True):
            if recorded.removal_nats is not None:
                losses = self.runner.losses_without(self.trace, block.index)
                found = self._gain(losses, self.trace.losses)
                self._interval(f"{block.name} removal", recorded.removal_nats, found)

    def wrong_number(self) -> str | None:
        """Return which number was not found again, or ``None``."""
        failed = next((c for c in self.checks if not c.holds), None)
        return (
            None
            if failed is None
            else f"{failed.name}: {failed.recorded:.6f} was certified, {failed.found:.6f} was found."
        )

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

    def _gain(self, before: Tensor, after: Tensor) -> Paired:
        return gain(before, after, self.trace)

    def _interval(self, name: str, recorded: Interval | None, found: Paired) -> None:
        if recorded is not None:
            again = found.interval()
            for part in ("mean", "low", "high"):
                self._compare(f"{name}.{part}", getattr(recorded, part), getattr(again, part))

    def _compare(self, name: str, recorded: float, found: float) -> None:
        self.checks.append(Check(name, recorded, found, abs(recorded - found) <= self.tolerance))


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
