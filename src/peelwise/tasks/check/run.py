"""Check one model at one moment: weights, a pass forward and back, a score over depth, proofs where it stands out."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from peelwise.engine.clock import Clock, Watcher
from peelwise.engine.depth.joint import gates_of
from peelwise.engine.depth.table import BLOCK, DepthTable, block_weights, joined, pass_table, weight_table
from peelwise.engine.opening import checked_blocks, open_session
from peelwise.engine.provenance import Setup, model_record, versions
from peelwise.engine.session import Session
from peelwise.errors import NotDifferentiableError
from peelwise.evidence.unlike import THRESHOLD, Unlikeness, named, reasons, to_screen, unlikeness, with_gains
from peelwise.evidence.verdict import default_margin
from peelwise.model.architectures import find_blocks
from peelwise.model.fingerprint import check_finite, fingerprint
from peelwise.model.guard import untouched
from peelwise.model.layers import Block, device_of
from peelwise.model.parts import Parts, parts_of
from peelwise.model.runner import Runner, Trace
from peelwise.model.selfcheck import check_shared
from peelwise.model.splice import frozen
from peelwise.probe.probe import Probe
from peelwise.records.base import Interval, Note, note
from peelwise.records.check import BlockCheck, CheckRecord, MatrixCheck, UnlikeBlock
from peelwise.tasks.check.gains import GainWitnesses, gain_witnesses, screened
from peelwise.tasks.check.settings import CheckSettings


@dataclass
class _Found:
    """What the stages of a check found."""

    table: DepthTable
    loss: float | None = None
    notes: list[Note] | None = None
    ablation: dict[int, Interval] | None = None
    witnesses: GainWitnesses = field(default_factory=lambda: GainWitnesses((), None))


def run_check(
    model: nn.Module,
    probe: Probe | None,
    settings: CheckSettings,
    *,
    name: str = "model",
    source: str | None = None,
    watcher: Watcher | None = None,
) -> CheckRecord:
    """Check ``model`` and leave it exactly as it was.

    Args:
        model: a decoder-only language model; see `find_blocks`.
        probe: the text; fit and select are looked at, report proves; ``None`` for signals of weights alone.
        settings: signals and limits.
        name: the model's name in the record.
        source: where it was opened from.
        watcher: told about progress.

    Raises:
        UnsupportedModelError: If the architecture cannot be measured.
        ModelError: If the model holds NaN or Inf, or its loss is not finite.
        ProbeError: If the probe's tokens do not fit the model's vocabulary, or its sequences the context.
    """
    blocks = _blocks(model, probe)
    setup = Setup(model, blocks, name, source, fingerprint(model), settings.plain(), 0 if probe is None else probe.seed)
    all_parts = [parts_of(block) for block in blocks]
    linears = [linear for block in blocks for linear in block.linears]
    with untouched(model), frozen(linears), torch.no_grad():
        if probe is None:
            clock = Clock(float("inf"), Runner(model, blocks).work, watcher)
            with clock.stage("weight-signals"):
                found = _Found(_weights(all_parts, settings, clock), notes=[note("no-text")])
        else:
            session, differentiable = _session(model, blocks, probe, settings, name, watcher)
            clock = session.clock
            found = _with_text(session, all_parts, settings, gradients=differentiable)
        scored = unlikeness(found.table.values, len(blocks), [len(gates_of(parts)) for parts in all_parts])
        if probe is not None and scored is not None:
            few = to_screen(scored.scores)
            with clock.stage("gain-witnesses"):
                gains = screened(session, [all_parts[index] for index in few], found.table)
            scored = with_gains(scored, gains, default_margin(session.report.mean))
        names = named(scored.scores) if scored is not None else []
        if probe is not None and names:
            worst = names[: settings.most_witnesses]
            with clock.stage("ablation"):
                found.ablation = {index: _ablation(session, index) for index in worst}
            with clock.stage("gain-witnesses"):
                found.witnesses = gain_witnesses(session, [all_parts[index] for index in worst], found.table)
    composed = found.witnesses.composed
    tokens = 1 if probe is None else probe.fit.tokens + probe.select.tokens + probe.report.tokens
    if scored is None:
        found.notes = [*(found.notes or ()), note("few-blocks", blocks=len(blocks))]
    return CheckRecord(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        model=model_record(setup),
        probe=None if probe is None else probe.record(),
        margin_nats=default_margin(found.loss or 0.0),
        loss=found.loss,
        composed_loss=None if composed is None else session.report.mean_of(composed),
        composed_gain=None if composed is None else session.gain(session.report.losses, composed).interval(),
        threshold=THRESHOLD,
        blocks=tuple(_block_record(block, found, scored) for block in blocks),
        matrices=tuple(_matrices(all_parts, found.table)),
        unlike=None if scored is None else tuple(_unlike(scored, found.table, index) for index in names),
        gain_witnesses=found.witnesses.each,
        cost=clock.record(tokens, device_of(model)),
        notes=tuple(found.notes or ()),
        settings=setup.settings,
        seed=setup.seed,
        versions=versions(),
    )


def _blocks(model: nn.Module, probe: Probe | None) -> tuple[Block, ...]:
    if probe is not None:
        return checked_blocks(model, probe)
    blocks = find_blocks(model)
    check_shared(blocks)
    check_finite(model)
    return blocks


def _session(
    model: nn.Module,
    blocks: tuple[Block, ...],
    probe: Probe,
    settings: CheckSettings,
    name: str,
    watcher: Watcher | None,
) -> tuple[Session, bool]:
    """Return a session, and whether the model can be differentiated: what forward passes say comes either way."""
    for gradients in (True, False):
        try:
            opened = open_session(
                model,
                blocks,
                probe,
                name=name,
                budget_seconds=float("inf"),
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


def _with_text(session: Session, all_parts: Sequence[Parts], settings: CheckSettings, *, gradients: bool) -> _Found:
    """Return the signals of weights and of a pass over fit and select, whose tokens nothing is proved on."""
    clock, notes = session.clock, [*session.notes]
    with clock.stage("weight-signals"):
        weights = _weights(all_parts, settings, clock)
    seen = both(session.fit, session.select)
    with clock.stage("pass-signals"):
        if not gradients:
            notes.append(note("no-gradients"))
        passed = pass_table(
            session.runner,
            all_parts,
            seen,
            gradients=gradients,
            signals=settings.wanted,
            after_block=session.tell_block,
        )
    return _Found(joined(weights, passed), session.report.mean, notes)


def both(first: Trace, second: Trace) -> Trace:
    """Return two parts of a probe as one."""
    return Trace(
        [*first.batches, *second.batches],
        torch.cat([first.losses, second.losses]),
        torch.cat([first.tokens, second.tokens]),
    )


def _weights(all_parts: Sequence[Parts], settings: CheckSettings, clock: Clock) -> DepthTable:
    found = []
    for done, parts in enumerate(all_parts, start=1):
        found.append(block_weights(parts, stream_width(all_parts), settings.wanted))
        clock.tell(done, len(all_parts))
    return weight_table(found, settings.wanted)


def stream_width(all_parts: Sequence[Parts]) -> int:
    """Return the channels of the residual stream: the outputs of the layer that writes to it."""
    branches = all_parts[0].branches
    return int(branches[-1].writer.weight().shape[0]) if branches else 0


def _ablation(session: Session, index: int) -> Interval:
    without = session.losses_without(session.report, index)
    return session.gain(without, session.report.losses).interval()


def _block_record(block: Block, found: _Found, scored: Unlikeness | None) -> BlockCheck:
    return BlockCheck(
        index=block.index,
        name=block.name,
        score=None if scored is None else float(scored.scores[block.index]),
        signals={
            f"{signal}.{part}" if part != BLOCK else signal: value
            for (signal, part), row in found.table.values.items()
            if (value := row[block.index]) is not None
        },
        ablation=(found.ablation or {}).get(block.index),
    )


def _matrices(all_parts: Sequence[Parts], table: DepthTable) -> list[MatrixCheck]:
    of_part: dict[str, dict[str, list[float | None]]] = {}
    for (signal, part), row in table.values.items():
        of_part.setdefault(part, {})[signal] = row
    return [
        MatrixCheck(
            name=linear.name,
            block=parts.block.index,
            part=part,
            signals={
                signal: value
                for signal, row in of_part.get(part, {}).items()
                if (value := row[parts.block.index]) is not None
            },
        )
        for parts in all_parts
        for part, linear in parts.linears.items()
    ]


def _unlike(scored: Unlikeness, table: DepthTable, index: int) -> UnlikeBlock:
    return UnlikeBlock(block=index, score=float(scored.scores[index]), reasons=reasons(scored, table.values, index))
