"""Certificates of comparisons: OLD is the witness, and its parts are put back into NEW again."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from peelwise.certificate.base import (
    OwnBlock,
    OwnText,
    Verification,
    identity_words,
    load_tensors,
    not_as_certified,
    opened_words,
    other_model,
    read_probe,
    refused,
    split_words,
    tolerance_of,
    unit_loss,
)
from peelwise.certificate.compare_claims import (
    all_numbers,
    contradictions,
    first_wrong,
    name_of,
    other_codes,
    said_of,
)
from peelwise.certificate.own_text import Text, cut_like, own_margin
from peelwise.certificate.recheck import Recheck, check_finite
from peelwise.engine.clock import Clock
from peelwise.engine.session import LOSSES, ReportSession
from peelwise.errors import CertificateError
from peelwise.evidence.compare import effects_of, is_changed
from peelwise.model.architectures import find_blocks
from peelwise.model.guard import untouched
from peelwise.model.runner import Runner
from peelwise.probe.examples import Loss
from peelwise.probe.probe import Probe
from peelwise.probe.rows import Split
from peelwise.records.base import Interval
from peelwise.records.compare import BlockChange, CompareRecord
from peelwise.records.files import HEADER_BYTES, WITNESS_FILE, what_changed
from peelwise.tasks.compare.measures import Measured, Pair, measure_layers, measure_repairs, parts_of
from peelwise.tasks.compare.mended import measure_mended, mended_parts, part_sha256, parts_to_mend, put_back
from peelwise.tasks.compare.outputs import block_outputs, end_outputs, of_end
from peelwise.tasks.compare.run import Candidate, check_two, opened_side, run_compare
from peelwise.tasks.compare.settings import CompareSettings

_ENDLESS_HOURS = 1_000
_FOUND = (
    "both losses, what every changed part of OLD repairs in NEW, by layer where layers were measured, what all that "
    "hurt repair together, OLD's tensors part by part, that all other parts compute the same, and which parts hurt and "
    "helped"
)
_ALL_FOUND = "what the parts of NEW break in OLD, both ways from NEW to OLD, kinds of change, and distances"
_UNCHECKED = (
    "cost, the names, settings, versions, date and sources that the record gives, and whether the text is training text"
)


def verify_compare(
    folder: Path,
    record: CompareRecord,
    old: nn.Module,
    new: nn.Module,
    *,
    full: bool = False,
    text: Text | None = None,
    sources: tuple[str | None, str | None] = (None, None),
    loss: Loss | None = None,
) -> Verification:
    """Put OLD's parts back into NEW again, on the certificate's own report part.

    Args:
        folder: the certificate.
        record: its record.
        old: what NEW was made from, in the dtype it was compared in; left untouched.
        new: likewise the model in question.
        full: make the whole comparison again, with its settings and without its budget.
        text: also put OLD's parts back on this text, of which nothing may be in the certificate's probe.
        sources: where OLD and NEW were opened from.
        loss: of batches whose loss is a function, that function.

    Raises:
        CertificateError: If the folder is no readable certificate, or does not fit the models.
        ModelError: If OLD and NEW do not fit each other.
        ProbeError: If a text does not fit the model, or too little of it is fresh.
    """
    words = f"OLD is {opened_words(old, sources[0])}; NEW is {opened_words(new, sources[1])}"
    wrong = _other(folder, record, old, new, loss)
    if wrong is not None:
        return replace(wrong, model=words)
    probe = read_probe(folder, record, loss)
    tolerance = max(tolerance_of(model, unit_loss(record)) for model in (old, new))
    margin = max(record.margin_nats, tolerance)
    about = Verification("holds", "", tolerance=tolerance, margin=margin, model=words, split=split_words(record))
    contradiction = next(contradictions(record), None)
    if contradiction:
        return replace(about, status="does not hold", reason=contradiction)
    own = None
    with untouched(old), untouched(new):
        pair = _opened_pair(old, new, probe.report, probe.fit)
        recheck = _Recheck(record, pair, tolerance)
        reason = next(_wrong_parts(record, pair), None)
        if reason is None:
            recheck.run()
            reason = recheck.wrong_number() or next(_not_the_same(record, pair), None)
        if text is not None and not reason:
            unseen = cut_like(text, probe, new)
            pair = _opened_pair(old, new, unseen.split, unseen.split)
            own = _on_own_text(record, pair, text, tolerance, unseen.overlapping)
            reason = refused(own)
    checks = recheck.checks
    if full and not reason:
        again = _compared_again(record, old, new, probe)
        checks = [*checks, *all_numbers(record, again, tolerance)]
        reason = next(other_codes(record, again), None) or first_wrong(checks)
    same, unknown = identity_words(record)
    return replace(
        about,
        status="does not hold" if reason else "holds",
        reason=reason or f"{len(checks)} numbers found again.",
        checks=tuple(checks),
        rechecked=(_FOUND, same.replace("the model's", "both models'"), *([_ALL_FOUND] if full else [])),
        not_rechecked=(*unknown, _UNCHECKED) if full else (*unknown, _ALL_FOUND, _UNCHECKED),
        own=own,
    )


def mended_model(folder: Path, record: CompareRecord, old: nn.Module, new: nn.Module) -> nn.Module:
    """Return a copy of ``new`` with OLD's tensors of all parts that hurt, where these can be put back.

    Raises:
        CertificateError: If a model is not the certified one, the record contradicts itself, or nothing can be put
            back with a gain.
    """
    wrong = _other(folder, record, old, new)
    reason = next(contradictions(record), None) if wrong is None else wrong.reason
    if reason:
        raise CertificateError(f"{folder} does not hold: {reason}")
    if record.mended is None:
        hurt = "no part hurts beyond the margin"
        if record.conclusion.hurt or record.conclusion.hurt_ends:
            hurt = "OLD's code differs where it hurts, or its tensors do not fit NEW"
        raise CertificateError(f"There is nothing to put back as tensors: {hurt}.")
    if record.mended.gain.low <= 0:
        raise CertificateError(
            f"Together, the parts that hurt repair {record.mended.gain.mean:.4f} ({record.mended.gain.low:.4f} to "
            f"{record.mended.gain.high:.4f}), which is no proof of a gain: nothing is written."
        )
    changed = copy.deepcopy(new)
    put_back(changed, old, record.mended)
    return changed


class _Recheck(Recheck):
    """Puts back again what the record says repairs."""

    def __init__(self, record: CompareRecord, pair: Pair, tolerance: float) -> None:
        super().__init__(ReportSession(pair.new.runner, pair.new.trace), tolerance)
        self.record, self.pair = record, pair

    def run(self) -> None:
        """Compare every number that the verdicts follow from."""
        record, pair = self.record, self.pair
        old, new = pair.old.trace, pair.new.trace
        self.loss("loss.old", record.loss.old, old.losses)
        self.loss("loss.new", record.loss.new, new.losses)
        self.gain("loss.damage", record.loss.damage, new.losses, old.losses)
        found = Measured()
        said = [(part, each) for part, each in said_of(record, pair.parts) if is_changed(each)]
        measure_repairs(pair, [part for part, _ in said], found)
        for part, each in said:
            if each.repairs_nats is not None:
                self.interval(f"{name_of(each)} repairs", each.repairs_nats, found.repairs[part])
        for block in record.blocks:
            self._layers(block, found)
        if record.mended is not None:
            again = measure_mended(pair, mended_parts(pair, record.mended))
            assert again is not None  # `_wrong_parts` has found its parts
            self.compare("mended.loss", record.mended.loss, again.loss)
            self.interval("mended.gain", record.mended.gain, again.gain)

    def _layers(self, block: BlockChange, found: Measured) -> None:
        said = {t.name.rpartition(".")[0]: t.repairs_nats for t in block.tensors if t.repairs_nats is not None}
        measure_layers(self.pair, block.index, list(said), found)
        for name, interval in said.items():
            full = f"{block.name}.{name}"
            if full not in found.layers:
                raise CertificateError(f"{full[:80]} is said to repair something, and OLD and NEW have no such layer.")
            self.interval(f"{full} repairs", interval, found.layers[full])


def _opened_pair(old: nn.Module, new: nn.Module, report: Split, first: Split) -> Pair:
    runners = [Runner(model, find_blocks(model)) for model in (old, new)]
    runners[0].work = runners[1].work
    clock = Clock(math.inf, runners[1].work)
    with clock.stage(LOSSES):
        sides = [opened_side(runner, report, first) for runner in runners]
    return Pair(sides[0], sides[1], clock)


def _other(
    folder: Path, record: CompareRecord, old: nn.Module, new: nn.Module, loss: Loss | None = None
) -> Verification | None:
    """Return what there is to say where files, probe or models are not those of the record, or ``None``."""
    changed = what_changed(folder, record)
    if changed:
        return Verification("does not hold", changed)
    if load_tensors(folder / WITNESS_FILE, HEADER_BYTES):
        return Verification(
            "does not hold", f"{WITNESS_FILE} holds tensors: of a comparison, OLD itself is the witness."
        )
    check_two(Candidate(old, "OLD"), Candidate(new, "NEW"))
    wrong = not_as_certified(folder, record, read_probe(folder, record, loss), new)
    if wrong is not None:
        return replace(wrong, reason=f"NEW: {wrong.reason}") if wrong.status != "does not hold" else wrong
    other = other_model(record.old, old)
    if other is None:
        return None
    runner, parts = Runner(old, find_blocks(old)), parts_of(*(Runner(m, find_blocks(m)) for m in (old, new)))
    differing = [name_of(each) for part, each in said_of(record, parts) if part_sha256(runner, part) != each.old_sha256]
    where = f" Parts with other tensors: {', '.join(differing[:6])}." if differing else ""
    return Verification("not the same model or data", f"OLD: {other}{where}")


def _wrong_parts(record: CompareRecord, pair: Pair) -> Iterator[str]:
    """Yield, in words, where tensors are not those that the record says, or other parts were put back together."""
    said = said_of(record, pair.parts)
    if len(said) != len(pair.parts) or len(said) != len(record.blocks) + len(record.ends):
        yield f"The record is about {len(record.blocks) + len(record.ends)} parts, the models have {len(pair.parts)}."
        return
    for part, each in said:
        if each.old_sha256 != part_sha256(pair.old.runner, part):
            yield f"{name_of(each)}: OLD's tensors are not those that were certified."
    mended = parts_to_mend(pair, record.conclusion, {b.index: b.same_code for b in record.blocks})
    if mended != ([] if record.mended is None else mended_parts(pair, record.mended)):
        yield "The parts that are said to be put back together are not those that hurt."


def _not_the_same(record: CompareRecord, pair: Pair) -> Iterator[str]:
    """Yield, in words, which parts that are said to be unchanged compute something else: none can be hidden."""
    ends = end_outputs(pair.old, pair.new)
    for part, each in said_of(record, pair.parts):
        if is_changed(each):
            continue
        if part.block is None:
            found = of_end(ends[part.unit], pair.old, pair.new, same_weights=True)
        else:
            found = block_outputs(pair.old, pair.new, part.block, same_weights=True)
        if not found.same:
            yield f"{name_of(each)} is said to be the same in both models, and its outputs differ."


def _on_own_text(record: CompareRecord, pair: Pair, text: Text, tolerance: float, overlapping: int) -> OwnText:
    """Return what OLD's parts repair on a text that whoever made the comparison did not choose."""
    new = pair.new.trace
    check_finite("loss of NEW", new.losses, pair.old.trace.losses)
    margin = own_margin(record, min(pair.old.trace.mean, new.mean), tolerance)
    wanted = [(part, b) for part, b in said_of(record, pair.parts) if isinstance(b, BlockChange) and is_changed(b)]
    found = Measured()
    measure_repairs(pair, [part for part, _ in wanted], found)
    here = [block.model_copy(update={"repairs_nats": found.repairs[part]}) for part, block in wanted]
    said, follows = effects_of(record.blocks, record.margin_nats), effects_of(here, margin)
    blocks = tuple(
        OwnBlock(b.name, said[b.index], follows[b.index], (before.repairs_nats, b.repairs_nats))
        for b, (_, before) in zip(here, wanted, strict=True)
    )
    mended = None if record.mended is None else measure_mended(pair, mended_parts(pair, record.mended))
    gain = None if mended is None else mended.gain
    wrong = _not_confirmed(gain, record, blocks, tolerance)
    return OwnText(
        source=text.source,
        sequences=len(new.tokens),
        tokens=int(new.predicted),
        overlapping=overlapping,
        loss=new.mean,
        margin=margin,
        certified=None if record.mended is None else record.mended.gain,
        found=gain,
        blocks=blocks,
        holds=wrong is None,
        reason=wrong or "On this text OLD's parts do what was certified.",
    )


