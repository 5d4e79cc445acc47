"""Follow a training run: decide when to measure, measure, and hand what was found to a recorder.

step -> vitals -> affordable? -> measurement -> chronicle -> recorder
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import scipy.special  # noqa: F401  # every interval needs it; within a run, importing it would take a measurement's time
import torch
from torch import Tensor, nn

from peelwise.distributed.processes import ONE_PROCESS, Processes, check_same
from peelwise.engine.fading import FadingSums
from peelwise.engine.opening import checked_blocks, first_notes
from peelwise.errors import NotCausalError, OptionError, OtherProcessError, PeelwiseError
from peelwise.evidence import events as alerts
from peelwise.evidence.mistakes import leak
from peelwise.model.guard import untouched
from peelwise.model.layers import Block, device_of, parameter_count, unwrapped
from peelwise.model.refined import stepped_by
from peelwise.model.runner import MICRO_BATCH_TOKENS, Runner
from peelwise.model.selfcheck import check_dtypes
from peelwise.probe.probe import Probe
from peelwise.probe.rolling import Part, RollingProbe
from peelwise.records.base import Note
from peelwise.records.options import Refine, check_refine
from peelwise.records.run import Event, Measurement, MeasurementKind, StepRow
from peelwise.records.signals import over_depth
from peelwise.tasks.audit.screening import Steps
from peelwise.tasks.monitor.checkup import Checkup
from peelwise.tasks.monitor.chronicle import Chronicle
from peelwise.tasks.monitor.code_signals import CodeSignals
from peelwise.tasks.monitor.costs import solve_tokens
from peelwise.tasks.monitor.depth import DepthSignals
from peelwise.tasks.monitor.drift import Drift
from peelwise.tasks.monitor.glance import glance
from peelwise.tasks.monitor.measure import Measured, measure
from peelwise.tasks.monitor.pace import Pace
from peelwise.tasks.monitor.planner import PLAN, Planner
from peelwise.tasks.monitor.schedules import Schedule
from peelwise.tasks.monitor.structure import changed_layers, looked_at_again, other_blocks

_log = logging.getLogger("peelwise")

_PILOT_SECONDS = 0.05  # in which as many passes as fit are timed, one at least
_READ_EVERY = 0.5  # seconds, losses that are on a device


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
        signals: names of signals of a check to record too, as often as the budget pays for them; ``("all",)`` for all.
        stack: the name of the list of blocks to follow; ``None`` for the one that the architecture says.
    """

    budget: float | None = 0.03
    schedule: Schedule | None = None
    margin_nats: float | None = None
    micro_batch_tokens: int = MICRO_BATCH_TOKENS
    plan: Sequence[MeasurementKind] = PLAN
    refine: Refine = "trainable"
    signals: Sequence[str] = ()
    stack: str | None = None


