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
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from torch import Tensor, nn

from peelwise.engine.clock import Clock, Watcher
from peelwise.engine.curvature import output_curvatures
from peelwise.engine.fitting import check_fits
from peelwise.engine.in_order import Walk, few_tokens
from peelwise.engine.opening import checked_blocks
from peelwise.engine.provenance import Setup, model_record, versions
from peelwise.engine.session import LOSSES, Changes, ReportSession, change_to
from peelwise.errors import FormatError
from peelwise.formats.base import Encoded, Format
from peelwise.model.fingerprint import identify
from peelwise.model.guard import untouched
from peelwise.model.layers import Block, LinearLayer, device_of
from peelwise.model.runner import Runner
from peelwise.model.selfcheck import self_check
from peelwise.model.trace import Trace
from peelwise.probe.probe import Probe
from peelwise.records.base import Note, note
from peelwise.records.quantise import (
    QuantiseConclusion,
    QuantisedBlock,
    QuantisedLayer,
    QuantiseLosses,
    QuantiseRecord,
)
from peelwise.references.asymmetric import InputSums, LayerCodes, Target, coded, targets
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
    chosen, skipped = _chosen(blocks, settings)
    with untouched(model):
        runner = Runner(model, blocks, micro_batch_tokens=settings.micro_batch_tokens)
        clock = Clock(math.inf, runner.work, watcher)
        with clock.stage(LOSSES):
            notes = self_check(runner, probe.fit)
            traces = [runner.trace(part) for part in (probe.fit, probe.select, probe.report)]
        walked = [*traces[:REPORT], _beginning(traces[REPORT], REPORTED_STEPS)]
        walk = Walk(runner, runner, {linear: linear for linear in chosen}, walked, walked)
        session = ReportSession(runner, traces[REPORT])
        codes: dict[str, tuple[Format, Encoded]] = {}
        lines: list[QuantisedLayer] = []
        behind: list[QuantisedBlock] = []
        curvatures, more = _curvatures(runner, traces[FIT], chosen, settings, clock)
        with clock.stage("codes"):
            for done, block in enumerate(blocks):
                clock.tell(done, len(blocks))
                found = _known(kept, block, chosen) or dict(_solved(walk, block, chosen, settings, curvatures))
                if kept is not None:
                    kept.put(block.index, {linear.name: each for linear, each in found.items()})
                for linear, (encoded, line) in found.items():
                    codes[linear.name] = chosen[linear], _kept(encoded, runner)
                    lines.append(line)
                    walk.put(linear, chosen[linear].decode(encoded))
                behind.append(QuantisedBlock(index=block.index, error=walk.leave(block)[REPORT]))
        with clock.stage("codes-losses"):
            loss = _losses(session, walk.changes, _rounded(chosen, runner))
        cost = clock.record(probe.fit.tokens + probe.select.tokens + probe.report.tokens, device_of(model))
    seen = {line.name: line.fit_tokens or 0 for line in lines}
    record = QuantiseRecord(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        conclusion=_conclusion(loss),
        model=model_record(Setup(model, blocks, name, source, identify(model), {}, probe.seed)),
        probe=probe.record(),
        format=settings.parsed_format().name,
        bits_per_weight=sum(r.bits_per_weight * r.weights for r in lines) / sum(r.weights for r in lines),
        loss=loss,
        layers=tuple(lines),
        blocks=tuple(behind),
        skipped=tuple(skipped),
        cost=cost,
        notes=(*notes, *more, *few_tokens((linear, seen[linear.name]) for linear in chosen)),
        settings=settings.plain(),
        seed=probe.seed,
        versions=versions(),
    )
    return Quantised(record, codes)


def _chosen(blocks: tuple[Block, ...], settings: QuantiseSettings) -> tuple[dict[LinearLayer, Format], list[str]]:
    """Return the format of every layer that is to be quantised, and the names of the others."""
    form, plan = settings.parsed_format(), settings.parsed_plan()
    linears = [linear for block in blocks for linear in block.linears]
    unknown = [one for one in plan if one not in {linear.name for linear in linears}]
    if unknown:
        raise FormatError(f"The plan names {unknown[0]}, which is no linear layer of the model's blocks.")
    names = {word for linear in linears for word in _words(linear)}
    for word in settings.skip:
        if word not in names:
            raise FormatError(f"skip names {word!r}, which is no linear layer of the model's blocks. Correct its name.")
    chosen: dict[LinearLayer, Format] = {}
    skipped = []
    for linear in linears:
        own = plan.get(linear.name, form)
        left = not _words(linear).isdisjoint(settings.skip)
        if left or own.name.startswith("dense") or not (linear.is_plain or linear.is_expert):
            skipped.append(linear.name)
            continue
        chosen[linear] = own
    if not chosen:
        raise FormatError(
            "No linear layer is left to quantise inside the blocks. Skip fewer layers, or give another model."
        )
    for linear, own in chosen.items():  # before any work is done
        try:
            check_fits(linear, own, chosen, "--format")
        except FormatError as error:
            raise FormatError(f"{error} Or leave it out with --skip {linear.name}.") from error
    return chosen, skipped


def _words(linear: LinearLayer) -> set[str]:
    """Return what a layer may be called: its name and the last part of it, of an expert those of its parameter."""
    name = linear.name.rpartition(".")[0] if linear.is_expert else linear.name
    return {linear.name, name, name.rpartition(".")[2]}


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
