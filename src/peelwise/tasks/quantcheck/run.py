"""A quantised model against its full-precision parent: which part of the damage the bits explain, and which they do
not.

For every linear layer with the weights ``T`` of the parent and its inputs ``x``, ``S = E[x x^T]`` over a part of the
probe:

    current    tr((W - T) S (W - T)^T)      the layer's output error as it is quantised now
    achieved   the same for the best codes and scales of its format that were found
    relaxed    0 but for structural zeros: the parent itself

on report. The codes are found in ``S + damping * tr(S)/d I`` of the fit tokens, with the damping, and whether they are
taken at all, by the error on select: few tokens leave directions in which undamped sums allow any error.

And for the loss on report: the parent's, the present one, and the one with better codes in place. Two sets of them are
tried, and the one with the lower loss on select is taken: those of each layer by itself, and those of layers one after
the other, for the inputs that they really get from the better codes before them (`references.asymmetric`).
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from peelwise.engine.clock import Watcher
from peelwise.engine.curvature import output_curvatures
from peelwise.engine.in_order import few_tokens
from peelwise.engine.provenance import versions
from peelwise.engine.session import Changes, ReportSession, change_to
from peelwise.formats.membership import scaled_part
from peelwise.model.guard import untouched
from peelwise.model.layers import Block, LinearLayer, device_of
from peelwise.model.weights.activations import float_inputs, rounded_inputs
from peelwise.model.weights.held import Held
from peelwise.model.weights.reading import reading_of
from peelwise.probe.probe import Probe
from peelwise.records.base import CostRecord, Note, SplitRecord, note
from peelwise.records.quantcheck import (
    FineTuneRecord,
    LayerCheck,
    QuantcheckConclusion,
    QuantcheckRecord,
    QuantLosses,
)
from peelwise.tasks.quantcheck.finetune import survival
from peelwise.tasks.quantcheck.in_order import solve_in_order
from peelwise.tasks.quantcheck.inputs import QuantisedInputs, input_errors
from peelwise.tasks.quantcheck.kept import BlockAlone, Kept
from peelwise.tasks.quantcheck.layers import Candidate, Layer, input_sums
from peelwise.tasks.quantcheck.settings import QuantcheckSettings
from peelwise.tasks.quantcheck.sides import OnText, Sides, on_text, opened, record_of

# Of the budget, when each way of finding codes ends; the losses with them come after.
_ALONE_SHARE, _IN_ORDER_SHARE = 0.45, 0.9


@dataclass
class _Found:
    """Better codes of each layer by itself and of layers in running order, and the lines of all layers."""

    layers: list[LayerCheck] = field(default_factory=list)
    alone: Changes = field(default_factory=dict)
    in_order: Changes = field(default_factory=dict)
    tokens: dict[LinearLayer, int] = field(default_factory=dict)  # of fit that each layer is given
    complete: bool = True


def run_quantcheck(
    quantised: Candidate,
    parent: Candidate,
    probe: Probe,
    settings: QuantcheckSettings,
    watcher: Watcher | None = None,
    base: Candidate | None = None,
    kept: Kept | None = None,
) -> QuantcheckRecord:
    """Compare the two and leave both as they were.

    Args:
        quantised: the model whose bits are in question.
        parent: the model that it was made from.
        probe: the text: fit for the inputs' sums, select to accept the better weights, report for every loss shown.
        settings: budget and effort.
        watcher: told about progress.
        base: the model before a fine-tune that made the parent; then the record says how much of that survives.
        kept: where what is found of each block is kept, so that an interrupted run can go on.

    Raises:
        ModelError: If the parent has other layers, shapes or another vocabulary.
        FormatError: If no layer is quantised, or one does not hold what its format says.
    """
    sides = opened(quantised, parent, base, probe, settings)
    with untouched(quantised.model), untouched(parent.model), ExitStack() as weights_alone:
        weights_alone.enter_context(float_inputs(sides.inputs.themselves))
        text = on_text(sides, probe, settings, watcher)
        found = _better_codes(sides, text, probe, settings, kept)
        with text.clock.stage("best-weights-losses"):
            loss = _losses(text, (found.alone, found.in_order))
        fine_tune = _fine_tune(sides, text, found)
        if sides.inputs:
            with text.clock.stage("quantised-inputs"):
                weights_alone.close()
                loss = _with_inputs(loss, text.session, sides.inputs)
        tokens = probe.fit.tokens + probe.select.tokens + probe.report.tokens
        cost = text.clock.record(tokens, device_of(quantised.model))
    return _record(sides, text, probe, settings, (found, loss, fine_tune, cost))


def _better_codes(sides: Sides, text: OnText, probe: Probe, settings: QuantcheckSettings, kept: Kept | None) -> _Found:
    """Look for better codes of all layers, each by itself and then in running order, as far as the budget goes."""
    clock, curvatures = text.clock, {}
    if clock.elapsed <= _ALONE_SHARE * clock.budget:
        with clock.stage("curvature"):
            curvatures = output_curvatures(text.other, text.above[0], sides.quantised_under) or {}
    with clock.stage("best-weights"):
        found = _each_alone(sides, text, curvatures, settings, kept)
    with clock.stage("codes"):
        stop = _IN_ORDER_SHARE * clock.budget
        reached = clock.elapsed <= stop
        if reached:
            parts = text.above[:2], (text.runner.trace(probe.fit), text.select)
            found.in_order, reached = solve_in_order(
                text.other, text.runner, parts, sides.twins, sides.held, curvatures, settings, clock, stop, kept
            )
        found.complete &= reached
    return found


def _each_alone(
    sides: Sides,
    text: OnText,
    curvatures: Mapping[LinearLayer, Tensor],
    settings: QuantcheckSettings,
    kept: Kept | None,
) -> _Found:
    """Solve every layer of the parent, block by block; one block's sums on all parts are alive at a time."""
    found, clock, under = _Found(), text.clock, sides.quantised_under
    for done, block in enumerate(text.other.blocks):
        clock.tell(done, len(text.other.blocks))
        known = kept.alone(block.index) if kept is not None else None
        own = known or _block_alone(sides, text, block, curvatures, settings)
        if kept is not None and known is None and own.complete:
            kept.keep_alone(block.index, own)
        found.layers += own.lines
        found.complete &= own.complete
        for twin in (m for m in block.linears if m in under):
            linear, held = under[twin]
            found.tokens[twin] = own.tokens[linear.name]
            if linear.name in own.codes:
                found.alone[linear] = text.runner.kept(change_to(linear, held.format.decode(own.codes[linear.name])))
    return found


