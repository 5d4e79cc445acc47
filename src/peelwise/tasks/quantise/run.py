"""A model in a low-bit format without training: layers one after the other, for the inputs that they will really get.

For every group of layers that share their input, in the order they run in:

    1. sums of what they get from the layers quantised before them, and of what the parent gets there
    2. where their weights should be to make up for what is already lost (`references.asymmetric`)
    3. codes: rounding with error feedback, then coordinate descent where select agrees
    4. single codes moved to where the loss minds least (its curvature in the layer's outputs, from one pass back)

fit makes the codes, select chooses dampings, how far to go and which step to keep, report gives every number shown.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace

from torch import Tensor, nn

from peelwise.engine.clock import Clock, Watcher
from peelwise.engine.curvature import output_curvatures
from peelwise.engine.in_order import Walk, few_tokens
from peelwise.engine.opening import checked_blocks
from peelwise.engine.provenance import Setup, model_record, versions
from peelwise.engine.session import LOSSES, Changes, ReportSession, change_to
from peelwise.formats.base import Encoded, Format
from peelwise.model.fingerprint import identify
from peelwise.model.guard import untouched
from peelwise.model.layers import Block, LinearLayer, device_of
from peelwise.model.runner import Runner
from peelwise.model.selfcheck import self_check
from peelwise.model.trace import Trace
from peelwise.probe.probe import Probe
from peelwise.records.base import CostRecord, Note, note
from peelwise.records.quantise import (
    QuantiseConclusion,
    QuantisedBlock,
    QuantisedLayer,
    QuantiseLosses,
    QuantiseRecord,
)
from peelwise.references.asymmetric import InputSums, LayerCodes, Target, coded, targets
from peelwise.tasks.quantise.chosen import Chosen, chosen_layers
from peelwise.tasks.quantise.kept import Kept
from peelwise.tasks.quantise.settings import QuantiseSettings

FIT, SELECT, REPORT = range(3)
# Tokens of report, at least, that steps of layers and distances behind blocks are shown on; losses are on all of it.
REPORTED_STEPS = 2_048


@dataclass(frozen=True)
class Quantised:
    """What was found: the record, and the codes of every quantised layer by its name."""

    record: QuantiseRecord
    codes: dict[str, tuple[Format, Encoded]]


def run_quantise(
    model: nn.Module,
    name: str,
    source: str | None,
    probe: Probe,
    settings: QuantiseSettings,
    watcher: Watcher | None = None,
    kept: Kept | None = None,
) -> Quantised:
    """Find codes for the linear layers of a model, and leave it exactly as it was.

    Args:
        model: the parent.
        name, source: for the record.
        probe: the text: fit for codes, select for choices, report for every number shown.
        settings: format and effort.
        watcher: told about progress.
        kept: where the layers of each finished block are kept, so that an interrupted run can go on.

    Raises:
        FormatError: If no layer is left to quantise, or the format does not go with one of them.
        UnsupportedModelError: If the architecture cannot be measured.
    """
    blocks = checked_blocks(model, probe)
    chosen = chosen_layers(blocks, settings)
    with untouched(model):
        runner = Runner(model, blocks, micro_batch_tokens=settings.micro_batch_tokens)
        clock = Clock(math.inf, runner.work, watcher)
        with clock.stage(LOSSES):
            notes = self_check(runner, probe.fit)
            traces = [runner.trace(part) for part in (probe.fit, probe.select, probe.report)]
        curvatures, more = _curvatures(runner, traces[FIT], chosen.formats, settings, clock)
        with clock.stage("codes"):
            found = _all_codes(runner, traces, chosen.formats, settings, curvatures, clock, kept)
        with clock.stage("codes-losses"):
            loss = _losses(ReportSession(runner, traces[REPORT]), found.walk.changes, _rounded(chosen.formats, runner))
        cost = clock.record(probe.fit.tokens + probe.select.tokens + probe.report.tokens, device_of(model))
    setup = Setup(model, blocks, name, source, identify(model), settings.plain(), probe.seed)
    said = (*chosen.notes, *notes, *more, *few_tokens(found.tokens.items()))
    return Quantised(_record(setup, probe, chosen, found, (loss, cost, said)), found.codes)


@dataclass
class _Found:
    """What is known of the layers so far: their codes and lines, what is in place, and the stream behind each block."""

    walk: Walk
    codes: dict[str, tuple[Format, Encoded]] = field(default_factory=dict)
    lines: list[QuantisedLayer] = field(default_factory=list)
    behind: list[QuantisedBlock] = field(default_factory=list)
    tokens: dict[LinearLayer, int] = field(default_factory=dict)  # of fit that each layer is given

    def add(self, linear: LinearLayer, form: Format, encoded: Encoded, line: QuantisedLayer) -> None:
        """Put the codes of a layer in place."""
        self.codes[linear.name] = form, _kept(encoded, self.walk.own)
        self.lines.append(line)
        self.tokens[linear] = line.fit_tokens or 0
        self.walk.put(linear, form.decode(encoded))


def _all_codes(
    runner: Runner,
    traces: Sequence[Trace],
    formats: dict[LinearLayer, Format],
    settings: QuantiseSettings,
    curvatures: dict[LinearLayer, Tensor],
    clock: Clock,
    kept: Kept | None,
) -> _Found:
    """Return the codes of all layers, block by block; those that are kept as they are."""
    parts = [*traces[:REPORT], _beginning(traces[REPORT], REPORTED_STEPS)]
    walk = Walk(runner, runner, {linear: linear for linear in formats}, parts, parts)
    found = _Found(walk)
    for done, block in enumerate(runner.blocks):
        clock.tell(done, len(runner.blocks))
        own = _known(kept, block, formats) or dict(_solved(walk, block, formats, settings, curvatures))
        if kept is not None:
            kept.put(block.index, {linear.name: each for linear, each in own.items()})
        for linear, (encoded, line) in own.items():
            found.add(linear, formats[linear], encoded, line)
        found.behind.append(QuantisedBlock(index=block.index, error=walk.leave(block)[REPORT]))
    return found


def _record(
    setup: Setup,
    probe: Probe,
    chosen: Chosen,
    found: _Found,
    results: tuple[QuantiseLosses, CostRecord, tuple[Note, ...]],
) -> QuantiseRecord:
    loss, cost, notes = results
    weights = sum(line.weights for line in found.lines)
    return QuantiseRecord(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        conclusion=_conclusion(loss),
        model=model_record(setup),
        probe=probe.record(),
        format=chosen.name,
        bits_per_weight=sum(line.bits_per_weight * line.weights for line in found.lines) / weights,
        loss=loss,
        layers=tuple(found.lines),
        blocks=tuple(found.behind),
        skipped=chosen.skipped,
        cost=cost,
        notes=notes,
        settings=setup.settings,
        seed=setup.seed,
        versions=versions(),
    )


def _beginning(trace: Trace, tokens: int) -> Trace:
    """Return the first micro-batches of a part with at least so many predicted tokens, or all of it."""
    batches, losses, seen = [], 0, 0
    for batch in trace.batches:
        batches.append(batch)
        losses, seen = losses + len(batch.inputs), seen + int(batch.weights.sum())
        if seen >= tokens:
            break
    return Trace(batches, trace.losses[:losses], trace.tokens[:losses])


def _curvatures(
    runner: Runner, fit: Trace, chosen: dict[LinearLayer, Format], settings: QuantiseSettings, clock: Clock
) -> tuple[dict[LinearLayer, Tensor], tuple[Note, ...]]:
    """Return what the loss minds in every layer's outputs, and what to say where that is left out."""
    if not settings.curvature:
        return {}, ()
    with clock.stage("curvature"):
        found = output_curvatures(runner, fit, chosen, after_block=lambda done: clock.tell(done, len(runner.blocks)))
    return ({}, (note("no-curvature"),)) if found is None else (found, ())


