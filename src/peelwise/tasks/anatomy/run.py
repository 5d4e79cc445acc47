"""The anatomy of a model: studies one after the other, each over all blocks, within a budget."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from peelwise.engine.clock import Watcher
from peelwise.engine.depth.look import both, look
from peelwise.engine.opening import checked_blocks, open_session
from peelwise.engine.provenance import Setup, model_record, versions
from peelwise.engine.session import Session
from peelwise.errors import NotDifferentiableError
from peelwise.evidence.anatomy import better_without, correlations
from peelwise.evidence.verdict import default_margin
from peelwise.model.fingerprint import identify
from peelwise.model.guard import untouched
from peelwise.model.layers import Block, device_of
from peelwise.model.parts import Parts, parts_of
from peelwise.model.splice import frozen
from peelwise.probe.probe import Probe
from peelwise.records.anatomy import AnatomyRecord, BlockAnatomy, Predictability
from peelwise.records.base import Note, note
from peelwise.records.codes import Stage
from peelwise.tasks.anatomy.ablate import ablations, cost_of
from peelwise.tasks.anatomy.bend import bent, best_scale
from peelwise.tasks.anatomy.predict import coefficients, grams_of, kinds, predictability, predicted
from peelwise.tasks.anatomy.recover import recovery
from peelwise.tasks.anatomy.settings import AnatomySettings

_LEAST_FOR_DEPTH = 3  # blocks


@dataclass
class _Found:
    """What is known so far: per block the fields of its record."""

    session: Session
    all_parts: Sequence[Parts]
    margin: float
    seed: int
    gradients: bool
    blocks: list[dict[str, Any]]
    predictability: list[Predictability] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    complete: bool = True

    def each(self, stage: Stage, work: Callable[[int], None]) -> None:
        """Do something for every block while there is time; a block takes about as long as the longest before it."""
        clock, longest = self.session.clock, 0.0
        with clock.stage(stage):
            for index in range(len(self.all_parts)):
                clock.tell(index, len(self.all_parts))
                began = clock.elapsed
                if not clock.affords(longest):
                    self.complete = False
                    return
                work(index)
                longest = max(longest, clock.elapsed - began)


def run_anatomy(
    model: nn.Module,
    probe: Probe,
    settings: AnatomySettings,
    *,
    name: str = "model",
    source: str | None = None,
    watcher: Watcher | None = None,
) -> AnatomyRecord:
    """Study ``model`` block by block and leave it exactly as it was. Ctrl-C ends it early with what was finished.

    Args:
        model: a decoder-only language model; see `find_blocks`.
        probe: the text; directions and means are from fit, factors chosen on select, all that is shown is on report.
        settings: budget, studies and margin.
        name: the model's name in the record.
        source: where it was opened from.
        watcher: told about progress.

    Raises:
        UnsupportedModelError: If the architecture cannot be measured.
        ModelError: If the model holds NaN or Inf, or its loss is not finite.
        ProbeError: If the probe does not fit.
    """
    blocks = checked_blocks(model, probe)
    setup = Setup(model, blocks, name, source, identify(model), settings.plain(), probe.seed)
    linears = [linear for block in blocks for linear in block.linears]
    with untouched(model), frozen(linears), torch.no_grad():
        session, gradients = _session(model, blocks, probe, settings, name, watcher)
        margin = settings.margin if settings.margin is not None else default_margin(session.report.mean)
        found = _Found(session, [parts_of(b) for b in blocks], margin, probe.seed, gradients, [{} for _ in blocks])
        found.notes += session.notes
        try:
            for study in settings.wanted:
                _STUDIES[study](found)
        except KeyboardInterrupt:
            found.complete = False
            found.notes.append(note("stopped"))
        else:
            if not found.complete:
                found.notes.append(note("budget-ended"))
    return _record(setup, probe, found)


def _ablate(found: _Found) -> None:
    def work(index: int) -> None:
        found.blocks[index]["ablation"] = dict(ablations(found.session, found.all_parts, index))

    found.each("ablation", work)


def _predict(found: _Found) -> None:
    if len(found.all_parts) < _LEAST_FOR_DEPTH:
        found.notes.append(note("few-blocks", blocks=len(found.all_parts)))
        return
    same = kinds(found.all_parts)
    grams = {}
    with found.session.clock.stage("predictability"):
        for done, (part, layers) in enumerate(same.items()):
            found.session.clock.tell(done, len(same))
            found.predictability.append(predictability(part, layers, found.seed))
            grams[part] = grams_of(layers, found.seed).both

    def work(index: int) -> None:
        weights = {part: coefficients(gram, index) for part, gram in grams.items()}
        cost = cost_of(found.session, predicted(found.all_parts, index, weights), index)
        found.blocks[index]["predicted"] = cost

    found.each("predictability", work)


def _structure(found: _Found) -> None:
    session = found.session
    seen = look(session, found.all_parts, both(session.fit, session.select), gradients=found.gradients)
    for index, block in enumerate(found.blocks):
        block["signals"] = seen.table.of_block(index)


def _bend(found: _Found) -> None:
    def work(index: int) -> None:
        parts, clock = found.all_parts[index], found.session.clock
        if not parts.linears:
            return
        found.blocks[index]["best_scale"] = best_scale(found.session, parts)
        ways = bent(found.session, parts, found.margin, found.seed, lambda: clock.left > 0)
        found.blocks[index]["bent"] = tuple(ways)

    found.each("bending", work)


def _recover(found: _Found) -> None:
    if not found.gradients:
        found.notes.append(note("no-gradients"))
        return

    def work(index: int) -> None:
        parts = found.all_parts[index]
        if parts.block.linears:
            clock = found.session.clock
            done = recovery(found.session, parts, found.margin, found.seed, lambda: clock.left > 0)
            found.blocks[index]["recovery"] = done

    found.each("recovery", work)


_STUDIES: dict[str, Callable[[_Found], None]] = {
    "ablation": _ablate,
    "predictability": _predict,
    "structure": _structure,
    "bending": _bend,
    "recovery": _recover,
}


def _record(setup: Setup, probe: Probe, found: _Found) -> AnatomyRecord:
    blocks = [
        BlockAnatomy(index=parts.block.index, name=parts.block.name, **values)
        for parts, values in zip(found.all_parts, found.blocks, strict=True)
    ]
    tokens = probe.fit.tokens + probe.select.tokens + probe.report.tokens
    return AnatomyRecord(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        complete=found.complete,
        margin_nats=found.margin,
        model=model_record(setup),
        probe=probe.record(),
        loss=found.session.report.mean,
        blocks=tuple(blocks),
        predictability=tuple(found.predictability),
        better_without=better_without(blocks),
        correlations=correlations(blocks),
        cost=found.session.clock.record(tokens, device_of(setup.model)),
        notes=tuple(found.notes),
        settings=setup.settings,
        seed=setup.seed,
        versions=versions(),
    ).sealed()


def _session(
    model: nn.Module,
    blocks: tuple[Block, ...],
    probe: Probe,
    settings: AnatomySettings,
    name: str,
    watcher: Watcher | None,
) -> tuple[Session, bool]:
    """Return a session, and whether the model can be differentiated."""
    for gradients in (True, False):
        try:
            opened = open_session(
                model,
                blocks,
                probe,
                name=name,
                budget_seconds=settings.budget_seconds,
                micro_batch_tokens=settings.micro_batch_tokens,
                watcher=watcher,
                gradients=gradients,
            )
        except NotDifferentiableError:
            if not gradients:
                raise
            continue
        break
    return opened, gradients
