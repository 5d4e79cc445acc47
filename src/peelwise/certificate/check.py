"""Certificates of checks: the gain witnesses, each a factor on one layer, evaluated again."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from peelwise.certificate.base import (
    OwnText,
    Verification,
    begun,
    identity_words,
    load_tensors,
    other_model,
    read_probe,
    refused,
    witness_bytes,
)
from peelwise.certificate.own_text import Text, cut_like, gain_refused, own_margin
from peelwise.certificate.recheck import Recheck, check_finite
from peelwise.engine.factors import changes_of_factors
from peelwise.engine.opening import open_report
from peelwise.engine.session import ReportSession
from peelwise.errors import CertificateError
from peelwise.model.architectures import find_blocks
from peelwise.model.guard import untouched
from peelwise.records.check import CheckRecord, GainWitness
from peelwise.records.files import WITNESS_FILE, what_changed

_FOUND = "the model's loss, ablation of the named blocks, every gain witness and what the composed ones gain together"
_UNCHECKED = (
    "signals, scores and which blocks are unlike (run `peelwise check` again), cost, and that factors were not chosen "
    "on report"
)


def factor_tensors(record: CheckRecord) -> dict[str, torch.Tensor]:
    """Return the factors of the gain witnesses as they are stored, by the name of what they multiply."""
    return {name_of(witness): torch.tensor(witness.factor, dtype=torch.float64) for witness in record.gain_witnesses}


def name_of(witness: GainWitness) -> str:
    """Return what a gain witness is called in the witness file."""
    return f"factor/{witness.layer}" + ("" if witness.head is None else f".head.{witness.head}")


def verify_check(
    folder: Path, record: CheckRecord, model: nn.Module, *, text: Text | None = None, source: str | None = None
) -> Verification:
    """Recompute the loss, the ablations and the gain witnesses of a check on its own report part.

    Args:
        folder: the certificate.
        record: its record.
        model: the model it is about, in the dtype it was checked in; left untouched.
        text: also try the composed factors on this text, of which nothing may be in the certificate's probe.
        source: where the model was opened from.

    Raises:
        CertificateError: If the folder is no readable certificate, was made without text, or does not fit the model.
        ProbeError: If a text does not fit the model, or too little of it is fresh.
    """
    changed = what_changed(folder, record)
    if changed:
        return Verification("does not hold", changed)
    if record.probe is None or record.loss is None:
        raise CertificateError(
            f"{folder} was made without text, so there is nothing to recompute. Run peelwise check again instead."
        )
    stored = load_tensors(folder / WITNESS_FILE, witness_bytes(model))
    probe = read_probe(folder, record)
    about = begun(folder, record, probe, model, source)
    if not about.holds:
        return about
    wrong = next(_contradictions(record, stored), None)
    if wrong:
        return replace(about, status="does not hold", reason=wrong)
    own = None
    with untouched(model):
        recheck = _Recheck(record, open_report(model, find_blocks(model), probe.report), about.tolerance)
        recheck.run()
        wrong = recheck.wrong_number()
        if text is not None and not wrong:
            found = cut_like(text, probe, model)
            session = open_report(model, find_blocks(model), found.split)
            own = _on_own_text(record, session, text, about.tolerance, found.overlapping)
    wrong = wrong or refused(own)
    same, unknown = identity_words(record)
    return replace(
        about,
        status="does not hold" if wrong else "holds",
        reason=wrong or f"{len(recheck.checks)} numbers found again.",
        checks=tuple(recheck.checks),
        rechecked=(_FOUND, same),
        not_rechecked=(*unknown, _UNCHECKED),
        own=own,
    )


def scaled_model(folder: Path, record: CheckRecord, model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` with the composed factors in its weights.

    Raises:
        CertificateError: If the model is not the certified one, there is no composed factor, or a layer holds codes.
    """
    other = other_model(record.model, model)
    if other:
        raise CertificateError(f"This is not the same model: {other}")
    wrong = next(_contradictions(record, load_tensors(folder / WITNESS_FILE, witness_bytes(model))), None)
    if wrong:
        raise CertificateError(f"{folder} does not hold: {wrong}")
    if record.composed_loss is None:
        raise CertificateError("The check found no factor that gains, so there is nothing to apply.")
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for linear, change in changes_of_factors(_composed(record), find_blocks(changed)).items():
            if linear.low_bit:
                raise CertificateError(f"{linear.name} holds codes, which a factor cannot be merged into.")
            weight, bias = linear.weight(), linear.bias()  # views of the parameters
            width = weight.shape[1]
            weight.copy_(weight.float() + change[:, :width])
            if bias is not None:
                bias.copy_(bias.float() + change[:, width])
    return changed


