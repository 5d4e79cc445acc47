"""A line for every measurement and every event on the console."""

from __future__ import annotations

import sys
from typing import TextIO

from peelwise.records.base import NATS
from peelwise.records.plain_text import clean
from peelwise.records.run import LETTERS, Event, Measurement, StepRow


class Console:
    """Prints a line for every measurement and every event.

    Args:
        stream: where to; standard error by default, so that a program's own output stays clean.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream

    def step(self, row: StepRow) -> None:
        """Say nothing: the training has its own line for that."""

    def measurement(self, row: Measurement) -> None:
        """Print the verdicts in one line, then the events."""
        found = {colour: row.letters.count(letter) for colour, letter in LETTERS.items()}
        counts = ", ".join(f"{number} {colour}" for colour, number in found.items() if number or colour != "frozen")
        unit = "nats" if row.unit == NATS else clean(row.unit)
        self._print(
            f"step {row.step}: {row.probe_loss:.4f} {unit} on the probe, blocks {row.letters} ({counts}), "
            f"{row.kind} in {row.seconds:.2g} s, {row.share:.1%} of the time so far"
        )
        for event in row.events:
            self.event(event)

    def event(self, event: Event) -> None:
        """Print it."""
        self._print(f"{event.level}: {clean(str(event))}")

    def close(self) -> None:
        """Nothing is held back."""

    def _print(self, line: str) -> None:
        print(line, file=self._stream or sys.stderr, flush=True)
