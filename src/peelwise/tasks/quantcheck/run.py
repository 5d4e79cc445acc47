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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from peelwise.engine.clock import Clock, Watcher
from peelwise.engine.in_order import few_tokens
from peelwise.engine.opening import checked_blocks
from peelwise.engine.provenance import Setup, model_record, versions
from peelwise.engine.session import LOSSES, Changes, ReportSession, change_to
from peelwise.formats.membership import scaled_part
from peelwise.model.fingerprint import identify
from peelwise.model.guard import untouched
from peelwise.model.layers import Block, LinearLayer, device_of
from peelwise.model.runner import Runner
from peelwise.model.selfcheck import self_check
from peelwise.model.trace import Trace
from peelwise.model.weights.activations import float_inputs, rounded_inputs
from peelwise.model.weights.held import Held
from peelwise.model.weights.reading import reading_of
from peelwise.probe.probe import Probe
from peelwise.records.base import ModelRecord, Note, SplitRecord, note
from peelwise.records.quantcheck import LayerCheck, QuantcheckConclusion, QuantcheckRecord, QuantLosses
from peelwise.tasks.quantcheck.finetune import survival
from peelwise.tasks.quantcheck.in_order import solve_in_order
from peelwise.tasks.quantcheck.inputs import QuantisedInputs, input_errors, quantised_inputs
from peelwise.tasks.quantcheck.layers import Candidate, Layer, held_of, input_sums, matched
from peelwise.tasks.quantcheck.settings import QuantcheckSettings

# Of the budget, when each way of finding codes ends; the losses with them come after.
_ALONE_SHARE, _IN_ORDER_SHARE = 0.45, 0.9


@dataclass
class _Found:
    layers: list[LayerCheck] = field(default_factory=list)
    changes: Changes = field(default_factory=dict)
    complete: bool = True


@dataclass(frozen=True)
class _Base:
    """The model before a fine-tune: its losses on report, the weights under the parent's layers, its record."""

    losses: Tensor
    weights: Mapping[LinearLayer, Callable[[], Tensor]]
    record: ModelRecord


def run_quantcheck(
    quantised: Candidate,
    parent: Candidate,
    probe: Probe,
    settings: QuantcheckSettings,
    watcher: Watcher | None = None,
    base: Candidate | None = None,
) -> QuantcheckRecord:
    """Compare the two and leave both as they were.

    Args:
        quantised: the model whose bits are in question.
        parent: the model that it was made from.
        probe: the text: fit for the inputs' sums, select to accept the better weights, report for every loss shown.
        settings: budget and effort.
        watcher: told about progress.
        base: the model before a fine-tune that made the parent; then the record says how much of that survives.

    Raises:
        ModelError: If the parent has other layers, shapes or another vocabulary.
        FormatError: If no layer is quantised, or one does not hold what its format says.
    """
    blocks, above = checked_blocks(quantised.model, probe), checked_blocks(parent.model, probe)
    pairs = matched(quantised, parent, blocks, above)
    held = held_of(quantised, blocks, settings.parsed_format())
    before = _base_of(base, parent, above, probe, settings)
    inputs = quantised_inputs(quantised.model, held, settings)
    with untouched(quantised.model), untouched(parent.model), ExitStack() as weights_alone:
        weights_alone.enter_context(float_inputs(inputs.themselves))
        runner = Runner(quantised.model, blocks, micro_batch_tokens=settings.micro_batch_tokens)
        other = Runner(parent.model, above, micro_batch_tokens=settings.micro_batch_tokens)
        other.work = runner.work
        clock = Clock(settings.budget_seconds, runner.work, watcher)
        with clock.stage(LOSSES):
            checked = self_check(runner, probe.fit)
            self_check(other, probe.fit)
            above_of = [other.trace(part) for part in (probe.fit, probe.select, probe.report)]
            select, session = runner.trace(probe.select), ReportSession(runner, runner.trace(probe.report))
        with clock.stage("best-weights"):
            found = _solve_all(
                other, above_of, {pairs[m]: (m, h) for m, h in held.items()}, before, inputs, settings, clock
            )
        with clock.stage("codes"):
            stop = _IN_ORDER_SHARE * clock.budget
            in_order: Changes = {}
            reached = clock.elapsed <= stop
            if reached:
                parts = above_of[:2], (runner.trace(probe.fit), select)
                in_order, reached = solve_in_order(other, runner, parts, pairs, held, settings, clock, stop)
        with clock.stage("best-weights-losses"):
            loss = _losses(session, (found.changes, in_order), select, above_of[-1])
        fine_tune = None
        if before is not None:
            with clock.stage("fine-tune"):
                weights = {pairs[m]: h.weight for m, h in held.items()}
                parent_session = ReportSession(other, above_of[-1])
                losses = before.losses, session.report.losses
                fine_tune = survival(parent_session, *losses, weights, tuple(found.layers), before.record, clock)
        if inputs:
            with clock.stage("quantised-inputs"):
                weights_alone.close()
                loss = _with_inputs(loss, session, inputs)
        cost = clock.record(probe.fit.tokens + probe.select.tokens + probe.report.tokens, device_of(quantised.model))
    records = [_model_record(c, b, probe.seed) for c, b in ((quantised, blocks), (parent, above))]
    return QuantcheckRecord(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        conclusion=_conclusion(loss),
        complete=found.complete and reached,
        quantised=records[0],
        parent=records[1],
        probe=probe.record(),
        loss=loss,
        layers=tuple(found.layers),
        fine_tune=fine_tune,
        activations=inputs.names,
        cost=cost,
        notes=(
            *checked,
            *few_tokens((m, int(above_of[0].predicted)) for m in held if not m.is_expert),
            *_notes(quantised.model, parent.model, held, ended=not (found.complete and reached)),
        ),
        settings=settings.plain(),
        seed=probe.seed,
        versions=versions(),
    )


