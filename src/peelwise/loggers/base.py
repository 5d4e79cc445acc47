"""What a monitor tells its loggers."""

from __future__ import annotations

from typing import Protocol

from peelwise.records.run import Event, Measurement, StepRow

PROJECT = "peelwise"  # what a run of its own belongs to, where nothing else is said


class Logger(Protocol):
    """What a monitor tells its loggers."""

    def step(self, row: StepRow) -> None:
        """Take one training step."""

    def measurement(self, row: Measurement) -> None:
        """Take what one measurement found, its events included."""

    def event(self, event: Event) -> None:
        """Take one event that belongs to no measurement."""

    def close(self) -> None:
        """Write out what is left."""
