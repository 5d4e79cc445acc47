"""The two models of a comparison: which layer belongs to which, and both of them on the text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from peelwise.engine.clock import Clock, Watcher
from peelwise.engine.opening import checked_blocks
from peelwise.engine.provenance import Setup, model_record
from peelwise.engine.session import LOSSES, ReportSession
from peelwise.model.fingerprint import identify
from peelwise.model.guard import untouched
from peelwise.model.layers import Block, LinearLayer
from peelwise.model.runner import Runner
from peelwise.model.selfcheck import self_check
from peelwise.model.trace import Trace
from peelwise.model.weights.held import Held
from peelwise.probe.probe import Probe
from peelwise.records.base import ModelRecord, Note
from peelwise.tasks.quantcheck.inputs import QuantisedInputs, quantised_inputs
from peelwise.tasks.quantcheck.layers import Candidate, held_of, matched
from peelwise.tasks.quantcheck.settings import QuantcheckSettings


@dataclass(frozen=True, eq=False)
class Before:
    """The model before a fine-tune: its losses on report, the weights under the parent's layers, its record."""

    losses: Tensor
    weights: Mapping[LinearLayer, Callable[[], Tensor]]
    record: ModelRecord


@dataclass(frozen=True, eq=False)
class Sides:
    """What is known before any token goes through the models.

    Attributes:
        quantised, parent: the two.
        blocks, above: their blocks.
        twins: the parent's layer of every layer of the quantised model.
        held: what its quantised layers hold.
        inputs: which of them get rounded inputs.
        before: the model before the fine-tune that made the parent, if there is one.
    """

    quantised: Candidate
    parent: Candidate
    blocks: tuple[Block, ...]
    above: tuple[Block, ...]
    twins: Mapping[LinearLayer, LinearLayer]
    held: dict[LinearLayer, Held]
    inputs: QuantisedInputs
    before: Before | None

    @property
    def quantised_under(self) -> dict[LinearLayer, tuple[LinearLayer, Held]]:
        """The quantised layer, and what it holds, by the parent's layer."""
        return {self.twins[linear]: (linear, held) for linear, held in self.held.items()}


def opened(
    quantised: Candidate, parent: Candidate, base: Candidate | None, probe: Probe, settings: QuantcheckSettings
) -> Sides:
    """Return the two with their layers side by side.

    Raises:
        ModelError: If the parent has other layers, shapes or another vocabulary.
        FormatError: If no layer is quantised, or one does not hold what its format says.
    """
    blocks, above = checked_blocks(quantised.model, probe), checked_blocks(parent.model, probe)
    twins = matched(quantised, parent, blocks, above)
    held = held_of(quantised, blocks, settings.parsed_format())
    before = None if base is None else _before(base, parent, above, probe, settings)
    inputs = quantised_inputs(quantised.model, held, settings)
    return Sides(quantised, parent, blocks, above, twins, held, inputs, before)


def _before(
    base: Candidate, parent: Candidate, above: tuple[Block, ...], probe: Probe, settings: QuantcheckSettings
) -> Before:
    blocks = checked_blocks(base.model, probe)
    twins = matched(parent, base, above, blocks)
    with untouched(base.model):
        losses = Runner(base.model, blocks, micro_batch_tokens=settings.micro_batch_tokens).trace(probe.report).losses
    return Before(losses, {m: twin.weight for m, twin in twins.items()}, record_of(base, blocks, probe.seed))


@dataclass(frozen=True, eq=False)
class OnText:
    """Both models on the text, with weights alone: rounding of inputs is off.

    Attributes:
        runner, other: of the quantised model and of its parent; they share a counter of work.
        clock: the time.
        notes: of the self-check.
        above: traces of the parent on fit, select and report.
        select: trace of the quantised model on select.
        session: the quantised model on report.
    """

    runner: Runner
    other: Runner
    clock: Clock
    notes: tuple[Note, ...]
    above: tuple[Trace, Trace, Trace]
    select: Trace
    session: ReportSession


def on_text(sides: Sides, probe: Probe, settings: QuantcheckSettings, watcher: Watcher | None) -> OnText:
    """Run both models over the text."""
    runner = Runner(sides.quantised.model, sides.blocks, micro_batch_tokens=settings.micro_batch_tokens)
    other = Runner(sides.parent.model, sides.above, micro_batch_tokens=settings.micro_batch_tokens)
    other.work = runner.work
    clock = Clock(settings.budget_seconds, runner.work, watcher)
    with clock.stage(LOSSES):
        notes = tuple(self_check(runner, probe.fit))
        self_check(other, probe.fit)
        above = other.trace(probe.fit), other.trace(probe.select), other.trace(probe.report)
        select, session = runner.trace(probe.select), ReportSession(runner, runner.trace(probe.report))
    return OnText(runner, other, clock, notes, above, select, session)


def record_of(candidate: Candidate, blocks: tuple[Block, ...], seed: int) -> ModelRecord:
    """Return what the record says of a model."""
    model = candidate.model
    return model_record(Setup(model, blocks, candidate.name, candidate.source, identify(model), {}, seed))
