"""JSON lines."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peelwise.errors import OutputError
from peelwise.records.run import Event, Measurement, StepRow


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

    def measurement(self, row: Measurement) -> None:
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