class _Recheck(Recheck):
    """Recomputes the numbers of one check, in its order."""

    def __init__(self, record: CheckRecord, session: ReportSession, tolerance: float) -> None:
        super().__init__(session, tolerance)
        self.record = record

    def run(self) -> None:
        """Compare every number that was measured on report."""
        record, session = self.record, self.session
        report, blocks = session.report, session.runner.blocks
        assert record.loss is not None
        self.loss("loss", record.loss, report.losses)
        for block in record.blocks:
            if block.ablation is not None:
                without = session.losses_without(report, block.index)
                self.gain(f"{block.name} ablation", block.ablation, without, report.losses)
        for witness in record.gain_witnesses:
            losses = session.losses(report, changes_of_factors([witness], blocks), witness.block)
            self.gain(f"{witness.layer} x {witness.factor:g}", witness.gain, report.losses, losses)
        if record.composed_loss is not None:
            losses = session.losses(report, changes_of_factors(_composed(record), blocks))
            self.loss("composed_loss", record.composed_loss, losses)
            self.gain("composed_gain", record.composed_gain, report.losses, losses)


def _composed(record: CheckRecord) -> list[GainWitness]:
    return [witness for witness in record.gain_witnesses if witness.composed]


def _contradictions(record: CheckRecord, stored: dict[str, torch.Tensor]) -> Iterator[str]:
    """Yield, in words, where the record contradicts itself or its witness file."""
    said = factor_tensors(record)
    if len(said) != len(record.gain_witnesses) or said.keys() != stored.keys():
        yield "The witness file does not hold one factor for each gain witness of the record."
    for name, factor in said.items():
        if name in stored and not torch.equal(stored[name].double(), factor):
            yield f"{name}: {float(factor):g} is recorded, the witness file holds another factor."
    composed = _composed(record)
    if bool(composed) != (record.composed_loss is not None) or bool(composed) != (record.composed_gain is not None):
        yield "The record does not say what its composed factors gain together, or says it of none."
    sizes = {block.index: block.name for block in record.blocks}
    for witness in record.gain_witnesses:
        if not witness.layer.startswith(f"{sizes.get(witness.block)}."):
            yield f"{witness.layer[:80]} is not in block {witness.block}."
        if not math.isfinite(witness.factor):
            yield f"{witness.layer[:80]}: its factor is no finite number."
    for unlike in record.unlike or ():
        score = next((block.score for block in record.blocks if block.index == unlike.block), None)
        if score is None or score != unlike.score or score < record.threshold:
            yield f"Block {unlike.block} is named, and its score is not above the threshold."


def _on_own_text(
    record: CheckRecord, session: ReportSession, text: Text, tolerance: float, overlapping: int
) -> OwnText:
    """Return what the composed factors gain on a text that whoever made the check did not choose."""
    gain = None
    if record.composed_loss is not None:
        losses = session.losses(session.report, changes_of_factors(_composed(record), session.runner.blocks))
        check_finite("composed_gain", session.report.losses, losses)
        gain = session.gain(session.report.losses, losses).interval()
    margin = own_margin(record, session.report.mean, tolerance)
    wrong = gain_refused("factors gain", record.composed_gain, gain, (max(record.margin_nats, tolerance), margin))
    return OwnText(
        source=text.source,
        sequences=len(session.report.tokens),
        tokens=int(session.report.predicted),
        overlapping=overlapping,
        loss=session.report.mean,
        margin=margin,
        certified=record.composed_gain,
        found=gain,
        holds=wrong is None,
        reason=wrong or "On this text the factors do what was certified.",
    )