def _not_confirmed(
    gain: Interval | None, record: CompareRecord, blocks: Sequence[OwnBlock], tolerance: float
) -> str | None:
    """Say what of a certificate is not so on another text, or ``None``. What is merely undecided there is not said."""
    claimed = record.mended is not None and record.mended.gain.low > tolerance
    if gain is not None and claimed and gain.low <= tolerance:
        return (
            f"On your text all that hurt repairs {gain.mean:.3f} ({gain.low:.3f} to {gain.high:.3f}) together: "
            f"not more than the tolerance of {tolerance:g}."
        )
    turned = [b.name for b in blocks if {b.certified, b.found} == {"hurt", "helped"}]
    return f"{', '.join(turned)}: the change does the opposite on your text." if turned else None


def _compared_again(record: CompareRecord, old: nn.Module, new: nn.Module, probe: Probe) -> CompareRecord:
    """Return the whole comparison, made again with the settings of the record and without its budget."""
    settings = CompareSettings(
        f"{_ENDLESS_HOURS}h",
        int(record.settings["layers_of"] or 0),
        record.margin_nats if record.settings["margin"] is not None else None,
        bool(record.settings["path"]),
        int(record.settings["micro_batch_tokens"] or 0),
    )
    return run_compare(Candidate(old, record.old.name), Candidate(new, record.model.name), probe, settings)
