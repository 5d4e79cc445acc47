"""A quantised model against its full-precision parent: which part of the damage the bits explain, and which they do
not.

For every linear map with the parent's weights ``T`` and inputs ``x`` of the parent, ``S = E[x x^T]`` over a part of the
probe:

    current    tr((W - T) S (W - T)^T)      the map's output error as it is quantised now
    achieved   the same for the best codes and scales of its format that were found
    relaxed    0 but for structural zeros: the parent itself

on report. The codes are found in ``S + damping * tr(S)/d I`` of the fit tokens, with the damping, and whether they are
taken at all, by the error on select: few tokens leave directions in which undamped sums allow any error. And for the
loss on report: the parent's, the present one, and the one with all the better codes in place.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from peelwise.errors import FormatError, ModelError
from peelwise.formats.base import Encoded, Format
from peelwise.formats.recover import recover
from peelwise.model.capture import captured
from peelwise.model.checkpoints import fingerprint, gguf_file
from peelwise.model.effective import Held
from peelwise.model.gguf_blocks import stored_maps
from peelwise.model.guard import untouched
from peelwise.model.layers import Block, LinearMap, device_of, vocabulary_size
from peelwise.model.runner import MICRO_BATCH_TOKENS, Runner, Trace
from peelwise.model.splice import spliced
from peelwise.pipeline.bench import LOSSES, ChangeMap, gain
from peelwise.pipeline.clock import Clock, Watcher
from peelwise.pipeline.opening import checked_blocks
from peelwise.pipeline.summary import Setup, model_record, versions
from peelwise.pipeline.sweep import token_rows
from peelwise.probes import Probe
from peelwise.quant_records import LayerCheck, QuantcheckRecord, QuantLosses
from peelwise.records import ModelRecord, SplitRecord
from peelwise.references.coded import damped
from peelwise.references.quantized import lowest_on_support, quadratic, solve
from peelwise.stats.gram import GramSum

_SOLVE_SHARE = 0.9  # of the budget; the losses with the better weights come after it


@dataclass(frozen=True)
class QuantcheckSettings:
    """What a user may choose.

    Attributes:
        budget_seconds: wall time; layers that are not reached are said not to be measured.
        form: the format of plain weights that were quantised and saved as such; ``None`` if the modules say it
        themselves.
        max_sweeps: most sweeps of coordinate descent per layer and start.
        tolerance: a sweep that lowers a layer's error by less than this part is the last.
        dampings: of the inputs' sums that select chooses from, in units of the mean diagonal.
        micro_batch_tokens: tokens that go through a model at a time.
    """

    budget_seconds: float = 600.0
    form: Format | None = None
    max_sweeps: int = 5
    tolerance: float = 0.01
    dampings: tuple[float, ...] = (0.0, 1e-2, 1e-1, 1.0)
    micro_batch_tokens: int = MICRO_BATCH_TOKENS


@dataclass(frozen=True)
class Candidate:
    """A model with what the record says about it."""

    model: nn.Module
    name: str
    source: str | None = None


@dataclass
class _Found:
    layers: list[LayerCheck] = field(default_factory=list)
    changes: ChangeMap = field(default_factory=dict)
    complete: bool = True


def run_quantcheck(
    quantised: Candidate,
    parent: Candidate,
    probe: Probe,
    settings: QuantcheckSettings,
    watcher: Watcher | None = None,
) -> QuantcheckRecord:
    """Compare the two and leave both as they were.

    Args:
        quantised: the model whose bits are in question.
        parent: the model that it was made from.
        probe: the text: fit for the inputs' sums, select to accept the better weights, report for every loss shown.
        settings: budget and effort.
        watcher: told about progress.

    Raises:
        ModelError: If the parent has other layers, shapes or another vocabulary.
        FormatError: If no layer is quantised, or one does not hold what its format says.
    """
    blocks, above = checked_blocks(quantised.model, probe), checked_blocks(parent.model, probe)
    pairs = matched(quantised, parent, blocks, above)
    held = held_of(quantised, blocks, settings.form)
    with untouched(quantised.model), untouched(parent.model):
        runner = Runner(quantised.model, blocks, micro_batch_tokens=settings.micro_batch_tokens)
        other = Runner(parent.model, above, micro_batch_tokens=settings.micro_batch_tokens)
        other.work = runner.work
        clock = Clock(settings.budget_seconds, runner.work, watcher)
        with clock.stage(LOSSES):
            above_of = [other.trace(part) for part in (probe.fit, probe.select, probe.report)]
            select, report = runner.trace(probe.select), runner.trace(probe.report)
        with clock.stage("best weights of every layer"):
            found = _solve_all(other, above_of, {pairs[m]: (m, h) for m, h in held.items()}, settings, clock)
        with clock.stage("losses with the best weights"):
            loss = _losses(runner, found.changes, select, report, above_of[-1])
        cost = clock.record(probe.fit.tokens + probe.select.tokens + probe.report.tokens, device_of(quantised.model))
    records = [_model_record(c, b, probe.seed) for c, b in ((quantised, blocks), (parent, above))]
    return QuantcheckRecord(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        conclusion=_conclusion(loss, found.layers),
        complete=found.complete,
        quantised=records[0],
        parent=records[1],
        probe=probe.record(),
        loss=loss,
        layers=tuple(found.layers),
        cost=cost,
        notes=tuple(_notes(quantised.model, parent.model, held, found, loss)),
        settings={
            "budget_seconds": settings.budget_seconds,
            "form": settings.form.name if settings.form else None,
            "max_sweeps": settings.max_sweeps,
            "tolerance": settings.tolerance,
        },
        seed=probe.seed,
        versions=versions(),
    )


def matched(
    quantised: Candidate, parent: Candidate, blocks: tuple[Block, ...], above: tuple[Block, ...]
) -> dict[LinearMap, LinearMap]:
    """Return the parent's map of every map of the quantised model.

    Raises:
        ModelError: If there is none, of this shape; or if the vocabularies differ.
    """
    sizes = vocabulary_size(quantised.model), vocabulary_size(parent.model)
    if None not in sizes and sizes[0] != sizes[1]:
        raise ModelError(
            f"{parent.name} knows {sizes[1]} tokens, {quantised.name} {sizes[0]}: it is not its parent. Give the model "
            "that was quantised."
        )
    if len(blocks) != len(above):
        raise ModelError(
            f"{parent.name} has {len(above)} blocks, {quantised.name} {len(blocks)}: it is not its parent. Give the "
            "model that was quantised."
        )
    by_name = {linear.name: linear for block in above for linear in block.linears}
    pairs = {}
    for linear in (linear for block in blocks for linear in block.linears):
        twin = by_name.get(linear.name)
        if twin is None:
            raise ModelError(f"{parent.name} has no layer {linear.name}, so it is not the parent of {quantised.name}.")
        shapes = tuple(twin.weight().shape), tuple(linear.weight().shape)
        if shapes[0] != shapes[1]:
            raise ModelError(
                f"{linear.name} is {shapes[0]} in {parent.name} and {shapes[1]} in {quantised.name}: it is not its "
                "parent. Give the model that was quantised."
            )
        pairs[linear] = twin
    return pairs


def held_of(quantised: Candidate, blocks: tuple[Block, ...], form: Format | None) -> dict[LinearMap, Held]:
    """Return what the quantised model's maps hold: by their modules, in their GGUF file, or read from plain weights.

    Raises:
        FormatError: If none is quantised, or the plain weights do not obey ``form``.
    """
    linears = [linear for block in blocks for linear in block.linears]
    found = {m: h for m in linears if m.low_bit and (h := m.held()) is not None}
    file = gguf_file(quantised.source)
    if not found and file is not None:
        found = stored_maps(file, blocks)
    if not found and form is not None:
        found = {linear: _read(linear, form) for linear in linears}
    if not found:
        raise FormatError(
            f"{quantised.name} says of no layer which format it holds. If its plain weights were quantised and saved, "
            "name the format, such as --format int3:group=32."
        )
    return found


def _read(linear: LinearMap, form: Format) -> Held:
    try:
        return Held(form, recover(linear.weight(), form))
    except FormatError as error:
        raise FormatError(f"{linear.name}: {error}") from error


def _solve_all(
    runner: Runner,
    parts: Sequence[Trace],
    held: dict[LinearMap, tuple[LinearMap, Held]],
    settings: QuantcheckSettings,
    clock: Clock,
) -> _Found:
    """Solve every map of the parent, block by block; one block's sums on all ``parts`` are alive at a time."""
    found = _Found()
    stop = _SOLVE_SHARE * clock.budget
    for done, block in enumerate(runner.blocks):
        clock.tell(done, len(runner.blocks))
        sums = [input_sums(runner, block, trace) for trace in parts]
        for twin in (m for m in block.linears if m in held):
            linear, own = held[twin]
            found.complete &= clock.elapsed <= stop
            layer = Layer(linear.name, block.index, twin.weight().float(), own, *(each[twin] for each in sums))
            encoded, damping = layer.best(settings) if found.complete else (None, None)
            found.layers.append(layer.checked(encoded, damping))
            if encoded is not None:
                change = own.format.decode(encoded).to(layer.T) - own.weight.to(layer.T)
                found.changes[linear] = torch.nn.functional.pad(change, (0, int(linear.has_bias)))
    return found


