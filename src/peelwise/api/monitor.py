"""The monitor as people use it: one object beside the training loop."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

import torch

from peelwise.api.outlets import Outlets, ShownMeasurement
from peelwise.distributed.processes import current_processes
from peelwise.distributed.sharding import unwrap_ddp
from peelwise.engine.provenance import versions
from peelwise.evidence.events import not_followed, not_monitored
from peelwise.loggers.base import Logger
from peelwise.loggers.table import logger_of
from peelwise.model.layers import parameter_count, unwrapped
from peelwise.probe.probe import Probe
from peelwise.records.options import Refine
from peelwise.records.run import Event, Measurement, RunInfo
from peelwise.store.plain import whole
from peelwise.tasks.monitor.follower import Follower, MonitorSettings, read_later
from peelwise.tasks.monitor.schedules import Schedule

if TYPE_CHECKING:
    from torch import Tensor, nn

log = logging.getLogger("peelwise")


class Monitor:
    """Watches a model while it trains: which blocks have stopped learning, how much they could gain, what went wrong.

    It takes its share of wall time and no more, changes nothing of the training (weights are the same to the bit
    with and without it), and writes what it sees to a file that others can read meanwhile.

    Where several processes train one model (DDP or ``fully_shard``), make it and call it in all of them, with the same
    probe, at the same steps: they share the probe, and what is found is the same in all; the first one decides and
    writes, and it alone has loggers and callbacks.

    Args:
        model: the module in training, compiled or not, in DDP or not, sharded by ``fully_shard`` or not.
        probe: text to measure on, best from the training distribution, or batches with a loss of their own for a model
            that predicts no next tokens; see `Probe`.
        optimizer: what steps the model; with it, parameters that it does not hold or does not move are found.
        budget: share of wall time that the monitor may take; ``None`` leaves it to ``schedule``.
        schedule: at which steps it may measure, such as `every(100)`; ``None`` for whenever the budget allows.
        store: file of the run history, or ``None`` to keep none. A run is added to what the file holds. Where it cannot
            be written (another writer, a newer version, no such folder), that is said once and nothing is recorded.
        name: of the run.
        margin: smallest recoverable loss that matters, nats per token; default: the larger of 0.5 % of the loss and
            0.003. Of batches in their unit, 0.5 % of the loss.
        refine: which linear layers are asked about, as in `AuditSettings`: ``"trainable"`` when the monitor is made
            and later, ``"all"``, ``"adapters"``. Blocks without any have the letter F.
        signals: names of signals of `peelwise check` to record too, after measurements whenever the budget pays for
            them, such as ``("gain_slope", "stable_rank")``; ``("all",)`` for all, and for the score that a check makes
            of them. In trainings of one process.
        stack: name of the list of blocks to follow, such as ``"encoder.block"``; default: the largest, of an
            encoder-decoder the decoder's.
        loggers: further places for what is seen, live: ``"console"``, ``"jsonl:FILE"``, ``"tensorboard:FOLDER"``,
            ``"wandb"``, ``"mlflow"``, ``"trackio"`` (each with ``":PROJECT"`` if you like), or objects like those of
            `peelwise.loggers.table`.
        on_event: called with every `Event`; all of them also go to the logger ``peelwise``.
        on_measurement: called with everything a measurement found.

    Raises:
        OptionError: If an option has a value that is not allowed.
        UnsupportedModelError: If the model cannot be measured, or is spread over processes in another way.
        ProbeError: If the probe does not fit the model.

    Attributes:
        events: everything that was told so far.
        last: what the latest measurement found, or ``None``.

    Example:
        >>> monitor = peelwise.Monitor(model, probe, optimizer=optimizer, store="run.db")
        >>> for step, batch in enumerate(batches):
        ...     loss = training_step(batch)
        ...     monitor.step(step, loss=loss)
        ...     optimizer.zero_grad()
        >>> monitor.close()
    """

    def __init__(
        self,
        model: nn.Module,
        probe: Probe,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        budget: float | None = 0.03,
        schedule: Schedule | None = None,
        store: str | Path | None = "run.db",
        name: str | None = None,
        margin: float | None = None,
        refine: Refine = "trainable",
        signals: Sequence[str] = (),
        stack: str | None = None,
        loggers: Sequence[str | Logger] = (),
        on_event: Callable[[Event], None] | None = None,
        on_measurement: Callable[[Measurement], None] | None = None,
    ) -> None:
        model, processes = unwrap_ddp(model), current_processes()
        self._owner, self._lock, self._closed, self._latest = os.getpid(), threading.RLock(), False, -1
        settings = MonitorSettings(
            budget=budget, schedule=schedule, margin_nats=margin, refine=refine, signals=signals, stack=stack
        )
        if not processes.is_main:
            on_event = on_measurement = None
        self._outlets = Outlets(on_event, on_measurement, lock=self._lock, quiet=not processes.is_main)
        self._follower = Follower(model, probe, settings, self._outlets, optimizer=optimizer, processes=processes)
        info = RunInfo(
            name=name or type(unwrapped(model)).__name__,
            architecture=type(unwrapped(model)).__name__,
            parameters=parameter_count(model),
            blocks=tuple(block.name for block in self._follower.blocks),
            budget=budget,
            in_distribution=probe.in_distribution,
            probe=probe.record().model_dump(),
            settings={"margin": margin, "scheduled": schedule is not None, "refine": refine, "signals": list(signals)},
            versions=versions(),
        )
        with processes.agreeing():  # a logger that cannot be had ends all of them, not only the first
            if processes.is_main:
                self._outlets.open([logger_of(each, name) for each in loggers], store, info)
        self._outlets.deliver()

    def step(self, step: int, loss: float | Tensor | None = None) -> Measurement | None:
        """Tell that a training step is done; call it after the optimiser's step and before gradients are cleared.

        It raises nothing into the training: what goes wrong is an event, said once. Threads take turns; after `close`,
        and in a forked process, it does nothing.

        Args:
            step: its number; where it is no whole number of 64 bits, steps are counted on.
            loss: its training loss. A tensor on an accelerator is read later, together with others, so that no step
                waits for it.

        Returns:
            What was found, if it measured at this step; else ``None``.
        """
        if os.getpid() != self._owner:  # before the lock, which another thread may have held when this one was forked
            return None
        with self._lock:
            found = None if self._closed else self._followed(step, loss)
        self._outlets.deliver()  # to other people's code, which may take its time: other threads need not wait for it
        return found

    def _followed(self, step: Any, loss: Any) -> Measurement | None:
        number = self._latest = self._number(step)
        try:
            return None if self._follower.step(number, self._value(number, loss)) is None else self.last
        except Exception as error:  # whatever goes wrong here, the training must not end of it
            self._outlets.say_once(not_followed(number, error), type(error))
            return None

    def _number(self, step: Any) -> int:
        """Return the number of a step; one more than the last where it is none that can be recorded."""
        try:
            return whole(step)
        except Exception as error:  # any object may be given
            self._outlets.say_once(not_followed(self._latest + 1, error), "step")
            return self._latest + 1

    def _value(self, step: int, loss: Any) -> float | Tensor | None:
        try:
            if isinstance(loss, torch.Tensor) and loss.numel() == 1 and read_later(loss):
                return loss.detach().reshape(()).clone()  # to read it now would make the step wait for the device
            # float() of a tensor that still has its graph warns
            return None if loss is None else float(loss.item() if isinstance(loss, torch.Tensor) else loss)
        except Exception as error:  # any object may be given
            self._outlets.say_once(not_followed(step, error), "loss")
            return None

    @property
    def share(self) -> float:
        """Share of wall time that the monitor has taken so far."""
        return self._follower.share

    @property
    def events(self) -> tuple[Event, ...]:
        """Everything that was told so far, oldest first."""
        return tuple(self._outlets.events)

    @property
    def last(self) -> ShownMeasurement | None:
        """What the latest measurement found."""
        return self._outlets.last

    @property
    def recorded(self) -> bool:
        """Whether what is seen goes to a file."""
        return self._outlets.writer is not None

    def close(self, status: Literal["finished", "failed"] = "finished") -> None:
        """End the run in the history and close the loggers; closing again, or in a forked process, does nothing."""
        if os.getpid() == self._owner:
            with self._lock:
                self._closed = True
                self._follower.close()
                self._outlets.end(status)
            self._outlets.deliver()
            self._outlets.close_loggers()

    def _repr_html_(self) -> str:
        from peelwise.show.notebook import measurement_html, nothing_html

        names = [block.name for block in self._follower.blocks]
        return nothing_html() if self.last is None else measurement_html(self.last, names)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close("finished" if kind is None else "failed")


def tell_unmonitored(model: nn.Module, probe: Probe, error: Exception, **options: Any) -> None:
    """Say that a training goes on unmonitored: in the log, to callbacks and loggers, and in the run history.

    For trainers, whose training must not end because no monitor could be made. The run has that event and nothing else.

    Args:
        model: that trains.
        probe: it was to be measured on.
        error: why that was not possible.
        options: of `Monitor`, one of which may be what is wrong.
    """
    outlets = Outlets(options.get("on_event"), None, lock=threading.RLock())
    model = unwrap_ddp(model)
    kind, budget = type(unwrapped(model)).__name__, options.get("budget", 0.03)
    info = RunInfo(
        name=options.get("name") or kind,
        architecture=kind,
        parameters=parameter_count(model),
        blocks=(),
        budget=budget if isinstance(budget, float) else None,
        in_distribution=probe.in_distribution,
        versions=versions(),
    )
    distributed = torch.distributed
    first = not distributed.is_available() or not distributed.is_initialized() or distributed.get_rank() == 0
    try:
        if first:
            loggers = [logger_of(each, options.get("name")) for each in options.get("loggers", ())]
            outlets.open(loggers, options.get("store", "run.db"), info)
    except Exception as other:  # an option that cannot be followed may be why there is no monitor
        log.debug("no run history of it", exc_info=other)
    outlets.event(not_monitored(0, error))
    outlets.end("failed")
    outlets.deliver()
    outlets.close_loggers()
