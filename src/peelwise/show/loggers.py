"""Loggers that follow a run live: console, JSON lines, TensorBoard, trackers. Each takes rows as they come. No torch.

A new one is a class with the four methods of `Logger`, one entry in ``LOGGERS`` and one test.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, TextIO

from peelwise.errors import MissingExtraError, OptionError, OutputError
from peelwise.run_records import LETTERS, Event, ProbeRow, StepRow
from peelwise.show.trackers import MLflow, Trackio, WeightsAndBiases
from peelwise.show.words import clean


class Logger(Protocol):
    """What a monitor tells its loggers."""

    def step(self, row: StepRow) -> None:
        """Take one training step."""

    def probe(self, row: ProbeRow) -> None:
        """Take what one look found, its events included."""

    def event(self, event: Event) -> None:
        """Take one event that belongs to no look."""

    def close(self) -> None:
        """Write out what is left."""


class Console:
    """Prints a line for every look and every event.

    Args:
        stream: where to; standard error by default, so that a program's own output stays clean.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream

    def step(self, row: StepRow) -> None:
        """Say nothing: the training has its own line for that."""

    def probe(self, row: ProbeRow) -> None:
        """Print the verdicts in one line, then the events."""
        counts = ", ".join(f"{row.letters.count(letter)} {colour}" for colour, letter in LETTERS.items())
        self._print(
            f"step {row.step}: {row.probe_loss:.4f} nats on the probe, blocks {row.letters} ({counts}), "
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


class JsonLines:
    """Appends one JSON object per row to a file; ``row`` says whether it is a step, a probe or an event.

    Raises:
        OutputError: If the file cannot be opened.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            self._file = Path(path).open("a", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise OutputError(f"{path} cannot be written: {error.strerror or error}.") from error

    def step(self, row: StepRow) -> None:
        """Append a step."""
        self._write("step", asdict(row))

    def probe(self, row: ProbeRow) -> None:
        """Append a probe with everything that belongs to it."""
        self._write("probe", asdict(row))

    def event(self, event: Event) -> None:
        """Append an event."""
        self._write("event", asdict(event))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, kind: str, values: dict[str, Any]) -> None:
        self._file.write(json.dumps({"row": kind, **values}) + "\n")
        self._file.flush()


class TensorBoard:
    """Writes scalars and the text of events to a folder that TensorBoard shows.

    Raises:
        MissingExtraError: Without tensorboard.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            from tensorboard.compat.proto.event_pb2 import Event as Entry
            from tensorboard.compat.proto.summary_pb2 import Summary
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError as error:
            raise MissingExtraError("Logging to TensorBoard", "tensorboard") from error
        self._entry, self._summary = Entry, Summary
        self._writer = EventFileWriter(str(folder))

    def step(self, row: StepRow) -> None:
        """Write the loss and the share of time."""
        self._scalars(row.step, row.scalars())

    def probe(self, row: ProbeRow) -> None:
        """Write the numbers of a look."""
        self._scalars(row.step, row.scalars())
        for event in row.events:
            self.event(event)

    def event(self, event: Event) -> None:
        """Write its text, shown under Text."""
        from tensorboard.plugins.text.summary_v2 import text_pb

        self._add(event.step, text_pb("peelwise/events", str(event)))

    def close(self) -> None:
        """Write out what is left."""
        self._writer.close()

    def _scalars(self, step: int, values: dict[str, float]) -> None:
        self._add(step, self._summary(value=[self._summary.Value(tag=k, simple_value=v) for k, v in values.items()]))

    def _add(self, step: int, summary: Any) -> None:
        self._writer.add_event(self._entry(wall_time=time.time(), step=step, summary=summary))


# Name -> what makes the logger, from what stands behind the colon and the run's name; and what that is called.
LOGGERS: dict[str, tuple[Callable[[str, str | None], Logger], str]] = {
    "console": (lambda _, name: Console(), ""),
    "jsonl": (lambda path, name: JsonLines(path), "FILE"),
    "tensorboard": (lambda folder, name: TensorBoard(folder), "FOLDER"),
    "wandb": (WeightsAndBiases, "[PROJECT]"),
    "mlflow": (MLflow, "[EXPERIMENT]"),
    "trackio": (Trackio, "[PROJECT]"),
}


def logger_of(what: str | Logger, name: str | None = None) -> Logger:
    """Return a logger from its name, such as ``jsonl:FILE`` or ``wandb``, or the logger given.

    Args:
        what: the name of one in ``LOGGERS``, with a colon and where to log to; or a logger.
        name: of the run, for trackers that begin one.

    Raises:
        OptionError: If the name is not known, or what it needs behind the colon is missing.
        MissingExtraError: If what it logs to is not installed.
    """
    if not isinstance(what, str):
        return what
    kind, _, where = what.partition(":")
    make, needs = LOGGERS.get(kind, (None, ""))
    if make is None or (not where and needs and not needs.startswith("[")):
        known = ", ".join(f"{kind}:{place}" if place else kind for kind, (_, place) in LOGGERS.items())
        raise OptionError(f"A logger is one of {known.replace(':[', '[:')}; got {what!r}.")
    return make(where, name)