@torch.no_grad()
def input_sums(runner: Runner, block: Block, trace: Trace) -> dict[LinearMap, Tensor]:
    """Return ``S = E[x x^T] [d_in, d_in]`` of every map of a block over the predicted tokens, float32.

    Maps that share an input share the tensor. A bias is the same in both models, so no column of ones is added.
    """
    totals: dict[LinearMap, GramSum] = {}
    first_of: dict[LinearMap, LinearMap] = {}
    for batch in trace.batches:
        with captured(block.linears) as capture:
            runner.run_block(block, batch.stations[block.index], batch)
        first_of.update(capture.groups)
        for first in set(capture.groups.values()):
            rows = token_rows(capture.inputs[first], batch, first, ones=False)
            totals.setdefault(first, GramSum()).update(rows)
    runner.work.add(runner.shares[block.index], float(trace.tokens.sum()))
    means = {first: total.mean().float() for first, total in totals.items()}
    return {linear: means[first] for linear, first in first_of.items()}


@dataclass(frozen=True, eq=False)
class Layer:
    """One map: the parent's weights ``T``, what the quantised model holds, and the sums of the parent's inputs."""

    name: str
    block: int
    T: Tensor  # [d_out, d_in]
    own: Held
    fit: Tensor  # [d_in, d_in]
    select: Tensor
    report: Tensor

    def error(self, S: Tensor, encoded: Encoded) -> float:
        """Return ``tr((W - T) S (W - T)^T)`` of what codes stand for."""
        return float(quadratic(S, self.own.format.decode(encoded).to(self.T) - self.T).sum())

    def best(self, settings: QuantcheckSettings) -> tuple[Encoded, float]:
        """Return the codes found and the damping of the sums they were found in; those in use if no others do better.

        Every damping of the settings gets rounding with error feedback; the one that does best on select is solved.
        """
        form, starts = self.own.format, [self.own.encoded]
        rough = {
            d: self.error(self.select, solve(damped(self.fit, d), self.T, form, starts=starts, max_sweeps=0).encoded)
            for d in settings.dampings
        }
        damping = min(rough, key=lambda d: rough[d])
        found = solve(
            damped(self.fit, damping),
            self.T,
            form,
            starts=starts,
            max_sweeps=settings.max_sweeps,
            tolerance=settings.tolerance,
        ).encoded
        better = self.error(self.select, found) < self.error(self.select, self.own.encoded)
        return (found if better else self.own.encoded), damping

    def checked(self, encoded: Encoded | None, damping: float | None) -> LayerCheck:
        """Return the layer's line; with its parts if codes were looked for."""
        T, own, S = self.T, self.own, self.report
        energy = float(quadratic(S, T).sum()) or 1.0
        current = self.error(S, own.encoded)
        d_out, d_in = T.shape
        plain = LayerCheck(
            name=self.name,
            block=self.block,
            format=own.format.name,
            bits_per_weight=own.format.bits(d_out, d_in, own.encoded.support) / T.numel(),
            error=current / energy,
        )
        if encoded is None:
            return plain
        achieved, relaxed = self.error(S, encoded), 0.0
        if own.encoded.support is not None:
            relaxed = float(quadratic(S, lowest_on_support(S, T, own.encoded.support).to(T) - T).sum())
        return plain.model_copy(
            update={
                "rounded": self.error(S, own.format.encode(T, own.encoded.support)) / energy,
                "flipped": float((encoded.codes != own.encoded.codes).sum()) / T.numel(),
                "damping": damping,
                "split": SplitRecord(
                    irreducible=relaxed / energy,
                    price_of_precision=(achieved - relaxed) / energy,
                    left_on_the_table=(current - achieved) / energy,
                ),
            }
        )