def _known(
    kept: Kept | None, block: Block, chosen: dict[LinearLayer, Format]
) -> dict[LinearLayer, tuple[Encoded, QuantisedLayer]] | None:
    found = kept.get(block.index) if kept is not None else None
    if found is None:
        return None
    by_name = {linear.name: linear for linear in block.linears if linear in chosen}
    return {by_name[name]: each for name, each in found.items()} if found.keys() == by_name.keys() else None


def _solved(
    walk: Walk,
    block: Block,
    chosen: dict[LinearLayer, Format],
    settings: QuantiseSettings,
    curvatures: dict[LinearLayer, Tensor],
) -> Iterator[tuple[LinearLayer, tuple[Encoded, QuantisedLayer]]]:
    """Yield codes and line of every layer of a block; each is in place before the next group's sums are made.

    Experts that no token of fit or select was routed to are rounded to nearest.
    """
    unseen = {linear: 0 for linear in block.linears if linear in chosen}  # with the tokens of fit that it is given
    for group, (fit, select, report) in walk.groups(block):
        if not (fit.tokens and select.tokens):
            unseen.update(dict.fromkeys(group, fit.tokens))
            continue
        for linear in group:
            del unseen[linear]
        weights = [linear.weight().float() for linear in group]
        aims = targets(weights, fit, select) if settings.asymmetric else [Target(W) for W in weights]
        for linear, W, aim in zip(group, weights, aims, strict=True):
            form = chosen[linear]
            found = coded(
                W,
                aim,
                fit,
                select,
                form,
                curvature=curvatures.get(linear),
                max_sweeps=settings.max_sweeps,
                tolerance=settings.tolerance,
            )
            walk.put(linear, form.decode(found.encoded))
            yield linear, (found.encoded, _line(linear, block.index, W, form, found, fit.tokens, report))
    for linear, tokens in unseen.items():
        W, form = linear.weight().float(), chosen[linear]
        rounded = form.encode(W)
        found = LayerCodes(rounded, Target(W), 0.0, {"rounded": rounded})
        yield linear, (rounded, _line(linear, block.index, W, form, found, tokens, None))


