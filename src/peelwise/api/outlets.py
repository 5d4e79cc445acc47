"""Where a monitor's rows and events go: the run history, the log, loggers and callbacks."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

from peelwise.errors import StoreError
from peelwise.evidence.events import not_called, not_recorded
from peelwise.loggers.base import Logger
from peelwise.records.run import Event, Measurement, RunInfo, StepRow
from peelwise.store.writer import RunWriter

log = logging.getLogger("peelwise")
_LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "alert": logging.WARNING}


class ShownMeasurement(Measurement):
    """What a measurement found, as it shows itself in a notebook."""

    def _repr_html_(self) -> str:
        from peelwise.show.notebook import measurement_html

        return measurement_html(self)


class Outlets:
    """Everything that is told goes to the file and the log at once, and to loggers and callbacks by `deliver`.

    Those are other people's code, which may block: it runs outside of the monitor's lock, in order, in one thread at a
    time. The file may fail at the start of a night or while a model trains for days: training goes on, and that it is
    not, or no longer, recorded is said once.

    Args:
        on_event, on_measurement: callbacks.
        lock: the monitor's, under which all methods but `deliver` and `close_loggers` are called.
        quiet: whether another process says it.
    """

    def __init__(
        self,
        on_event: Callable[[Event], None] | None,
        on_measurement: Callable[[Measurement], None] | None,
        *,
        lock: threading.RLock,
        quiet: bool = False,
    ) -> None:
        self._loggers: list[Logger] = []
        self._quiet = quiet  # the first process has said it
        self.writer: RunWriter | None = None
        self.events: list[Event] = []
        self.last: ShownMeasurement | None = None
        self._on_event, self._on_measurement = on_event, on_measurement
        self._said: set[object] = set()
        self._lock, self._delivering = lock, threading.Lock()
        self._waiting: deque[Callable[[], None]] = deque()

    def open(self, loggers: Sequence[Logger], store: str | Path | None, info: RunInfo) -> None:
        """Begin the run in the history and take the loggers."""
        self._loggers = list(loggers)
        if store is not None:
            try:
                self.writer = RunWriter(store, info)
            except StoreError as error:
                self._announce(not_recorded(0, error, begun=False))

    def step(self, row: StepRow) -> None:
        """Take one training step."""
        self._write(row.step, "step", row)

    def measurement(self, row: Measurement) -> None:
        """Take everything one measurement found."""
        row = self.last = ShownMeasurement(**{one.name: getattr(row, one.name) for one in fields(row)})
        self._write(row.step, "measurement", row)
        for event in row.events:
            self._announce(event)
        if self._on_measurement is not None:
            self._waiting.append(lambda: self._call("_on_measurement", row))

    def say_once(self, event: Event, key: object) -> None:
        """Hand on an event unless another one with the same key was."""
        if key not in self._said:
            self._said.add(key)
            self.event(event)

    def event(self, event: Event) -> None:
        """Take one event that belongs to no measurement."""
        if not self._quiet:  # what a process sees by itself, such as its own loss
            self._write(event.step, "event", event)
            self._announce(event)

    def deliver(self) -> None:
        """Let loggers and callbacks have what waits for them; call it without the lock.

        Where another thread is at it, or the same one inside of a callback, that one delivers this too.
        """
        while self._waiting and self._delivering.acquire(blocking=False):
            try:
                while self._waiting:
                    self._waiting.popleft()()
            finally:
                self._delivering.release()

    def end(self, status: Literal["finished", "failed"]) -> None:
        """End the run in the history; `close_loggers` comes after the last delivery."""
        if self.writer is not None:
            writer, self.writer = self.writer, None
            writer.close(status)

    def close_loggers(self) -> None:
        """Close the loggers; call it without the lock."""
        while self._loggers:
            logger = self._loggers.pop()
            try:
                logger.close()
            except Exception as error:  # third-party code and disk
                log.warning("%s could not be closed: %s", type(logger).__name__, error)

    def _write(self, step: int, what: str, row: Any) -> None:
        if self.writer is not None:
            try:
                getattr(self.writer, what)(row)
            except StoreError as error:
                writer, self.writer = self.writer, None
                writer.close("failed")
                self._announce(not_recorded(step, error))
        for logger in self._loggers:
            self._waiting.append(partial(self._log, logger, step, what, row))

    def _log(self, logger: Logger, step: int, what: str, row: Any) -> None:
        if logger not in self._loggers:
            return  # it failed before
        try:
            getattr(logger, what)(row)
        except Exception as error:  # third-party code and disk: the training must not end of it
            with self._lock:
                self._loggers.remove(logger)
                self._announce(not_recorded(step, error, type(logger).__name__))

    def _announce(self, event: Event) -> None:
        self.events.append(event)
        if not self._quiet:
            log.log(_LEVELS[event.level], "%s", event)
        if self._on_event is not None:
            self._waiting.append(lambda: self._call("_on_event", event))

    def _call(self, name: Literal["_on_event", "_on_measurement"], row: Any) -> None:
        callback = getattr(self, name)
        if callback is None:
            return  # it failed before
        try:
            callback(row)
        except Exception as error:  # third-party code: the training must not end of it
            setattr(self, name, None)
            with self._lock:
                self.event(not_called(row.step, error, name.removeprefix("_")))