def _losses(runner: Runner, changes: ChangeMap, select: Trace, report: Trace, parent: Trace) -> QuantLosses:
    """Return the losses on report; the better weights are taken only if they lower the loss on select."""
    best, kept = report.losses, False
    with ExitStack() as stack:
        stack.enter_context(spliced(changes))
        after = float(runner.losses_from(select, 0).sum() / select.tokens.sum())
        kept = after < select.mean
        if kept:
            best = runner.losses_from(report, 0)
    mean = float(best.sum() / report.tokens.sum())
    return QuantLosses(
        parent=parent.mean,
        quantised=report.mean,
        best=mean,
        damage=gain(report.losses, parent.losses, report).interval(),
        left=gain(report.losses, best, report).interval(),
        price=gain(best, parent.losses, report).interval(),
        split=SplitRecord(
            irreducible=parent.mean, price_of_precision=mean - parent.mean, left_on_the_table=report.mean - mean
        ),
        kept=kept,
    )


def _conclusion(loss: QuantLosses, layers: list[LayerCheck]) -> str:
    damage, left = loss.damage, loss.left
    if damage.low <= 0:
        return f"Quantising costs {damage.mean:+.4f} nats per token here, which is not shown to be anything."
    part = f"{100 * left.mean / damage.mean:.0f} % of the damage" if damage.mean > 0 else "of it"
    if left.low > 0:
        return (
            f"Quantising costs {damage.mean:.4f} nats per token, of which {left.mean:.4f} ({part}) are left on the "
            "table: other codes and scales of the same formats win them back on text they were not fitted on."
        )
    solved = sum(layer.split is not None for layer in layers)
    return (
        f"Quantising costs {damage.mean:.4f} nats per token. The best weights found inside the formats ({solved} of "
        f"{len(layers)} layers) are not shown to win anything back."
    )


def _notes(
    quantised: nn.Module, parent: nn.Module, held: dict[LinearMap, Held], found: _Found, loss: QuantLosses
) -> Iterator[str]:
    yield "Inputs are the parent's; errors of layers are on report, parts of its mean squared output there."
    if not loss.kept:
        yield "The better weights of the layers do not lower the loss on select, so none of them are taken."
    if not found.complete:
        yield "The budget ended before every layer was solved; a larger --budget measures the rest."
    others = _other_differences(quantised, parent, held)
    if others:
        yield (
            f"{len(others)} other tensors differ too, such as {others[0]} (embedding, norms, head): what they cost "
            "counts as price of precision."
        )


def _other_differences(quantised: nn.Module, parent: nn.Module, held: dict[LinearMap, Held]) -> list[str]:
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
    return model_record(Setup(model, blocks, candidate.name, candidate.source, fingerprint(model), {}, seed))
