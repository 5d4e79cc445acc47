"""TensorBoard."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from peelwise.errors import MissingExtraError
from peelwise.records.run import Event, Measurement, StepRow


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

    def measurement(self, row: Measurement) -> None:
        """Write the numbers of a measurement."""
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