def _line(
    linear: LinearLayer, block: int, W: Tensor, form: Format, found: LayerCodes, tokens: int, report: InputSums | None
) -> QuantisedLayer:
    d_out, d_in = W.shape
    steps = {}
    if report is not None and report.tokens:
        energy = report.energy(W) or 1.0
        steps = {step: report.excess(W, form.decode(each)) / energy for step, each in found.steps.items()}
    return QuantisedLayer(
        name=linear.name,
        parameter=linear.name.rpartition(".")[0] if linear.is_expert else None,
        block=block,
        format=form.name,
        bits_per_weight=form.bits(d_out, d_in, found.encoded.support) / W.numel(),
        weights=W.numel(),
        steps=steps,
        damping=found.damping,
        target_damping=found.target.damping,
        target_share=found.target.share,
        flipped=float((found.encoded.codes != found.steps["rounded"].codes).sum()) / W.numel(),
        fit_tokens=tokens,
    )


def _kept(encoded: Encoded, runner: Runner) -> Encoded:
    """Return codes that are kept where the model's weights are."""
    own = {part.name: getattr(encoded, part.name) for part in fields(encoded)}
    return replace(encoded, **{name: runner.kept(part) for name, part in own.items() if isinstance(part, Tensor)})


def _rounded(chosen: dict[LinearLayer, Format], runner: Runner) -> Changes:
    return {linear: runner.kept(change_to(linear, form.project(linear.weight()))) for linear, form in chosen.items()}


def _losses(session: ReportSession, changes: Changes, rounded: Changes) -> QuantiseLosses:
    report = session.report
    found, nearest = session.losses(report, changes), session.losses(report, rounded)
    return QuantiseLosses(
        parent=report.mean,
        rounded=report.mean_of(nearest),
        quantised=report.mean_of(found),
        damage=session.gain(found, report.losses).interval(),
        rounding_damage=session.gain(nearest, report.losses).interval(),
        recovered=session.gain(nearest, found).interval(),
    )


def _conclusion(loss: QuantiseLosses) -> QuantiseConclusion:
    if loss.damage.low <= 0:
        return QuantiseConclusion(case="no-damage")
    return QuantiseConclusion(case="better-than-rounding" if loss.recovered.low > 0 else "no-better")
