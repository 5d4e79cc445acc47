"""MLflow."""

from __future__ import annotations

import time
from typing import Any

from peelwise.errors import MissingExtraError
from peelwise.loggers.base import PROJECT
from peelwise.records.plain_text import clean
from peelwise.records.run import Event, Measurement, StepRow

_AT_ONCE, _SECONDS = 500, 5.0  # what MLflow gets in one call, and how old it may be by then


class MLflow:
    """Logs to MLflow, in batches of a few seconds; events are in the artifact ``peelwise/events.txt``.

    Args:
        experiment: of a run of its own.
        name: of a run of its own.

    Raises:
        MissingExtraError: Without mlflow.
    """

    def __init__(self, experiment: str = "", name: str | None = None) -> None:
        try:
            import mlflow
            from mlflow.entities import Metric
        except ImportError as error:
            raise MissingExtraError("Logging to MLflow", "mlflow") from error
        self._client, self._metric = mlflow.MlflowClient(), Metric
        active = mlflow.active_run()
        self._joined = active is not None
        self._id: str = active.info.run_id if active is not None else self._begun(experiment or PROJECT, name)
        self._waiting: list[Any] = []
        self._sent = time.monotonic()
        self._told: list[str] = []

    def step(self, row: StepRow) -> None:
        """Log the loss and the share of time, with the next batch."""
        self._add(row.step, row.scalars())
        if time.monotonic() - self._sent > _SECONDS or len(self._waiting) >= _AT_ONCE:
            self._send()

    def measurement(self, row: Measurement) -> None:
        """Log the numbers of a measurement."""
        self._add(row.step, row.scalars())
        self._send()
        self._tell(row.events)

    def event(self, event: Event) -> None:
        """Add its text to the artifact."""
        self._tell((event,))

    def close(self) -> None:
        """Send what is left, and end the run if it is its own."""
        self._send()
        if not self._joined:
            self._client.set_terminated(self._id)

    def _begun(self, experiment: str, name: str | None) -> str:
        found = self._client.get_experiment_by_name(experiment)
        place = found.experiment_id if found is not None else self._client.create_experiment(experiment)
        run_id: str = self._client.create_run(place, run_name=name).info.run_id
        return run_id

    def _add(self, step: int, values: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        self._waiting += [self._metric(name, value, now, step) for name, value in values.items()]

    def _send(self) -> None:
        waiting, self._waiting, self._sent = self._waiting, [], time.monotonic()
        for start in range(0, len(waiting), _AT_ONCE):
            self._client.log_batch(self._id, metrics=waiting[start : start + _AT_ONCE])

    def _tell(self, events: tuple[Event, ...]) -> None:
        if events:
            self._told += [f"{event.level}: {clean(str(event))}" for event in events]
            self._client.log_text(self._id, "\n".join(self._told) + "\n", "peelwise/events.txt")