class Follower:
    """Follows one training run; `step` is all there is to call.

    Args:
        model: the module in training, compiled or not.
        probe: text or batches to measure on.
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
        self._start: float | None = None
        _check(settings)
        self._model, self._settings, self._recorder, self._optimizer = model, settings, recorder, optimizer
        self._probe = probe
        self._fixed = probe.fixed if isinstance(probe, RollingProbe) else None
        self._processes = processes
        with processes.agreeing():
            self.blocks: tuple[Block, ...] = checked_blocks(
                model,
                probe,
                settings.refine,
                stepped_by(optimizer),
                batches=True,
                stack=settings.stack,
                shared=True,
                spread=True,
            )
            check_same(processes, ([(name, tuple(p.shape)) for name, p in model.named_parameters()], probe.fingerprint))
            per_token, notes, self._leak = self._first_look()
        self._kept = FadingSums.affordable(self.blocks) if self._fixed is not None else None
        # An example of a batch has any number of positions, so its pass says nothing of solves.
        solves = solve_tokens(self.blocks, parameter_count(unwrapped(model))) if probe.examples is None else 0.0
        self._planner = Planner(probe, settings.plan, settings.budget, per_token, processes, solves)
        self._notes = list(notes)
        self._chronicle = Chronicle(
            len(self.blocks),
            margin=settings.margin_nats,
            in_distribution=probe.in_distribution,
            frozen=_frozen(self.blocks),
            unit=probe.unit,
            # A loss that was given may be of anything; what training minimises need not be the same.
            comparable=probe.examples is None or probe.examples.loss is None,
        )
        self._codes = CodeSignals(model, self.blocks)
        self._drift = Drift(self.blocks)
        self._depth = DepthSignals(over_depth(settings.signals), settings.budget, per_token)
        self._checkup = Checkup(
            model,
            probe,
            self.blocks,
            optimizer,
            budget=settings.budget,
            micro_batch_tokens=settings.micro_batch_tokens,
            processes=processes,
        )
        self._checkup.expect(per_token)
        self._told: set[object] = set()
        self._failures = self._left_out = 0  # unforeseen ones in a row; measurements to leave out after them
        self._tokens = settings.micro_batch_tokens
        self._checked = True  # whether the blocks as they are have passed their self-checks
        self._steps: Steps = {}  # that refined blocks took when they last were
        self.spent = time.monotonic() - began
        self._last: int | None = None
        self._unread: list[tuple[int, float | Tensor | None, float]] = []  # step, loss and share so far
        self._last_read = 0.0
        if self._leak is not None:
            self._checkup.has_leak()
        self._checkup.prepare()

    @property
    def elapsed(self) -> float:
        """Seconds since the first step, and those that it took to get ready."""
        return 0.0 if self._start is None else time.monotonic() - self._start

    @property
    def share(self) -> float:
        """Share of wall time taken so far."""
        return self.spent / self.elapsed if self.elapsed > 0 else 0.0

    def step(self, step: int, loss: float | Tensor | None = None) -> Measurement | None:
        """Note a training step, measure if it is time to, and return what was found then.

        Args:
            step: number of the step, after its update.
            loss: training loss of the step; a tensor is read later, with others, before anything follows from it.
        """
        began = time.monotonic()
        if self._start is None:
            self._start = began - self.spent
        try:
            return self._step(step, loss, began)
        finally:
            if self._checkup.due(step + 1):
                self._checkup.prepare()
            self.spent += time.monotonic() - began + self._checkup.taken_inside()

    def close(self) -> None:
        """Take everything off the model that is on it for the next step, and read what is left to read."""
        self._checkup.close()
        self._read()

    def _step(self, step: int, loss: float | Tensor | None, began: float) -> Measurement | None:
        forecast = self._planner.forecast(step)
        if forecast is not None:
            self._tell(forecast)
        if self._leak is not None:
            self._tell(leak(step, self._leak))
        while self._notes:  # of the self-checks; only now there is a run for them
            first, self._notes = self._notes[0], self._notes[1:]
            self._tell(alerts.noted(step, first), once=f"note {first.code}")
        if self._last is not None and step < self._last:
            self._tell(alerts.stepped_back(self._last, step), once=f"stepped-back {self._last} {step}")
            self._read()
            self._chronicle.forget_from(step)
        self._last = step
        self._unread.append((step, loss, self.share))
        kind = self._due(step)
        value, looked_at = None, kind is not None or self._checkup.due(step)
        if looked_at or not isinstance(loss, Tensor) or began - self._last_read > _READ_EVERY:
            value = self._read()
        if looked_at:
            margin, elapsed = self._settings.margin_nats, self.elapsed
            for event in self._checkup.check(step, value, self._chronicle, margin=margin, elapsed=elapsed):
                self._recorder.event(event)
        return None if kind is None else self._measure(step, kind, began)

    def _read(self) -> float | None:
        """Read the losses that wait for it, all at once, hand them on, and return the last."""
        self._last_read = time.monotonic()
        waiting, self._unread = self._unread, []
        tensors = [loss.float() for _, loss, _ in waiting if isinstance(loss, Tensor)]
        values = iter(torch.stack(tensors).tolist() if tensors else [])
        value: float | None = None
        for step, loss, share in waiting:
            value = next(values) if isinstance(loss, Tensor) else loss
            if value is not None:
                self._chronicle.loss(step, value)
                if not math.isfinite(value):
                    self._tell(alerts.non_finite_loss(step, value))
            self._recorder.step(StepRow(step, value if value is None or math.isfinite(value) else None, share))
        return value

    def _due(self, step: int) -> MeasurementKind | None:
        """Return the kind of measurement to make now, if any: by the first process's clock and memory."""
        if self._settings.schedule is not None and not self._settings.schedule(step):
            return None
        kind = self._planner.due(self.spent, self.elapsed, self._chronicle.undecided)
        if kind is not None and self._left_out > 0:
            self._left_out -= 1
            return None
        return kind

    def _measure(self, step: int, kind: MeasurementKind, began: float) -> Measurement | None:
        _wait_for(self._model)  # what training has queued on a device is not the monitor's time
        start = time.monotonic()
        self._planner.begin(kind)
        try:
            with self._processes.agreeing():
                as_many = self._look_at_blocks(step)
            if not as_many:
                return None
            grown = self._planner.grow(self.elapsed)
            part = self._planner.take()
            if self._kept is not None:
                self._kept.begin(step)
            found = self._found(kind)
        except Exception as error:  # whatever goes wrong here, the training must not end of it
            self._planner.took(kind, time.monotonic() - start, failed=True)
            self._tell_failure(step, error)
            return None
        self._failures = 0
        if kind != "slopes":  # which looks at layers as they are
            self._checked, self._steps = True, found.steps
        now = time.monotonic()
        self._planner.took(kind, now - start)
        share = (self.spent + now - began) / max(self.elapsed, 1e-9)
        row: Measurement = self._processes.broadcast(
            self._row(step, found, now - start, share, grown=grown, part=part) if self._processes.is_main else None
        )
        row = self._with_depth(self._drift.noted(self._codes.noted(row), self.blocks), began)
        self._recorder.measurement(row)
        for note in found.notes:
            if note.code in ("few-fit-tokens", "few-expert-tokens", "more-damping"):
                self._tell(alerts.few_tokens(step, note))
            else:
                self._tell(alerts.noted(step, note), once=f"note {note.code}")
        return row

    def _found(self, kind: MeasurementKind) -> Measured:
        """Return what a measurement of a kind finds."""
        probe = self._planner.probe
        if kind == "slopes":
            return glance(self._model, self.blocks, probe, micro_batch_tokens=self._tokens)
        return measure(
            self._model,
            self.blocks,
            probe,
            kind,
            self._processes.broadcast(self._chronicle.wanted_first()),
            micro_batch_tokens=self._tokens,
            processes=self._processes,
            checked=self._checked,
            steps=self._steps,
            fixed=self._fixed,
            kept=self._kept,
        )

    def _with_depth(self, row: Measurement, began: float) -> Measurement:
        """Return the row of a measurement with the signals of a check that are asked for and that the budget pays."""
        if not self._settings.signals:
            return row
        if self._processes.count > 1:
            self._tell(alerts.signals_left_out(row.step, "they are taken in trainings of one process"))
            return row
        try:
            return self._depth.noted(
                row,
                self._model,
                self.blocks,
                self._planner.probe,
                micro_batch_tokens=self._tokens,
                spent=self.spent + time.monotonic() - began,
                elapsed=self.elapsed,
            )
        except Exception as error:  # whatever goes wrong here, the training must not end of it
            _log.debug("signals over depth at step %d", row.step, exc_info=error)
            self._tell(alerts.signals_left_out(row.step, f"{type(error).__name__}: {error}"))
            return row

    def _look_at_blocks(self, step: int) -> bool:
        """Take layers that are other ones than last time, and return whether the blocks are those of the start.

        A run history has one letter per block from its beginning to its end.
        """
        others = other_blocks(self._model, self.blocks)
        if others:
            self._tell(alerts.blocks_changed(step, others), once=f"blocks-changed {others}")
            return False
        now = looked_at_again(self._model, self.blocks, self._settings.refine, stepped_by(self._optimizer))
        if now is self.blocks:
            return True
        check_dtypes(now)
        self._tell(alerts.layers_changed(step, *changed_layers(self.blocks, now)), once=f"layers-changed {step}")
        self.blocks, self._checked = now, False
        self._chronicle.frozen = _frozen(now)
        self._checkup.blocks = now
        return True

    def _row(
        self, step: int, found: Measured, seconds: float, share: float, *, grown: bool, part: Part | None
    ) -> Measurement:
        return self._chronicle.add(
            step,
            found,
            seconds=seconds,
            share=share,
            seen=self._checkup.seen(),
            shared=self._checkup.shared(),
            at_fault=self._checkup.at_fault,
            counting=self._checkup.counting,
            other_text=grown,
            part=part,
            pace=self._pace(seconds),
        )

    def _pace(self, seconds: float) -> Pace:
        """Return what measuring costs, by a measurement that took so long."""
        report = self._planner.probe.report
        return Pace(report.tokens / report.sequences, seconds / report.tokens, self._settings.budget)

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

    def _tell(self, event: Event, *, once: object = None) -> None:
        """Hand on an event, the same one once."""
        key = once if once is not None else event.kind
        if key not in self._told:
            self._told.add(key)
            self._recorder.event(event)

    def _first_look(self) -> tuple[float, tuple[Note, ...], str | None]:
        """Check that the model can be run block by block.

        Returns the seconds of a forward pass per token, what the self-checks have to say, and of a leak if any.
        """
        tokens = self._settings.micro_batch_tokens
        runner = Runner(self._model, self.blocks, micro_batch_tokens=tokens, processes=self._processes)
        fit = self._probe.fit
        rows = max(1, tokens // fit.width)
        with untouched(self._model):
            leaks = None
            try:
                notes = first_notes(runner, fit)  # which also warms up
            except NotCausalError as error:  # a mistake to be told, not a reason to leave the run alone
                leaks = str(error)
                notes = first_notes(runner, fit, causal=False)
            per_token, began, again, count = math.inf, time.monotonic(), True, 1
            while again:  # the first pass of all may take several times as long, and one of few rows says little
                start = time.monotonic()
                predicted = runner.trace(fit.at(slice(count))).predicted
                now = time.monotonic()
                per_token = min(per_token, (now - start) / predicted)
                count = min(2 * count, rows)
                # A pass is one of all processes, so how many there are is said by the clock of the first.
                again = bool(self._processes.broadcast_number(int(now - began < _PILOT_SECONDS)))
        return per_token, notes, leaks


def read_later(loss: Tensor) -> bool:
    """Whether to read a loss at once would wait for a device."""
    return loss.device.type != "cpu"


def _frozen(blocks: Sequence[Block]) -> frozenset[int]:
    return frozenset(block.index for block in blocks if not block.linears)


def _check(settings: MonitorSettings) -> None:
    check_refine(settings.refine)
    over_depth(settings.signals)
    budget = settings.budget
    if budget is not None and not 0 < budget <= 1:
        raise OptionError(f"The budget is a share of wall time above 0 and up to 1, got {budget}. The default is 0.03.")
    if budget is None and settings.schedule is None:
        raise OptionError("With budget=None a schedule must say when to measure, such as schedule=every(100).")
    if not settings.plan:
        raise OptionError("The plan of measurements is empty; leave it out for the default.")


def _wait_for(model: nn.Module) -> None:
    device = device_of(model)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
