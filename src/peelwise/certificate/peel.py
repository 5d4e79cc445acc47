"""Check the certificate of a peel: rebuild the reference stack from the file and recompute its losses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from peelwise.certificate.base import (
    OwnText,
    Replay,
    Verification,
    begun,
    identity_words,
    load_tensors,
    read_probe,
    refused,
    tolerance_of,
    witness_bytes,
)
from peelwise.certificate.own_text import Text, cut_like, gain_refused, own_margin, require_witness
from peelwise.certificate.recheck import Recheck, check_finite
from peelwise.certificate.replay import compared, peel_again
from peelwise.engine.heads import head_rows
from peelwise.engine.opening import format_names, low_bit_layers, open_report
from peelwise.engine.session import ReportSession
from peelwise.engine.witness import CODED_PARTS, codes_of, moved_to
from peelwise.errors import CertificateError, FormatError
from peelwise.evidence.peel import contradictions
from peelwise.model.architectures import find_blocks
from peelwise.model.guard import untouched
from peelwise.model.layers import Block, unwrapped
from peelwise.model.trace import Trace
from peelwise.probe.probe import Probe
from peelwise.records.base import Interval
from peelwise.records.files import WITNESS_FILE, what_changed
from peelwise.records.peel import PeelRecord
from peelwise.tasks.peel.reference_block import EFFECTIVE, Codes, ReferenceBlock, State
from peelwise.tasks.peel.stack import Stack
from peelwise.tasks.peel.summary import BOUND_HEAD, CONTROL_HEAD, STACK

_LOSSES = "the losses of the model, of its head control and of the best map, and the gains between them"
_SELF = "that the record agrees with itself (intervals, gains and losses, margin, verdicts, conclusion)"
_UNCHECKED = (
    "the other maps, the null controls, what is lost without a station, cost, the name, settings, versions, date and "
    "source that the record gives, and whether the text is training text"
)


def verify_peel(
    folder: Path,
    record: PeelRecord,
    model: nn.Module,
    *,
    replay: bool = False,
    text: Text | None = None,
    source: str | None = None,
) -> Verification:
    """Recompute current, head control and bound on report from the folder's own witness and probe.

    Args:
        folder: the certificate.
        record: its record.
        model: the model it is about, in the dtype it was peeled in; left untouched.
        replay: also make the stack again from fit and select, and compare (as long as the peel took).
        text: also try the reference stack on this text, of which nothing may be in the certificate's probe.
        source: where the model was opened from.

    Raises:
        CertificateError: If the witness or the probe cannot be read, do not fit the model, or cannot be made again.
        ProbeError: If a text does not fit the model, or too little of it is fresh.
    """
    changed = what_changed(folder, record)
    if changed:
        return Verification("does not hold", changed)
    witness, probe = load_tensors(folder / WITNESS_FILE, witness_bytes(model)), read_probe(folder, record)
    about, formats = begun(folder, record, probe, model, source), record.reference_formats
    if not about.holds:
        return about
    wrong = next(contradictions(record), None)
    if wrong:
        return replace(about, status="does not hold", reason=wrong)
    own = again = None
    with untouched(model):
        recheck = _Recheck(record, witness, open_report(model, find_blocks(model), probe.report), about.tolerance)
        try:
            recheck.run()
            wrong = recheck.wrong_number()
            if text is not None and not wrong:
                require_witness(witness)
                own = on_own_text(record, witness, probe, model, text)
            if replay and not wrong:
                again = _replayed(record, witness, probe, recheck)
        except FormatError as error:  # references outside the formats that they are said to be of prove nothing
            return replace(about, status="does not hold", reason=str(error))
    wrong = wrong or refused(own, again)
    same, unknown = identity_words(record)
    return replace(
        about,
        status="does not hold" if wrong else "holds",
        reason=wrong or f"{len(recheck.checks)} numbers found again.",
        checks=tuple(recheck.checks),
        rechecked=(_LOSSES, same, *([f"that references are inside {formats}"] if formats else []), _SELF),
        not_rechecked=(*unknown, _UNCHECKED),
        own=own,
        replay=again,
    )


def _replayed(record: PeelRecord, witness: dict[str, Tensor], probe: Probe, recheck: _Recheck) -> Replay:
    session = recheck.session
    made = peel_again(record, probe, session.runner.model)

    def gains() -> Iterator[tuple[str, float, float]]:
        if record.loss.bound_gain is not None:
            bound = _Recheck(record, made, session, recheck.tolerance).bound()
            yield "loss.bound_gain", record.loss.bound_gain.mean, session.gain(session.report.losses, bound).mean

    return compared(record, witness, made, gains(), tolerance=recheck.tolerance)


def on_own_text(record: PeelRecord, witness: dict[str, Tensor], probe: Probe, model: nn.Module, text: Text) -> OwnText:
    """Return what the reference stack gains on a text, over the model or its head control, whichever is less."""
    found, tolerance = cut_like(text, probe, model), tolerance_of(model)
    session = open_report(model, find_blocks(model), found.split)
    gain = _Recheck(record, witness, session, tolerance).certified()
    margin = own_margin(record, session.report.mean, tolerance)
    least = max(record.margin_nats, tolerance), margin
    wrong = gain_refused("reference stack gains", record.loss.certified, gain, least)
    return OwnText(
        source=text.source,
        sequences=found.split.sequences,
        tokens=found.split.tokens,
        overlapping=found.overlapping,
        loss=session.report.mean,
        margin=margin,
        certified=record.loss.certified,
        found=gain,
        holds=wrong is None,
        reason=wrong or "The reference stack does on your text what was certified.",
    )


def reference_stack(
    witness: Mapping[str, Tensor], blocks: tuple[Block, ...], *, inside: bool = False
) -> list[ReferenceBlock]:
    """Return the reference blocks that a witness describes, one per block of the model.

    Args:
        witness: tensors by name.
        blocks: of the model.
        inside: whether low-bit maps must hold codes of their formats, strictly; else they may hold any weights.

    Raises:
        CertificateError: If the witness names a parameter that the blocks lack, or has another shape for it.
        FormatError: If codes are none of a map's format, or a map leaves the format that it should be inside.
    """
    left = {name.removeprefix(f"{STACK}/"): c for name, c in witness.items() if name.startswith(f"{STACK}/")}
    stack = []
    for block in blocks:
        codes = _stored_codes(witness, block, inside=inside)
        coded = {f"{name}.{part}" for name in codes for part in CODED_PARTS}
        left = {name: change for name, change in left.items() if name not in coded}
        own = {f"{block.name}.{name}": p.shape for name, p in unwrapped(block.module).named_parameters()}
        own |= {f"{m.name}.{EFFECTIVE}": m.weight().shape for m in block.linears if m.low_bit}
        changes = {name: left.pop(name) for name in own.keys() & left.keys()}
        for name, change in changes.items():
            if change.shape != own[name]:
                raise CertificateError(f"The witness for {name} is {tuple(change.shape)}, expected {tuple(own[name])}.")
        stack.append(ReferenceBlock(block, State(changes, codes)))
    if left:
        raise CertificateError(f"The witness names {next(iter(left))}, which the model's blocks do not have.")
    return stack


def _stored_codes(witness: Mapping[str, Tensor], block: Block, *, inside: bool) -> Codes:
    """Return the codes that a witness has for the low-bit maps of a block."""
    found: Codes = {}
    for linear, held in low_bit_layers((block,)).items():
        if inside and any(f"{STACK}/{linear.name}.{kind}" in witness for kind in ("weight", EFFECTIVE)):
            raise FormatError(
                f"{linear.name} holds {held.format.name}, and its reference is dense: not at the same bits."
            )
        encoded = codes_of(witness, STACK, linear, held)
        if encoded is not None:
            found[linear.name] = moved_to(encoded, held.weight.device)
    return found


class _Recheck(Recheck):
    """Recomputes the numbers of one peel."""

    def __init__(
        self, record: PeelRecord, witness: dict[str, Tensor], session: ReportSession, tolerance: float
    ) -> None:
        super().__init__(session, tolerance)
        self.record, self.witness = record, witness

    def run(self) -> None:
        loss, report = self.record.loss, self.session.report
        self.loss("loss.current", loss.current, report.losses)
        control = None
        if loss.head_control is not None:
            control = self._with_head(report, CONTROL_HEAD)
            self.loss("loss.head_control", loss.head_control, control)
            self.gain("loss.head_control_gain", loss.head_control_gain, report.losses, control)
        if loss.bound is not None:
            bound = self.bound()
            self.loss("loss.bound", loss.bound, bound)
            self.gain("loss.bound_gain", loss.bound_gain, report.losses, bound)
            if control is not None:
                self.gain("loss.over_head_control", loss.over_head_control, control, bound)

    def certified(self) -> Interval | None:
        """Return what the stack gains here, over the model or its head control, whichever is less."""
        loss, report = self.record.loss, self.session.report
        if loss.bound is None:
            return None
        bound, others = self.bound(), [report.losses]
        if loss.head_control is not None:
            others.append(self._with_head(report, CONTROL_HEAD))
        check_finite("loss.bound", bound, *others)
        return min((self.session.gain(other, bound).interval() for other in others), key=lambda gain: gain.low)

    def bound(self) -> Tensor:
        """Return the losses ``[sequences]`` of the stack with its head."""
        runner, formats = self.session.runner, self.record.reference_formats
        stack = Stack(runner, {"report": self.session.report})
        held = format_names(low_bit_layers(runner.blocks))
        if formats is not None and formats != held:
            raise FormatError(
                f"References are said to be inside {formats}; the model holds {held or 'no low-bit maps'}."
            )
        references = reference_stack(self.witness, runner.blocks, inside=formats is not None)
        for station, reference in zip(self.record.best_map or (), references, strict=True):
            stack.push(station, reference)
        trace = stack.traces["report"]
        if BOUND_HEAD not in self.witness:
            return self.session.losses(trace, start=len(runner.blocks))
        return self._with_head(trace, BOUND_HEAD)

    def _with_head(self, trace: Trace, name: str) -> Tensor:
        """Return the losses ``[sequences]`` of the last stations of ``trace`` under a stored head."""
        head = self.session.runner.head
        rows = head_rows(self.session.runner, trace) if name in self.witness else None
        if head is None or rows is None:
            raise CertificateError(f"The witness lacks {name}, or the model lacks the head that it changes.")
        weight = next(head.parameters())
        change = self.witness[name].float().to(weight.device)
        if change.shape != weight.shape:
            raise CertificateError(f"The witness for {name} is {tuple(change.shape)}, not the shape of the head.")
        return rows.per_sequence(rows.token_losses(change))
