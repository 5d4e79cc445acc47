"""Follow a training run: decide when to measure, measure, and hand what was found to a recorder.

step -> vitals -> affordable? -> measurement -> chronicle -> recorder
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Protocol

import torch
from torch import nn

from peelwise.distributed.processes import ONE_PROCESS, Processes
from peelwise.distributed.sharding import check_blocks
from peelwise.engine.opening import checked_blocks, first_notes
from peelwise.errors import OptionError, OtherProcessError, PeelwiseError
from peelwise.evidence import events as alerts
from peelwise.evidence.events import Complaint, Finding, Seen
from peelwise.model.guard import untouched
from peelwise.model.layers import Block, device_of, unwrapped
from peelwise.model.runner import MICRO_BATCH_TOKENS, Runner
from peelwise.model.selfcheck import check_dtypes, check_shared
from peelwise.probe.probe import Probe, Split
from peelwise.records.base import Note
from peelwise.records.options import Refine, check_refine
from peelwise.records.run import Event, Measurement, MeasurementKind, StepRow
from peelwise.tasks.monitor.chronicle import Chronicle
from peelwise.tasks.monitor.code_signals import CodeSignals
from peelwise.tasks.monitor.measure import Measured, measure
from peelwise.tasks.monitor.schedules import Schedule, affordable, every, log_spaced
from peelwise.tasks.monitor.structure import changed_layers, looked_at_again, other_blocks
from peelwise.tasks.monitor.vitals import Vitals

_log = logging.getLogger("peelwise")

# Rankings date what changes, refining tells how much there is to gain, a joint round what only one block can give.
PLAN: tuple[MeasurementKind, ...] = ("ranking", "alone", "ranking", "joint", "ranking", "alone")
# What a kind costs in forward passes over the probe, as long as it was never measured.
_FIRST_GUESS: dict[MeasurementKind, float] = {"ranking": 5.0, "alone": 10.0, "joint": 12.0}
_CHECKS_PER_DECADE, _CHECKS_EVERY = 5, 100


class Recorder(Protocol):
    """Where rows go as soon as they exist."""

    def step(self, row: StepRow) -> None:
        """Take one training step."""

    def measurement(self, row: Measurement) -> None:
        """Take everything one measurement found."""

    def event(self, event: Event) -> None:
        """Take one event that belongs to no measurement."""


@dataclass(frozen=True)
class MonitorSettings:
    """What a user may choose about a monitor.

    Attributes:
        budget: share of wall time it may take, or ``None`` for no limit.
        schedule: steps at which it may measure, or ``None`` for all of them.
        margin_nats: smallest recoverable loss that matters; ``None`` for the default.
        micro_batch_tokens: tokens that go through the model at a time.
        plan: kinds of measurements, in turn.
        refine: which linear layers are asked about; see `peelwise.model.refined.chosen`.
    """

    budget: float | None = 0.03
    schedule: Schedule | None = None
    margin_nats: float | None = None
    micro_batch_tokens: int = MICRO_BATCH_TOKENS
    plan: Sequence[MeasurementKind] = PLAN
    refine: Refine = "trainable"


class Follower:
    """Follows one training run; `step` is all there is to call.

    Args:
        model: the module in training, compiled or not.
        probe: text to measure on.
        settings: budget and schedule.
        recorder: takes every row.
        optimizer: what steps the model, for the checks that need no probe.
        processes: the processes that train it together, all of which make a follower and step it. The first one decides
            when to measure and what that means; the others share the work and hear the result.

    Raises:
        OptionError: If neither budget nor schedule limits it, or the budget is no share.
        UnsupportedModelError: If the model cannot be measured.
        ProbeError: If the probe does not fit it.

    Attributes:
        spent: seconds taken so far, the making of it included.
    """

    def __init__(
        self,
        model: nn.Module,
        probe: Probe,
        settings: MonitorSettings,
        recorder: Recorder,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        processes: Processes = ONE_PROCESS,
    ) -> None:
        began = time.monotonic()
        _check(settings)
        self._model, self._probe, self._settings, self._recorder = model, probe, settings, recorder
        self._processes = processes
        with processes.agreeing():
            self.blocks: tuple[Block, ...] = checked_blocks(model, probe, settings.refine)
            check_blocks({block.name: unwrapped(block.module) for block in self.blocks})
            _check_same(processes, model, probe)
            self._costs, notes = self._guessed_costs()
        self._notes = list(notes)
        self._chronicle = Chronicle(
            len(self.blocks),
            margin=settings.margin_nats,
            in_distribution=probe.in_distribution,
            frozen=_frozen(self.blocks),
        )
        self._codes = CodeSignals(model, self.blocks)
        self._vitals = Vitals(model, self.blocks, optimizer, processes)
        self._vitals_due = log_spaced(_CHECKS_PER_DECADE), every(_CHECKS_EVERY)
        self._findings: list[Finding] = []
        self._told: set[object] = set()
        self._measurements = self._checks = 0
        self._failures = self._left_out = 0  # unforeseen ones in a row; measurements to leave out after them
        self._tokens = settings.micro_batch_tokens
        self._checked = True  # whether the blocks as they are have passed their self-checks
        self.spent = time.monotonic() - began
        self._start: float | None = None
        self._last: int | None = None

    @property
    def elapsed(self) -> float:
        """Seconds since the first step, and those that it took to get ready."""
        return 0.0 if self._start is None else time.monotonic() - self._start

    @property
    def share(self) -> float:
        """Share of wall time taken so far."""
        return self.spent / self.elapsed if self.elapsed > 0 else 0.0

    def step(self, step: int, loss: float | None = None) -> Measurement | None:
        """Note a training step, measure if it is time to, and return what was found then.

        Args:
            step: number of the step, after its update.
            loss: training loss of the step.
        """
        began = time.monotonic()
        if self._start is None:
            self._start = began - self.spent
        try:
            return self._step(step, loss, began)
        finally:
            self.spent += time.monotonic() - began

    def _step(self, step: int, loss: float | None, began: float) -> Measurement | None:
        while self._notes:  # of the self-checks; only now there is a run for them
            first, self._notes = self._notes[0], self._notes[1:]
            self._tell(alerts.noted(step, first), once=f"note {first.code}")
        if self._last is not None and step < self._last:
            self._tell(alerts.stepped_back(self._last, step), once=f"stepped-back {self._last} {step}")
            self._chronicle.forget_from(step)
        self._last = step
        if loss is not None:
            self._chronicle.loss(step, loss)
            if not math.isfinite(loss):
                self._tell(alerts.non_finite_loss(step, loss))
        self._recorder.step(StepRow(step, loss if loss is None or math.isfinite(loss) else None, self.share))
        kind = self._due(step)
        if kind is not None or any(due(step) for due in self._vitals_due):
            self._check_vitals(step)
        return None if kind is None else self._measure(step, kind, began)

    def _due(self, step: int) -> MeasurementKind | None:
        """Return the kind of measurement to make now, if any: the first process's clock decides."""
        settings, kind = self._settings, self._settings.plan[self._measurements % len(self._settings.plan)]
        if settings.schedule is not None and not settings.schedule(step):
            return None
        if settings.budget is not None:
            now = affordable(self.spent, self._costs[kind], self.elapsed, settings.budget)
            if not self._processes.broadcast_number(int(now)):
                return None
        if self._left_out > 0:
            self._left_out -= 1
            return None
        return kind

    def _measure(self, step: int, kind: MeasurementKind, began: float) -> Measurement | None:
        _wait_for(self._model)  # what training has queued on a device is not the monitor's time
        start = time.monotonic()
        self._measurements += 1
        try:
            with self._processes.agreeing():
                as_many = self._look_at_blocks(step)
            if not as_many:
                return None
            order = self._processes.broadcast(self._chronicle.wanted_first())
            found = measure(
                self._model,
                self.blocks,
                self._probe,
                kind,
                order,
                micro_batch_tokens=self._tokens,
                processes=self._processes,
                checked=self._checked,
            )
        except Exception as error:  # whatever goes wrong here, the training must not end of it
            self._costs[kind] = time.monotonic() - start
            self._tell_failure(step, error)
            return None
        self._failures, self._checked = 0, True
        now = time.monotonic()
        self._costs[kind] = now - start
        share = (self.spent + now - began) / max(self.elapsed, 1e-9)
        row: Measurement = self._processes.broadcast(
            self._row(step, found, now - start, share) if self._processes.is_main else None
        )
        row = self._codes.noted(row)
        self._recorder.measurement(row)
        self._tell_cost(step, kind)
        for note in found.notes:
            if note.code in ("few-fit-tokens", "few-expert-tokens", "more-damping"):
                self._tell(alerts.few_tokens(step, note))
            else:
                self._tell(alerts.noted(step, note), once=f"note {note.code}")
        return row

    def _look_at_blocks(self, step: int) -> bool:
        """Take layers that are other ones than last time, and return whether the blocks are those of the start.

        A run history has one letter per block from its beginning to its end.
        """
        others = other_blocks(self._model, self.blocks)
        if others:
            self._tell(alerts.blocks_changed(step, others), once=f"blocks-changed {others}")
            return False
        now = looked_at_again(self._model, self.blocks, self._settings.refine)
        if now is self.blocks:
            return True
        check_shared(now)
        check_dtypes(now)
        self._tell(alerts.layers_changed(step, *changed_layers(self.blocks, now)), once=f"layers-changed {step}")
        self.blocks, self._checked = now, False
        self._chronicle.frozen = _frozen(now)
        self._vitals.blocks = now
        return True

    def _row(self, step: int, found: Measured, seconds: float, share: float) -> Measurement:
        return self._chronicle.add(step, found, seconds=seconds, share=share, seen=self._seen())

    def _check_vitals(self, step: int) -> None:
        with self._processes.agreeing():  # they add up what they see, and nobody waits for one that failed
            self._findings = self._vitals.check()
        self._checks += 1
        for finding in self._findings:
            # A fault that goes away and comes back is told again; one that only spreads is, too.
            self._tell(alerts.wrong(step, finding), once=(finding.kind, finding.names))
        self._told -= {key for key in self._told if isinstance(key, tuple) and key not in self._present()}
        if self._checks == 3 and not self._vitals.saw_gradients:
            self._tell(alerts.no_gradients_seen(step))

    def _present(self) -> set[object]:
        return {(finding.kind, finding.names) for finding in self._findings}

    def _seen(self) -> dict[int, Seen]:
        rates = self._vitals.rates()
        known = [rate for rate in rates if rate is not None]
        usual = median(known) if known else 0.0
        why: dict[int, Complaint] = {}
        dead: dict[int, Finding] = {}
        for finding in self._findings:
            for block in finding.blocks:
                if finding.stops_training:
                    why.setdefault(block, finding.kind)
                elif finding.kind == "dead-units":
                    dead.setdefault(block, finding)
        ratios = [rate / usual if rate is not None and usual > 0 else None for rate in rates]
        clipped = self._vitals.clipped_to
        return {
            block.index: Seen(why.get(block.index), ratio, None, dead.get(block.index), clipped)
            for block, ratio in zip(self.blocks, ratios, strict=True)
        }

    def _tell_failure(self, step: int, error: Exception) -> None:
        """Say that a measurement failed; after an error that nobody foresaw, try later, with half the tokens at a time.

        Out of memory is one of those. Twice as many measurements are left out after each failure in a row.
        """
        words = str(error) if isinstance(error, PeelwiseError) else f"{type(error).__name__}: {error}"
        foreseen = error.foreseen if isinstance(error, OtherProcessError) else isinstance(error, PeelwiseError)
        later = not self._processes.all_true(foreseen)
        if later:
            self._failures += 1
            self._left_out = 2 ** min(self._failures - 1, 10)
            self._tokens = max(1, self._tokens // 2)
            _log.debug("measurement at step %d", step, exc_info=error)
        self._tell(alerts.not_measured(step, words, later=later), once=type(error))

    def _tell_cost(self, step: int, kind: MeasurementKind) -> None:
        budget, seconds = self._settings.budget, self._costs[kind]
        if budget is not None and self._measurements == 1:
            self._tell(alerts.cost(step, seconds, budget))

    def _tell(self, event: Event, *, once: object = None) -> None:
        """Hand on an event, the same one once."""
        key = once if once is not None else event.kind
        if key not in self._told:
            self._told.add(key)
            self._recorder.event(event)

    def _guessed_costs(self) -> tuple[dict[MeasurementKind, float], tuple[Note, ...]]:
        """Check that the model can be run block by block, and guess from that what a measurement will cost.

        Returns the guess, and what the self-checks have to say.
        """
        tokens = self._settings.micro_batch_tokens
        runner = Runner(self._model, self.blocks, micro_batch_tokens=tokens, processes=self._processes)
        fit, parts = self._probe.fit, (self._probe.fit, self._probe.select, self._probe.report)
        rows = max(1, tokens // fit.inputs.shape[1])
        with untouched(self._model):
            notes = first_notes(runner, fit)  # which also warms up
            start = time.monotonic()
            some = runner.trace(Split(fit.ids[:rows], fit.mask[:rows]))
            seconds = time.monotonic() - start
        forward = seconds * sum(part.tokens for part in parts) / some.predicted
        return {kind: forward * passes for kind, passes in _FIRST_GUESS.items()}, notes


def _frozen(blocks: Sequence[Block]) -> frozenset[int]:
    return frozenset(block.index for block in blocks if not block.linears)


def _check(settings: MonitorSettings) -> None:
    check_refine(settings.refine)
    budget = settings.budget
    if budget is not None and not 0 < budget <= 1:
        raise OptionError(f"The budget is a share of wall time above 0 and up to 1, got {budget}. The default is 0.03.")
    if budget is None and settings.schedule is None:
        raise OptionError("With budget=None a schedule must say when to measure, such as schedule=every(100).")
    if not settings.plan:
        raise OptionError("The plan of measurements is empty; leave it out for the default.")


def _check_same(processes: Processes, model: nn.Module, probe: Probe) -> None:
    """Check that all processes hold the same model and probe."""
    own = [(name, tuple(p.shape)) for name, p in model.named_parameters()], probe.fingerprint
    if not processes.all_true(processes.broadcast(own) == own):
        raise OptionError(
            "The processes hold different models or probes, which is not supported (pipeline parallel?). "
            "Make the same probe, with the same seed, in all of them."
        )


def _wait_for(model: nn.Module) -> None:
    device = device_of(model)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
