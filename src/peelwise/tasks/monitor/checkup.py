"""The checks of single steps: is every parameter reached, what did the step do, what did it compute, is it a mistake?

due? -> before the step: watchers -> after it: vitals, update, batch, pulse -> diagnosis -> events
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Protocol

import torch
from torch import nn

from peelwise.distributed.processes import ONE_PROCESS, Processes
from peelwise.engine.baselines import probe_labels, probe_unigram
from peelwise.evidence import events as alerts
from peelwise.evidence.events import Complaint, Finding, Seen
from peelwise.evidence.facts import PulseFacts, StepFacts, UpdateFacts
from peelwise.evidence.mistakes import Diagnosis, shared_words
from peelwise.evidence.trends import Slope
from peelwise.model.layers import Block
from peelwise.probe.probe import Probe
from peelwise.records.run import Event
from peelwise.tasks.monitor.batches import BatchWatch
from peelwise.tasks.monitor.pulse import few_of, pulse
from peelwise.tasks.monitor.schedules import affordable, every, log_spaced
from peelwise.tasks.monitor.updates import UpdateWatch
from peelwise.tasks.monitor.vitals import Vitals

_PER_DECADE, _EVERY = 5, 50
# Of the budget, where the probe's loss may show a mistake that nothing else does, and as long as nothing points at one.
_PULSES_SHARE, _PULSES_SHARE_ELSE = 0.5, 0.1


class Losses(Protocol):
    """What is known of the training loss."""

    def recent(self) -> Sequence[float]:
        """Return the latest losses."""

    def slope(self) -> Slope | None:
        """Return their slope."""

    @property
    def count(self) -> int:
        """How many there were."""


class Checkup:
    """Looks at single steps of a training from both sides, and says what is wrong with them.

    Args:
        model: in training.
        probe: what pulses are measured on.
        blocks: of the model.
        optimizer: what steps it, or ``None``.
        budget: of the monitor, of which pulses take at most half; ``None`` for no limit.
        micro_batch_tokens: tokens that go through the model at a time.
        processes: that train it.

    Attributes:
        findings: what the latest check found wrong with parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        probe: Probe,
        blocks: Sequence[Block],
        optimizer: torch.optim.Optimizer | None,
        *,
        budget: float | None,
        micro_batch_tokens: int,
        processes: Processes = ONE_PROCESS,
    ) -> None:
        self._model, self._probe, self._budget, self._tokens = model, probe, budget, micro_batch_tokens
        self._processes = processes
        self._vitals = Vitals(model, blocks, optimizer, processes)
        self._updates = UpdateWatch(model, blocks, optimizer, alone=processes.count == 1)
        self._of_tokens = probe.examples is None
        self._batches = BatchWatch(model, reads=self._of_tokens)
        self._schedules = log_spaced(_PER_DECADE), every(_EVERY)
        self._diagnosis = Diagnosis()
        self._few = few_of(probe)
        self._pulse_cost, self._pulse_seconds = 0.0, 0.0
        self._counting: float | None = None
        self._counted = False
        self._latest: UpdateFacts | None = None
        self._checks = 0
        self._told: set[tuple[Complaint, tuple[str, ...]]] = set()
        self._said_no_gradients = False
        self._known = tuple(blocks)
        self.findings: list[Finding] = []

    @property
    def blocks(self) -> Sequence[Block]:
        """The blocks as they are at present."""
        return self._known

    @blocks.setter
    def blocks(self, blocks: Sequence[Block]) -> None:
        self._known = tuple(blocks)
        self._vitals.blocks = self._updates.blocks = self._known

    @property
    def counting(self) -> float | None:
        """What one who only counts tokens has on the probe, nats per token; of batches one who counts their labels."""
        if not self._counted:
            probe, self._counted = self._probe, True
            self._counting = probe_unigram(probe, self._model) if self._of_tokens else probe_labels(probe)
        return self._counting

    @property
    def at_fault(self) -> bool:
        """Whether something is wrong with the whole run."""
        return bool(self._diagnosis.present)

    def taken_inside(self) -> float:
        """Return the seconds that looking at batches took inside of training's own steps, since last asked."""
        seconds, self._batches.seconds = self._batches.seconds, 0.0
        return seconds

    def has_leak(self) -> None:
        """Note that the model reads what it is to predict."""
        self._diagnosis.present.add("leak")

    def expect(self, seconds_per_token: float) -> None:
        """Note what a forward pass costs, as far as is known."""
        self._pulse_cost = seconds_per_token * self._few.tokens

    def due(self, step: int) -> bool:
        """Whether a step is to be looked at."""
        return any(due(step) for due in self._schedules)

    def prepare(self) -> None:
        """Look at the step that begins now."""
        self._batches.before()
        self._updates.before()

    def close(self) -> None:
        """Take everything off the model."""
        self._batches.drop()
        self._updates.drop()

    def check(
        self, step: int, loss: float | None, losses: Losses, *, margin: float | None, elapsed: float
    ) -> list[Event]:
        """Return what is to be said of a step that has just ended.

        Args:
            step: its number.
            loss: its training loss.
            losses: those of the run.
            margin: nats per token that matter, or ``None`` for the default.
            elapsed: seconds since the run began, by the first process's clock.
        """
        events = self._check_vitals(step)
        updates, batch = self._updates.after(step), self._batches.after()
        self._latest = updates or self._latest
        facts = StepFacts(
            step, losses.recent(), loss, losses.slope(), losses.count, self.counting, margin, updates, batch,
            of_tokens=self._of_tokens,
        )  # fmt: skip
        often = facts.suspicious or self.at_fault
        facts = replace(facts, pulse=self._pulse(elapsed, _PULSES_SHARE if often else _PULSES_SHARE_ELSE))
        return [*events, *self._diagnosis.add(facts)]

    def shared(self) -> str:
        """Return in words what all blocks have in common, as far as it was seen."""
        return shared_words(self._latest, self._vitals.clipped_to)

    def seen(self) -> dict[int, Seen]:
        """Return what is known of every block besides its verdict."""
        rates = self._vitals.rates()
        known = [rate for rate in rates if rate is not None]
        usual = median(known) if known else 0.0
        why: dict[int, Complaint] = {}
        dead: dict[int, Finding] = {}
        for finding in self.findings:
            for block in finding.blocks:
                if finding.stops_training:
                    why.setdefault(block, finding.kind)
                elif finding.kind == "dead-units":
                    dead.setdefault(block, finding)
        ratios = [rate / usual if rate is not None and usual > 0 else None for rate in rates]
        clipped = self._vitals.clipped_to
        return {
            block.index: Seen(why.get(block.index), ratio, None, dead.get(block.index), clipped)
            for block, ratio in zip(self._known, ratios, strict=True)
        }

    def _check_vitals(self, step: int) -> list[Event]:
        with self._processes.agreeing():  # they add up what they see, and nobody waits for one that failed
            self.findings = self._vitals.check()
        self._checks += 1
        present = {(finding.kind, finding.names) for finding in self.findings}
        # A fault that goes away and comes back is told again; one that only spreads is, too.
        new = [finding for finding in self.findings if (finding.kind, finding.names) not in self._told]
        self._told = present
        events = [alerts.wrong(step, finding) for finding in new]
        if self._checks >= 3 and not self._vitals.saw_gradients and not self._said_no_gradients:
            self._said_no_gradients = True
            events.append(alerts.no_gradients_seen(step))
        return events

    def _pulse(self, elapsed: float, share: float) -> PulseFacts | None:
        """Measure the loss of a few sequences if that share of the budget allows; never twice as often as it does."""
        budget = None if self._budget is None else self._budget * share
        now = budget is None or affordable(self._pulse_seconds, self._pulse_cost, elapsed, budget)
        if self._few.sequences < 2 or not self._processes.broadcast_number(int(now)):
            return None
        start = time.monotonic()
        try:
            found = pulse(
                self._model, self._known, self._few, micro_batch_tokens=self._tokens, processes=self._processes
            )
            return found if math.isfinite(found.loss.mean) else None
        except Exception:  # a measurement says why the model cannot be run
            return None
        finally:
            self._pulse_cost = time.monotonic() - start
            self._pulse_seconds += self._pulse_cost