def _block_alone(
    sides: Sides,
    text: OnText,
    block: Block,
    curvatures: Mapping[LinearLayer, Tensor],
    settings: QuantcheckSettings,
) -> BlockAlone:
    """Solve the layers of one of the parent's blocks, each by itself."""
    found, clock, under = BlockAlone(), text.clock, sides.quantised_under
    sums = [input_sums(text.other, block, trace) for trace in text.above]
    owns = {twin: own for twin, (own, _) in under.items()}
    rounding = input_errors(text.other, block, text.above[-1], owns, sides.inputs)
    for twin in (m for m in block.linears if m in under):
        linear, held = under[twin]
        found.complete &= clock.elapsed <= _ALONE_SHARE * clock.budget
        fit, select, report = (each[twin] for each in sums)
        layer = Layer(
            linear.name,
            block.index,
            twin.weight().float(),
            held,
            fit.zz,
            select.zz,
            report.zz,
            F=curvatures.get(twin),
            part=report.tokens / text.above[-1].predicted,
            base=None if sides.before is None else sides.before.weights[twin](),
            input_error=rounding.get(twin),
        )
        reached = bool(fit.tokens and select.tokens)
        wanted = found.complete and layer.has_codes and reached
        encoded, damping = layer.best(settings) if wanted else (None, None)
        found.lines.append(_line(linear, layer.checked(encoded, damping), reached))
        found.tokens[linear.name] = fit.tokens
        if encoded is not None:
            found.codes[linear.name] = encoded
    return found


def _line(linear: LinearLayer, line: LayerCheck, reached: bool) -> LayerCheck:
    parameter = linear.name.rpartition(".")[0] if linear.is_expert else None
    return line.model_copy(update={"parameter": parameter, "codes": line.codes and reached})


