"""The anatomy of a model: studies one after the other, each over all blocks, within a budget; killed, it goes on."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peelwise.engine.clock import Watcher
from peelwise.engine.depth.look import both, look
from peelwise.engine.opening import checked_blocks, open_session
from peelwise.engine.provenance import Setup, model_record, versions
from peelwise.engine.session import Session
from peelwise.errors import NotDifferentiableError
from peelwise.evidence.anatomy import better_without, correlations, perplexity_ratio
from peelwise.evidence.verdict import default_margin
from peelwise.model.fingerprint import identify
from peelwise.model.guard import untouched
from peelwise.model.layers import Block, device_of
from peelwise.model.parts import Parts, parts_of
from peelwise.model.splice import frozen
from peelwise.probe.probe import Probe
from peelwise.records.anatomy import BENDS, AnatomyRecord, BlockAnatomy
from peelwise.records.base import Note, note
from peelwise.records.codes import Stage
from peelwise.records.options import Plain
from peelwise.tasks.anatomy.ablate import ablations, cost_of
from peelwise.tasks.anatomy.bend import bent, best_scale
from peelwise.tasks.anatomy.predict import coefficients, grams_of, kinds, predictability, predicted
from peelwise.tasks.anatomy.recover import recovery
from peelwise.tasks.anatomy.settings import AnatomySettings
from peelwise.tasks.anatomy.unfinished import Unfinished

_LEAST_FOR_DEPTH = 3  # blocks


@dataclass
class _Found:
    """What is known so far: per block the fields of its record."""

    session: Session
    all_parts: Sequence[Parts]
    margin: float
    seed: int
    gradients: bool
    kept: Unfinished
    partly: dict[int, dict[str, Any]] = field(default_factory=dict)  # of blocks that the time ended in
    notes: list[Note] = field(default_factory=list)
    complete: bool = True

    def each(self, stage: Stage, known: str, work: Callable[[int], bool | None]) -> None:
        """Do something for every block while there is time; a block takes about as long as the longest before it.

        Args:
            stage: that it is charged to.
            known: the field of a block's record that says that it is done.
            work: called with the block's index; returns whether it was finished, or nothing.
        """
        clock, longest = self.session.clock, 0.0
        with clock.stage(stage):
            for index in range(len(self.all_parts)):
                clock.tell(index, len(self.all_parts))
                if known in self.kept.blocks[index]:
                    continue
                began = clock.elapsed
                if not clock.affords(longest) or work(index) is False:
                    self.complete = False
                    return
                longest = max(longest, clock.elapsed - began)

    def block(self, index: int) -> dict[str, Any]:
        """Return the fields of a block's record, finished or not."""
        return self.kept.blocks[index] | self.partly.get(index, {})


def run_anatomy(
    model: nn.Module,
    probe: Probe,
    settings: AnatomySettings,
    *,
    name: str = "model",
    source: str | None = None,
    watcher: Watcher | None = None,
    unfinished: Path | None = None,
    force: bool = False,
) -> AnatomyRecord:
    """Study ``model`` block by block and leave it exactly as it was. Ctrl-C ends it early with what was finished.

    Args:
        model: a decoder-only language model; see `find_blocks`.
        probe: the text; directions and means are from fit, factors chosen on select, all that is shown is on report.
        settings: budget, studies and margin.
        name: the model's name in the record.
        source: where it was opened from.
        watcher: told about progress.
        unfinished: folder that finished pieces are kept in; an earlier call's are not measured again.
        force: begin anew where it holds pieces of something else.

    Raises:
        UnsupportedModelError: If the architecture cannot be measured.
        ModelError: If the model holds NaN or Inf, or its loss is not finite.
        ProbeError: If the probe does not fit.
        OutputError: If ``unfinished`` holds pieces of something else, or cannot be written.
    """
    blocks = checked_blocks(model, probe)
    setup = Setup(model, blocks, name, source, identify(model), settings.plain(), probe.seed)
    kept = Unfinished.opened(unfinished, _about(setup, probe), len(blocks), force=force)
    linears = [linear for block in blocks for linear in block.linears]
    with untouched(model), frozen(linears), torch.no_grad():
        session, gradients = _session(model, blocks, probe, settings, name, watcher)
        margin = settings.margin if settings.margin is not None else default_margin(session.report.mean)
        found = _Found(session, [parts_of(b) for b in session.runner.blocks], margin, probe.seed, gradients, kept)
        found.notes += [*session.notes, *([note("resumed")] if kept.resumed else [])]
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


