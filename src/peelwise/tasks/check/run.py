"""Check one model at one moment: weights, a pass forward and back, a score over depth, proofs where it stands out."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import nn

from peelwise.distributed.processes import ONE_PROCESS, Processes, check_same
from peelwise.engine.clock import Clock, Watcher
from peelwise.engine.depth.gains import GainWitnesses, gain_witnesses
from peelwise.engine.depth.look import Look, both, look, look_at_weights
from peelwise.engine.depth.table import DepthTable
from peelwise.engine.experts import mixture_notes
from peelwise.engine.opening import check_dense, check_spread, checked_blocks, open_session
from peelwise.engine.provenance import Setup, identified, model_record, versions
from peelwise.engine.session import Session
from peelwise.errors import NotDifferentiableError
from peelwise.evidence.unlike import RULE, THRESHOLD
from peelwise.evidence.verdict import default_margin
from peelwise.model.architectures import find_blocks, refuse_text
from peelwise.model.fingerprint import check_finite
from peelwise.model.guard import untouched
from peelwise.model.layers import Block, device_of
from peelwise.model.parts import Parts, parts_of
from peelwise.model.runner import Runner
from peelwise.model.shared_weights import without_shared
from peelwise.model.splice import frozen
from peelwise.probe.probe import Probe
from peelwise.records.base import NATS, CostRecord, Interval, Note, note
from peelwise.records.check import BlockCheck, CheckRecord, MatrixCheck
from peelwise.tasks.check.settings import CheckSettings


@dataclass
class _Found:
    """What the stages of a check found."""

    look: Look
    session: Session | None = None
    notes: list[Note] = field(default_factory=list)
    ablation: dict[int, Interval] = field(default_factory=dict)
    witnesses: GainWitnesses = field(default_factory=lambda: GainWitnesses((), None))


def run_check(
    model: nn.Module,
    probe: Probe | None,
    settings: CheckSettings,
    *,
    name: str = "model",
    source: str | None = None,
    watcher: Watcher | None = None,
    processes: Processes = ONE_PROCESS,
) -> CheckRecord:
    """Check ``model`` and leave it exactly as it was.

    Several processes share sequences and signals of weights, and return the same: the first one's record.

    Args:
        model: a language model, or of batches any whose blocks feed each other; see `find_blocks`. Spread over the
            processes (``fully_shard``) or whole in each of them.
        probe: the text or batches; fit and select are looked at, report proves; ``None`` for signals of weights alone.
        settings: signals and limits.
        name: the model's name in the record.
        source: where it was opened from.
        watcher: told about progress.
        processes: those that share the work; each calls this with the same model, probe and settings.

    Raises:
        OptionError: If processes hold different models, probes or settings.
        OtherProcessError: If another process failed.
        UnsupportedModelError: If the architecture cannot be measured.
        ModelError: If the model holds NaN or Inf, or its loss is not finite.
        ProbeError: If the probe's tokens do not fit the model's vocabulary, or its sequences the context.
    """
    with processes.agreeing():
        blocks = _blocks(model, probe, settings.stack)
        setup = identified(
            model, blocks, name, source, settings.plain(), seed=probe.seed if probe else 0, processes=processes
        )
        check_same(processes, (setup.identity.fingerprint, probe and probe.fingerprint, setup.settings))
        all_parts = [parts_of(block) for block in blocks]
        linears = [linear for block in blocks for linear in block.linears]
        with untouched(model), frozen(linears), torch.no_grad():
            if probe is None:
                runner = Runner(model, blocks, processes=processes)
                clock = Clock(float("inf"), runner.work, watcher, processes)
                found = _Found(look_at_weights(all_parts, clock, settings.wanted, runner), notes=[note("no-text")])
            else:
                session, differentiable = _session(model, blocks, probe, settings, name, watcher, processes)
                clock, found = session.clock, _with_text(session, all_parts, settings, gradients=differentiable)
        if found.look.scored is None:
            found.notes.append(note("few-blocks", blocks=len(blocks)))
        tokens = 1 if probe is None else probe.fit.tokens + probe.select.tokens + probe.report.tokens
        record = _record(setup, probe, found, all_parts)
        record = record.model_copy(update={"cost": clock.record(tokens, device_of(model))})
        return cast(CheckRecord, processes.broadcast(record))


def _with_text(session: Session, all_parts: Sequence[Parts], settings: CheckSettings, *, gradients: bool) -> _Found:
    """Look at fit and select, whose tokens nothing is proved on, and prove on report what can be of the worst."""
    seen = both(session.fit, session.select)
    found = _Found(look(session, all_parts, seen, wanted=settings.wanted, gradients=gradients), session)
    found.notes += [*session.notes, *([] if gradients else [note("no-gradients")])]
    found.notes += mixture_notes(session.runner, seen)
    worst = found.look.names[: settings.most_witnesses]
    if worst:
        with session.clock.stage("ablation"):
            found.ablation = {index: _ablation(session, index) for index in worst}
        with session.clock.stage("gain-witnesses"):
            found.witnesses = gain_witnesses(session, [all_parts[index] for index in worst], found.look.table)
    return found


def _record(setup: Setup, probe: Probe | None, found: _Found, all_parts: Sequence[Parts]) -> CheckRecord:
    scored, session, composed = found.look.scored, found.session, found.witnesses.composed
    loss = None if session is None else session.report.mean
    return CheckRecord(
        rule=RULE,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        model=model_record(setup),
        probe=None if probe is None else probe.record(),
        margin_nats=default_margin(loss or 0.0, NATS if probe is None else probe.unit),
        loss=loss,
        composed_loss=None if composed is None or session is None else session.report.mean_of(composed),
        composed_gain=(
            None if composed is None or session is None else session.gain(session.report.losses, composed).interval()
        ),
        threshold=THRESHOLD,
        blocks=tuple(_block_record(parts.block, found) for parts in all_parts),
        matrices=tuple(_matrices(all_parts, found.look.table)),
        unlike=None if scored is None else found.look.unlike(),
        gain_witnesses=found.witnesses.each,
        cost=CostRecord(forward_equivalents=0.0, wall_seconds=0.0, peak_bytes=0),
        notes=tuple(found.notes),
        settings=setup.settings,
        seed=setup.seed,
        versions=versions(),
    )


def _blocks(model: nn.Module, probe: Probe | None, stack: str | None) -> tuple[Block, ...]:
    if probe is not None:
        blocks = checked_blocks(model, probe, batches=True, stack=stack, shared=True, spread=True)
    else:
        refuse_text(model)
        blocks = without_shared(find_blocks(model, stack))
        check_spread(blocks)
        check_finite(model)
    check_dense(blocks)
    return blocks


def _session(
    model: nn.Module,
    blocks: tuple[Block, ...],
    probe: Probe,
    settings: CheckSettings,
    name: str,
    watcher: Watcher | None,
    processes: Processes,
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
                processes=processes,
                gradients=gradients,
            )
        except NotDifferentiableError:
            if not gradients:
                raise
            continue
        break
    return opened, gradients


def _ablation(session: Session, index: int) -> Interval:
    without = session.losses_without(session.report, index)
    return session.gain(without, session.report.losses).interval()


def _block_record(block: Block, found: _Found) -> BlockCheck:
    scored = found.look.scored
    return BlockCheck(
        index=block.index,
        name=block.name,
        score=None if scored is None else float(scored.scores[block.index]),
        signals=found.look.table.of_block(block.index),
        ablation=found.ablation.get(block.index),
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
