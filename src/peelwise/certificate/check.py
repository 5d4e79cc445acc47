"""Certificates of checks: the gain witnesses, each a factor on one layer, evaluated again."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from torch import nn

from peelwise.certificate.base import (
    LOSSES_HOLD,
    Check,
    OwnText,
    Verification,
    begun,
    blocks_of,
    identity_words,
    load_tensors,
    opened_words,
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
from peelwise.evidence.check import contradictions
from peelwise.evidence.unlike import RULE
from peelwise.model.guard import untouched
from peelwise.probe.examples import Loss
from peelwise.probe.probe import Probe
from peelwise.records.check import CheckRecord, GainWitness
from peelwise.records.files import WITNESS_FILE, what_changed
from peelwise.tasks.check.run import run_check
from peelwise.tasks.check.settings import CheckSettings

_FOUND = "the model's loss, ablation of the named blocks, every gain witness and what the composed ones gain together"
_ALL_FOUND = "every signal and score, which blocks are unlike and by which signals, and which factors there are"
_SELF = "that the record agrees with itself (intervals, gains and losses, margin, scores and the blocks they name)"
_UNCHECKED = "cost, and that factors were not chosen on report"
_AUTHORS = "the name, settings, versions, date and source that the record gives, and whether the text is training text"
# Other threads and machines: signals are of float32, and some count directions above a limit.
_OFF, _SCORE_OFF, _FACTOR_OFF = 0.02, 0.1, 0.1


def factor_tensors(record: CheckRecord) -> dict[str, torch.Tensor]:
    """Return the factors of the gain witnesses as they are stored, by the name of what they multiply."""
    return {name_of(witness): torch.tensor(witness.factor, dtype=torch.float64) for witness in record.gain_witnesses}


def name_of(witness: GainWitness) -> str:
    """Return what a gain witness is called in the witness file."""
    return f"factor/{witness.layer}" + ("" if witness.head is None else f".head.{witness.head}")


def verify_check(
    folder: Path,
    record: CheckRecord,
    model: nn.Module,
    *,
    full: bool = False,
    text: Text | None = None,
    source: str | None = None,
    loss: Loss | None = None,
) -> Verification:
    """Recompute the loss, the ablations and the gain witnesses of a check on its own report part.

    Args:
        folder: the certificate.
        record: its record.
        model: the model it is about, in the dtype it was checked in; left untouched.
        full: also make the whole check again, and compare signals, scores and the blocks that they name.
        text: also try the composed factors on this text, of which nothing may be in the certificate's probe.
        source: where the model was opened from.
        loss: of batches whose loss is a function, that function.

    Raises:
        CertificateError: If the folder is no readable certificate, does not fit the model, or was made without text and
            is not to be checked in full.
        ProbeError: If a text does not fit the model, or too little of it is fresh.
    """
    changed = what_changed(folder, record)
    if changed:
        return Verification("does not hold", changed)
    if record.probe is None or record.loss is None:
        return _without_text(folder, record, model, full=full, text=text, source=source)
    stored = load_tensors(folder / WITNESS_FILE, witness_bytes(model))
    probe = read_probe(folder, record, loss)
    about = begun(folder, record, probe, model, source)
    if not about.holds:
        return about
    wrong = next(_contradictions(record, stored), None)
    if wrong:
        return replace(about, status="does not hold", reason=wrong)
    own = None
    with untouched(model):
        recheck = _Recheck(record, open_report(model, blocks_of(record, model), probe.report), about.tolerance)
        recheck.run()
        wrong = recheck.wrong_number()
        if text is not None and not wrong:
            found = cut_like(text, probe, model)
            session = open_report(model, blocks_of(record, model), found.split)
            own = _on_own_text(record, session, text, about.tolerance, found.overlapping)
    wrong = wrong or refused(own)
    checks = recheck.checks
    whole = full and record.rule == RULE
    if whole and not wrong:
        again = _checked_again(record, probe, model)
        checks = [*checks, *_scores(record, again)]
        wrong = next(differences(record, again), None)
    same, unknown = identity_words(record)
    not_again = f"{_ALL_FOUND} ({_other_rule(record) if full else '--full does'})"
    return replace(
        about,
        status="does not hold" if wrong else "holds" if whole else LOSSES_HOLD,
        reason=wrong or f"{len(checks)} numbers found again.",
        checks=tuple(checks),
        rechecked=(_FOUND, same, *([_ALL_FOUND] if whole else []), _SELF),
        not_rechecked=(*unknown, *([] if whole else [not_again]), _UNCHECKED, _AUTHORS),
        own=own,
    )


def _other_rule(record: CheckRecord) -> str:
    return f"made by rule {record.rule} of an earlier version; this one has rule {RULE}: run peelwise check again"


def _without_text(
    folder: Path, record: CheckRecord, model: nn.Module, *, full: bool, text: Text | None, source: str | None
) -> Verification:
    """Make a check of weights alone again: there is nothing else to recompute."""
    if text is not None:
        raise CertificateError(f"{folder} was made without text, so it has no factors to try on one.")
    if not full:
        raise CertificateError(
            f"{folder} was made without text, so there is no loss to recompute. --full makes the check again."
        )
    if record.rule != RULE:
        raise CertificateError(f"{folder} cannot be made again: {_other_rule(record)}.")
    opened = opened_words(model, source)
    other = other_model(record.model, model)
    if other:
        return Verification("not the same model or data", other, model=opened)
    stored = load_tensors(folder / WITNESS_FILE, witness_bytes(model))
    wrong, checks = next(_contradictions(record, stored), None), tuple[Check, ...]()
    if not wrong:
        again = _checked_again(record, None, model)
        wrong, checks = next(differences(record, again), None), tuple(_scores(record, again))
    return Verification(
        "does not hold" if wrong else "holds",
        wrong or "Every signal and score was found again.",
        checks=checks,
        rechecked=(_ALL_FOUND, identity_words(record)[0], _SELF),
        not_rechecked=(_UNCHECKED, _AUTHORS),
        model=opened,
    )


def _checked_again(record: CheckRecord, probe: Probe | None, model: nn.Module) -> CheckRecord:
    """Check a model again as a record says that it was done."""
    said, usual = record.settings, CheckSettings()
    signals, most, micro = said.get("signals"), said.get("most_witnesses"), said.get("micro_batch_tokens")
    settings = CheckSettings(
        tuple(str(signals).split(",")) if signals else (),
        most if isinstance(most, int) else usual.most_witnesses,
        micro if isinstance(micro, int) and micro else usual.micro_batch_tokens,
        str(said["stack"]) if said.get("stack") is not None else None,
    )
    return run_check(model, probe, settings)


def _scores(record: CheckRecord, again: CheckRecord) -> Iterator[Check]:
    for said, found in zip(record.blocks, again.blocks, strict=True):
        if said.score is not None and found.score is not None:
            near = math.isclose(said.score, found.score, rel_tol=_OFF, abs_tol=_SCORE_OFF)
            yield Check(f"{said.name} score", said.score, found.score, near)


def differences(record: CheckRecord, again: CheckRecord) -> Iterator[str]:
    """Yield, in words, where a check made again is not the one that was certified."""
    for score in _scores(record, again):
        if not score.holds:
            yield f"{score.name}: {score.recorded:.3f} was certified, {score.found:.3f} was found."
    named = [[unlike.block for unlike in each.unlike or ()] for each in (record, again)]
    # A score within its tolerance of the limit may fall on either side of it elsewhere.
    sure = {b.index for b in again.blocks if b.score is not None and abs(b.score - again.threshold) > _SCORE_OFF}
    if (record.unlike is None) != (again.unlike is None) or sure & (set(named[0]) ^ set(named[1])):
        yield f"Blocks {named[0]} were certified as unlike their neighbours, {named[1]} were found."
    reasons = [
        {u.block: [(r.signal, r.part) for r in u.reasons[:1]] for u in each.unlike or ()} for each in (record, again)
    ]
    for block in reasons[0].keys() & reasons[1].keys():
        if reasons[0][block] != reasons[1][block]:
            yield f"Block {block} is not named by the signal that was certified."
    yield from _other_signals(record, again)
    factors = [{name_of(witness): witness.factor for witness in each.gain_witnesses} for each in (record, again)]
    for name in sorted(factors[0].keys() | factors[1].keys()):
        one, two = (each.get(name) for each in factors)
        if one is None or two is None or not math.isclose(one, two, abs_tol=_FACTOR_OFF):
            yield f"{name}: {_or_none(one)} was certified, {_or_none(two)} was found."


def _or_none(factor: float | None) -> str:
    return "no factor" if factor is None else f"{factor:g}"


def _other_signals(record: CheckRecord, again: CheckRecord) -> Iterator[str]:
    """Yield where a signal is another one, beyond what is nothing beside its usual size in this model."""
    usual: dict[str, list[float]] = {}
    for block in again.blocks:
        for name, value in block.signals.items():
            usual.setdefault(name, []).append(abs(value))
    for said, found in zip(record.blocks, again.blocks, strict=True):
        for name in sorted(said.signals.keys() | found.signals.keys()):
            one, two = said.signals.get(name), found.signals.get(name)
            near = one is not None and two is not None
            if not near or not math.isclose(one or 0, two or 0, rel_tol=_OFF, abs_tol=_OFF * median(usual[name])):
                yield f"{said.name} {name[:80]}: {one} was certified, {two} was found."


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
        for linear, change in changes_of_factors(_composed(record), blocks_of(record, changed)).items():
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
    yield from contradictions(record)
    said = factor_tensors(record)
    if len(said) != len(record.gain_witnesses) or said.keys() != stored.keys():
        yield "The witness file does not hold one factor for each gain witness of the record."
    for name, factor in said.items():
        if name in stored and not torch.equal(stored[name].double(), factor):
            yield f"{name}: {float(factor):g} is recorded, the witness file holds another factor."


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
