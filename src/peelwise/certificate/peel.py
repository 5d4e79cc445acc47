"""Check the certificate of a peel: rebuild the reference stack from the file and recompute its losses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
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
from peelwise.engine.heads import per_sequence
from peelwise.engine.opening import format_names, low_bit_layers
from peelwise.engine.session import gain
from peelwise.engine.witness import CODED_PARTS, codes_of, moved_to
from peelwise.errors import CertificateError, FormatError
from peelwise.evidence.intervals import Paired
from peelwise.evidence.peel import contradictions
from peelwise.model.architectures import find_blocks
from peelwise.model.fingerprint import fingerprint
from peelwise.model.guard import untouched
from peelwise.model.layers import Block, unwrapped
from peelwise.model.runner import Runner, Trace
from peelwise.probe.probe import Probe
from peelwise.records.base import Interval
from peelwise.records.peel import PeelRecord
from peelwise.references.head import token_cross_entropy
from peelwise.tasks.peel.reference_block import EFFECTIVE, Codes, ReferenceBlock, State
from peelwise.tasks.peel.stack import Stack
from peelwise.tasks.peel.summary import BOUND_HEAD, CONTROL_HEAD, STACK

_LOSSES = "the losses of the model, of its head control and of the best map, and the gains between them"
_SELF = "that the record agrees with itself (intervals, gains and losses, margin, verdicts, conclusion)"
_UNCHECKED = (
    "the other maps, the null controls, what is lost without a station, cost, and whether the text is training text"
)


def verify_peel(folder: Path, record: PeelRecord, model: nn.Module) -> Verification:
    """Recompute current, head control and bound on report from the folder's own witness and probe.

    Args:
        folder: the certificate.
        record: its record.
        model: the model it is about, in the number format it was peeled in; left untouched.

    Raises:
        CertificateError: If the witness or the probe cannot be read, or do not fit the model.
    """
    witness, probe = load_tensors(folder / WITNESS_FILE), _probe(folder, record)
    changed = what_changed(folder, record)
    if changed:
        return Verification("does not hold", changed)
    if probe.fingerprint != record.probe.fingerprint:
        return Verification("not the same model or data", f"{PROBE_FILE} is not the probe that was certified.")
    if fingerprint(model) != record.model.fingerprint:
        return Verification("not the same model or data", "The model's tensors are not those that were certified.")
    tolerance, formats = tolerance_of(model), record.reference_formats
    wrong = next(contradictions(record), None)
    if wrong:
        return Verification("does not hold", wrong, tolerance=tolerance)
    with untouched(model):
        try:
            checks = _Recheck(record, witness, probe, model, tolerance).run()
        except FormatError as error:  # references outside the formats that they are said to be of prove nothing
            return Verification("does not hold", str(error), tolerance=tolerance)
    differing = [check for check in checks if not check.holds]
    if differing:
        first = differing[0]
        wrong = f"{first.name}: {first.recorded:.6f} was certified, {first.found:.6f} was found."
    return Verification(
        "does not hold" if wrong else "holds",
        wrong or f"{len(checks)} numbers found again.",
        checks,
        tolerance,
        rechecked=(_LOSSES, *([f"that references are inside {formats}"] if formats else []), _SELF),
        not_rechecked=(_UNCHECKED,),
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


class _Recheck:
    """Recomputes the numbers of one certificate."""

    def __init__(
        self, record: PeelRecord, witness: dict[str, Tensor], probe: Probe, model: nn.Module, tolerance: float
    ) -> None:
        self.record, self.witness, self.tolerance = record, witness, tolerance
        self.runner = Runner(model, find_blocks(model))
        self.trace = self.runner.trace(probe.report)
        self.checks: list[Check] = []

    def run(self) -> tuple[Check, ...]:
        loss = self.record.loss
        current, control, bound = self.trace.losses, None, None
        self._loss("loss.current", loss.current, current)
        if loss.head_control is not None:
            control = self._with_head(self.trace, CONTROL_HEAD)
            self._loss("loss.head_control", loss.head_control, control)
            self._interval("loss.head_control_gain", loss.head_control_gain, current, control)
        if loss.bound is not None:
            bound = self._bound()
            self._loss("loss.bound", loss.bound, bound)
            self._interval("loss.bound_gain", loss.bound_gain, current, bound)
            if control is not None:
                self._interval("loss.over_head_control", loss.over_head_control, control, bound)
        return tuple(self.checks)

    def _bound(self) -> Tensor:
        """Return the losses ``[sequences]`` of the stack with its head."""
        stack = Stack(self.runner, {"report": self.trace})
        formats = self.record.reference_formats
        held = format_names(low_bit_layers(self.runner.blocks))
        if formats is not None and formats != held:
            raise FormatError(
                f"References are said to be inside {formats}; the model holds {held or 'no low-bit maps'}."
            )
        references = reference_stack(self.witness, self.runner.blocks, inside=formats is not None)
        for station, reference in zip(self.record.best_map or (), references, strict=True):
            stack.push(station, reference)
        trace = stack.traces["report"]
        if BOUND_HEAD not in self.witness:
            return self.runner.losses_from(trace, len(self.runner.blocks))
        return self._with_head(trace, BOUND_HEAD)

    @torch.no_grad()
    def _with_head(self, trace: Trace, name: str) -> Tensor:
        """Return the losses ``[sequences]`` of the last stations of ``trace`` under a stored head."""
        head = self.runner.head
        if head is None or name not in self.witness:
            raise CertificateError(f"The witness lacks {name}, or the model lacks the head that it changes.")
        x, y, agree = self.runner.head_inputs(trace)
        weight = next(head.parameters())
        change = self.witness[name].float().to(weight.device)
        if not bool(agree) or change.shape != weight.shape:
            raise CertificateError(f"The witness for {name} is {tuple(change.shape)}, not the shape of the head.")
        tokens = token_cross_entropy(x, y, lambda rows: head(rows.to(weight.dtype)), change)
        return per_sequence(tokens, trace)

    def _loss(self, name: str, recorded: float, found: Tensor) -> None:
        self._compare(name, recorded, float(found.sum() / self.trace.tokens.sum()))

    def _interval(self, name: str, recorded: Interval | None, before: Tensor, after: Tensor) -> None:
        if recorded is not None:
            found: Paired = gain(before, after, self.trace)
            again = found.interval()
            for part in ("mean", "low", "high"):
                self._compare(f"{name}.{part}", getattr(recorded, part), getattr(again, part))

    def _compare(self, name: str, recorded: float, found: float) -> None:
        self.checks.append(Check(name, recorded, found, abs(recorded - found) <= self.tolerance))


def _probe(folder: Path, record: PeelRecord) -> Probe:
    return Probe.from_tensors(
        load_tensors(folder / PROBE_FILE),
        source=record.probe.source,
        in_distribution=record.probe.in_distribution,
        seed=record.seed,
    )