def _losses(text: OnText, candidates: Sequence[Changes]) -> QuantLosses:
    """Return the losses on report; of the better weights those that lower the loss on select most, if any do."""
    session, select, parent = text.session, text.select, text.above[-1]
    report = session.report
    losses = [(select.mean_of(session.losses(select, each)), each) for each in candidates if each]
    lowest, changes = min(losses, key=lambda pair: pair[0], default=(select.mean, {}))
    kept = lowest < select.mean
    best = session.losses(report, changes) if kept else report.losses
    mean = report.mean_of(best)
    return QuantLosses(
        parent=parent.mean,
        quantised=report.mean,
        best=mean,
        damage=session.gain(report.losses, parent.losses).interval(),
        left=session.gain(report.losses, best).interval(),
        price=session.gain(best, parent.losses).interval(),
        split=SplitRecord(
            irreducible=parent.mean, price_of_precision=mean - parent.mean, left_on_the_table=report.mean - mean
        ),
        kept=kept,
    )


def _fine_tune(sides: Sides, text: OnText, found: _Found) -> FineTuneRecord | None:
    """Return how much of a fine-tune survives, if the model before it is known."""
    before = sides.before
    if before is None:
        return None
    with text.clock.stage("fine-tune"):
        weights = {twin: held.weight for twin, (_, held) in sides.quantised_under.items()}
        session, losses = ReportSession(text.other, text.above[-1]), (before.losses, text.session.report.losses)
        return survival(session, *losses, weights, tuple(found.layers), before.record, text.clock)


def _with_inputs(loss: QuantLosses, session: ReportSession, inputs: QuantisedInputs) -> QuantLosses:
    """Return the losses with that of the model as it runs, with quantised inputs."""
    report = session.report
    with rounded_inputs(inputs.before):
        as_run = session.losses(report)
    cost = session.gain(as_run, report.losses).interval()
    return loss.model_copy(update={"as_run": report.mean_of(as_run), "activations": cost})


def _conclusion(loss: QuantLosses) -> QuantcheckConclusion:
    if loss.damage.low <= 0:
        return QuantcheckConclusion(case="no-damage")
    return QuantcheckConclusion(case="recoverable" if loss.left.low > 0 else "none-found")


def _record(
    sides: Sides,
    text: OnText,
    probe: Probe,
    settings: QuantcheckSettings,
    results: tuple[_Found, QuantLosses, FineTuneRecord | None, CostRecord],
) -> QuantcheckRecord:
    found, loss, fine_tune, cost = results
    return QuantcheckRecord(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        conclusion=_conclusion(loss),
        complete=found.complete,
        quantised=record_of(sides.quantised, sides.blocks, probe.seed),
        parent=record_of(sides.parent, sides.above, probe.seed),
        probe=probe.record(),
        loss=loss,
        layers=tuple(_with_shares(found.layers)),
        fine_tune=fine_tune,
        activations=sides.inputs.names,
        cost=cost,
        notes=(
            *text.notes,
            *few_tokens(found.tokens.items()),
            *_notes(sides.quantised.model, sides.parent.model, sides.held, ended=not found.complete),
        ),
        settings=settings.plain(),
        seed=probe.seed,
        versions=versions(),
    )


def _with_shares(layers: Sequence[LayerCheck]) -> Iterator[LayerCheck]:
    total = sum(layer.predicted or 0.0 for layer in layers)
    for layer in layers:
        known = layer.predicted is not None and total > 0
        yield layer.model_copy(update={"share": (layer.predicted or 0.0) / total}) if known else layer


def _notes(quantised: nn.Module, parent: nn.Module, held: dict[LinearLayer, Held], *, ended: bool) -> Iterator[Note]:
    if ended:
        yield note("budget-ended")
    unread = {h.format.name for h in held.values() if scaled_part(h.format) is None}
    if unread and reading_of(quantised) is None:
        layers = sum(h.format.name in unread for h in held.values())
        yield note("read-as-numbers", method=", ".join(sorted(unread)), layers=layers, codes=len(held) - layers)
    others = _other_differences(quantised, parent, held)
    if others:
        yield note("other-tensors", count=len(others), name=others[0])


def _other_differences(quantised: nn.Module, parent: nn.Module, held: dict[LinearLayer, Held]) -> list[str]:
    """Return the parameters outside the quantised maps that are not the parent's."""
    inside = {linear.name.rpartition(".")[0] if linear.is_expert else f"{linear.name}.weight" for linear in held}
    theirs = dict(parent.named_parameters())
    return [
        name
        for name, parameter in quantised.named_parameters()
        if name not in inside
        and name in theirs
        and (
            parameter.shape != theirs[name].shape
            or not torch.equal(parameter.detach().float(), theirs[name].detach().float().to(parameter.device))
        )
    ]