def _base_of(
    base: Candidate | None, parent: Candidate, above: tuple[Block, ...], probe: Probe, settings: QuantcheckSettings
) -> _Base | None:
    if base is None:
        return None
    blocks = checked_blocks(base.model, probe)
    pairs = matched(parent, base, above, blocks)
    with untouched(base.model):
        losses = Runner(base.model, blocks, micro_batch_tokens=settings.micro_batch_tokens).trace(probe.report).losses
    return _Base(losses, {m: twin.weight for m, twin in pairs.items()}, _model_record(base, blocks, probe.seed))


def _solve_all(
    runner: Runner,
    parts: Sequence[Trace],
    held: dict[LinearLayer, tuple[LinearLayer, Held]],
    before: _Base | None,
    inputs: QuantisedInputs,
    settings: QuantcheckSettings,
    clock: Clock,
) -> _Found:
    """Solve every map of the parent, block by block; one block's sums on all ``parts`` are alive at a time."""
    found = _Found()
    stop = _ALONE_SHARE * clock.budget
    for done, block in enumerate(runner.blocks):
        clock.tell(done, len(runner.blocks))
        sums = [input_sums(runner, block, trace) for trace in parts]
        rounding = input_errors(runner, block, parts[-1], {m: own for m, (own, _) in held.items()}, inputs)
        for twin in (m for m in block.linears if m in held):
            linear, own = held[twin]
            found.complete &= clock.elapsed <= stop
            W, base = twin.weight().float(), None if before is None else before.weights[twin]()
            fit, select, report = (each[twin] for each in sums)
            layer = Layer(linear.name, block.index, W, own, fit, select, report, base, rounding.get(twin))
            encoded, damping = layer.best(settings) if found.complete and layer.has_codes else (None, None)
            found.layers.append(layer.checked(encoded, damping))
            if encoded is not None:
                found.changes[linear] = change_to(linear, own.format.decode(encoded))
    return found


def _losses(session: ReportSession, candidates: Sequence[Changes], select: Trace, parent: Trace) -> QuantLosses:
    """Return the losses on report; of the better weights those that lower the loss on select most, if any do."""
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
    inside = {f"{linear.name}.weight" for linear in held}
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


def _model_record(candidate: Candidate, blocks: tuple[Block, ...], seed: int) -> ModelRecord:
    model = candidate.model
    return model_record(Setup(model, blocks, candidate.name, candidate.source, identify(model), {}, seed))
