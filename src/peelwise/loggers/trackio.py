"""trackio."""

from __future__ import annotations

from typing import Any

from peelwise.errors import MissingExtraError
from peelwise.loggers.base import PROJECT
from peelwise.records.plain_text import clean
from peelwise.records.run import Event, Level, Measurement, StepRow


class Trackio:
    """Logs to trackio; events are its alerts.

    Args:
        project: of a run of its own.
        name: of a run of its own.

    Raises:
        MissingExtraError: Without trackio.
    """

    def __init__(self, project: str = "", name: str | None = None) -> None:
        try:
            import trackio
            from trackio.context_vars import current_run
        except ImportError as error:
            raise MissingExtraError("Logging to trackio", "trackio") from error
        begun = current_run.get()
        self._joined = begun is not None
        options: dict[str, Any] = {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
        self._run: Any = begun if self._joined else trackio.init(project or PROJECT, name=name, **options)
        kinds = trackio.AlertLevel
        self._levels: dict[Level, Any] = {"info": kinds.INFO, "warning": kinds.WARN, "alert": kinds.ERROR}

    def step(self, row: StepRow) -> None:
        """Log the loss and the share of time."""
        self._run.log(row.scalars(), step=row.step)

    def measurement(self, row: Measurement) -> None:
        """Log the numbers of a measurement."""
        self._run.log(row.scalars(), step=row.step)
        for event in row.events:
            self.event(event)

    def event(self, event: Event) -> None:
        """Raise an alert."""
        title, level = f"peelwise: {event.kind}", self._levels[event.level]
        self._run.alert(title=title, text=clean(str(event)), level=level, step=event.step)

    def close(self) -> None:
        """Finish the run, if it is its own."""
        if not self._joined:
            self._run.finish()