def _about(setup: Setup, probe: Probe) -> Plain:
    """Return what finished pieces belong to: the budget and the choice of studies may change from call to call."""
    chosen = {key: setup.settings[key] for key in ("margin", "micro_batch_tokens")}
    made_with = {"peelwise": versions().get("peelwise")}
    return {"model": setup.identity.fingerprint, "probe": probe.fingerprint, "seed": probe.seed, **chosen, **made_with}


def _ablate(found: _Found) -> None:
    def work(index: int) -> None:
        found.kept.add(index, ablation=dict(ablations(found.session, found.all_parts, index)))

    found.each("ablation", "ablation", work)


def _predict(found: _Found) -> None:
    if len(found.all_parts) < _LEAST_FOR_DEPTH:
        found.notes.append(note("few-blocks", blocks=len(found.all_parts)))
        return
    same, known = kinds(found.all_parts), {each.part for each in found.kept.predictability}
    wanted = any("predicted" not in block for block in found.kept.blocks)
    grams = {}
    with found.session.clock.stage("predictability"):
        for done, (part, layers) in enumerate(same.items()):
            found.session.clock.tell(done, len(same))
            if part not in known:
                found.kept.predictability.append(predictability(part, layers, found.seed))
                found.kept.write()
            if wanted:
                grams[part] = grams_of(layers, found.seed).both

    def work(index: int) -> None:
        weights = {part: coefficients(gram, index) for part, gram in grams.items()}
        cost = cost_of(found.session, predicted(found.all_parts, index, weights), index)
        found.kept.add(index, predicted=cost)

    found.each("predictability", "predicted", work)


def _structure(found: _Found) -> None:
    if all("signals" in block for block in found.kept.blocks):
        return
    session = found.session
    seen = look(session, found.all_parts, both(session.fit, session.select), gradients=found.gradients)
    for index in range(len(found.all_parts)):
        found.kept.blocks[index]["signals"] = seen.table.of_block(index)
    found.kept.write()


def _bend(found: _Found) -> None:
    def work(index: int) -> bool | None:
        parts, clock = found.all_parts[index], found.session.clock
        if not parts.linears:
            return None
        best = best_scale(found.session, parts)
        ways = tuple(bent(found.session, parts, found.margin, found.seed, lambda: clock.left > 0))
        if len(ways) < len(BENDS):
            found.partly[index] = {"best_scale": best, "bent": ways}
            return False
        found.kept.add(index, best_scale=best, bent=ways)
        return None

    found.each("bending", "bent", work)


def _recover(found: _Found) -> None:
    if not found.gradients:
        found.notes.append(note("no-gradients"))
        return

    def work(index: int) -> bool | None:
        parts = found.all_parts[index]
        if not parts.block.linears:
            return None
        clock, memory = found.session.clock, found.kept.training(index)
        done = recovery(found.session, parts, found.margin, found.seed, lambda: clock.left > 0, memory)
        if done.share is not None and done.retrained is None:
            found.partly[index] = {"recovery": done}
            return False
        found.kept.add(index, recovery=done)
        return None

    found.each("recovery", "recovery", work)


_STUDIES: dict[str, Callable[[_Found], None]] = {
    "ablation": _ablate,
    "predictability": _predict,
    "structure": _structure,
    "bending": _bend,
    "recovery": _recover,
}


def _block_record(block: Block, pieces: dict[str, Any]) -> BlockAnatomy:
    ratios = {way: perplexity_ratio(cost) for way, cost in pieces.get("ablation", {}).items()}
    return BlockAnatomy(index=block.index, name=block.name, perplexity_ratios=ratios, **pieces)


def _record(setup: Setup, probe: Probe, found: _Found) -> AnatomyRecord:
    blocks = [_block_record(parts.block, found.block(index)) for index, parts in enumerate(found.all_parts)]
    tokens = probe.fit.tokens + probe.select.tokens + probe.report.tokens
    return AnatomyRecord(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        complete=found.complete,
        margin_nats=found.margin,
        model=model_record(setup),
        probe=probe.record(),
        loss=found.session.report.mean,
        blocks=tuple(blocks),
        predictability=tuple(found.kept.predictability),
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
