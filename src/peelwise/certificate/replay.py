"""Make the witness of a certificate again, from its fit and select parts alone, and compare.

Report decides nothing in an audit or a peel. So a witness that was fitted to it does not come out again, and an honest
one does: bit for bit with the same versions on the same kind of machine, else with the same gains.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peelwise.certificate.base import Replay, blocks_of
from peelwise.engine.provenance import versions
from peelwise.engine.session import ReportSession
from peelwise.engine.witness import changes_of
from peelwise.errors import CertificateError
from peelwise.probe.probe import Probe
from peelwise.records.audit import AuditRecord
from peelwise.records.base import Note, SealedRecord
from peelwise.records.options import Refine
from peelwise.records.peel import PeelRecord
from peelwise.tasks.audit.run import run_audit
from peelwise.tasks.audit.settings import AuditSettings
from peelwise.tasks.peel.run import run_peel
from peelwise.tasks.peel.settings import PeelSettings

_FOREVER = 1e9  # seconds: what ended by itself within its budget ends the same way without one


def audit_again(record: AuditRecord, probe: Probe, model: nn.Module) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Audit again as a record says that it was done; return the witness, and in words what it leaves out.

    An audit that ended early was cut by the clock. Its joint rounds are made again as many times as it has them; the
    rest is left out.

    Raises:
        CertificateError: If it ended before any joint round.
    """
    said = record.settings
    left_out: tuple[str, ...] = ()
    joint, solo = _number(said.get("joint_rounds")) or 0, _number(said.get("alone_rounds")) or 0
    factors = bool(record.rounds) and record.rounds[0].direction == "factors"
    if not record.complete:
        if not record.rounds:
            raise CertificateError("The audit ended early, before a joint round, so its witness cannot be made again.")
        joint, solo, left_out = len(record.rounds) - factors, 0, ("the blocks by themselves (the audit ended early)",)
    settings = AuditSettings(
        _FOREVER,
        joint,
        solo,
        controls=False,
        refine=_ask_again(record, model),
        micro_batch_tokens=_micro_batch(record, AuditSettings()),
        stack=str(said["stack"]) if said.get("stack") is not None else None,
    )
    return run_audit(model, probe, settings, factors=factors).witness, left_out


def peel_again(record: PeelRecord, probe: Probe, model: nn.Module) -> dict[str, Tensor]:
    """Peel again as a record says that it was done, and return the witness.

    Raises:
        CertificateError: If the clock decided about it, or its maps cannot be read.
    """
    if not record.complete or any(isinstance(n, Note) and n.code == "head-steps" for n in record.notes):
        raise CertificateError("The budget decided how far this peel went, so its witness cannot be made again.")
    said, usual = record.settings, PeelSettings()
    maps: Any = said.get("maps") or "auto"
    if maps != "auto":
        try:
            maps = json.loads(maps)
        except ValueError as error:
            raise CertificateError(f"settings.maps: {str(maps)[:80]!r} is no list of maps.") from error
    settings = PeelSettings(
        _FOREVER,
        maps,
        record.start,
        weighted=bool(said.get("weighted", usual.weighted)),
        rounds=_number(said.get("rounds")),
        steps=bool(said.get("steps", usual.steps)),
        dense_references=bool(said.get("dense_references")),
        beam_width=_number(said.get("beam_width")) or usual.beam_width,
        controls=False,
        micro_batch_tokens=_micro_batch(record, usual),
    )
    return run_peel(model, probe, settings).witness


def compared(
    record: SealedRecord,
    stored: Mapping[str, Tensor],
    made: Mapping[str, Tensor],
    gains: Iterator[tuple[str, float, float]],
    *,
    tolerance: float,
    left_out: tuple[str, ...] = (),
) -> Replay:
    """Compare the witness of a certificate with the one made again.

    Args:
        record: of the certificate.
        stored, made: the witnesses, of the same kinds.
        gains: name, certified and found again, nats per token; only asked for where tensors differ.
        tolerance: nats per token that these may differ by.
        left_out: in words, what was not made again.
    """
    differing = sorted(
        name
        for name in stored.keys() | made.keys()
        if name not in stored or name not in made or not torch.equal(stored[name], made[name])
    )
    if not differing:
        return Replay(len(stored), 0, left_out, reason=f"All {len(stored)} tensors come out again, bit for bit.")
    for name, certified, found in gains:
        if not abs(certified - found) <= tolerance:
            return Replay(
                len(stored),
                len(differing),
                left_out,
                holds=False,
                reason=f"Made again from fit and select, the witness differs ({differing[0]}), and {name} is "
                f"{found:.6f}, {certified:.6f} was certified{_elsewhere(record)}.",
            )
    return Replay(
        len(stored),
        len(differing),
        left_out,
        reason=f"{len(differing)} tensors come out again with other bits, and with the same gains within the tolerance"
        f"{_elsewhere(record)}.",
    )


def audit_gains(
    record: AuditRecord, made: dict[str, Tensor], session: ReportSession, *, blocks: bool
) -> Iterator[tuple[str, float, float]]:
    """Yield name, certified gain and that of a witness made again: of all blocks together, then of each by itself."""
    found = [("loss.composed_gain", record.loss.composed_gain, "composed", session.runner.blocks)]
    if blocks:
        found += [
            (f"{block.name} recoverable", said.recoverable_nats, "alone", (block,))
            for block, said in zip(session.runner.blocks, record.blocks, strict=True)
        ]
    for name, certified, kind, changed in found:
        if certified is None:
            continue
        losses = session.losses(session.report, changes_of(made, kind, changed))
        yield name, certified.mean, session.gain(session.report.losses, losses).mean


def _ask_again(record: AuditRecord, model: nn.Module) -> Refine:
    """Let training change the layers that the record has, and no other; the model is in the state of `untouched`.

    Which layers were frozen is in no file of the model.
    """
    linears = [linear for block in blocks_of(record, model) for linear in block.linears]
    asked = {f"{block.name}.{matrix.name}" for block in record.blocks for matrix in block.matrices}
    if not asked or all(linear.name in asked for linear in linears):
        return "all"
    # Those that are asked about last: experts share a parameter, of which some may have seen no token.
    for linear in sorted(linears, key=lambda linear: linear.name in asked):
        for parameter in linear.module.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(linear.name in asked)
    return "trainable"


def _micro_batch(record: SealedRecord, usual: AuditSettings | PeelSettings) -> int:
    return _number(record.settings.get("micro_batch_tokens")) or usual.micro_batch_tokens


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 1 else None


def _elsewhere(record: SealedRecord) -> str:
    """Say where versions or machine are others: what decides between two equally good steps may then, too."""
    here = versions()
    other = [f"{k} {v}, here {here[k]}" for k, v in record.versions.items() if k in here and here[k] != v]
    return f" (it was made with {'; '.join(other)})" if other else ""
