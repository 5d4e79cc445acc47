"""Experiment trackers of other people that follow a run live: Weights & Biases, MLflow, trackio. No torch.

Each joins the run that the program has begun with the tracker, so that everything is in one place, and begins one of
its own where there is none. Where a run goes to (a server, a folder, offline) is left to the tracker's own settings.
"""

from __future__ import annotations

import time
from typing import Any

from peelwise.errors import MissingExtraError
from peelwise.run_records import Event, Level, ProbeRow, StepRow
from peelwise.show.words import clean

PROJECT = "peelwise"  # what a run of its own belongs to, where nothing else is said
_STEP = "peelwise/step"
_AT_ONCE, _SECONDS = 500, 5.0  # what MLflow gets in one call, and how old it may be by then


class WeightsAndBiases:
    """Logs to Weights & Biases, also offline (``WANDB_MODE=offline``); events that warn become its alerts.

    Its own step only counts calls of ``log`` and never goes back, so everything is drawn over ``peelwise/step``. In a
    run that was begun elsewhere the numbers of looks wait for that program's next ``log``, which would lose its own if
    they did not; losses are left to it.

    Args:
        project: of a run of its own.
        name: of a run of its own.

    Raises:
        MissingExtraError: Without wandb.
    """

    def __init__(self, project: str = "", name: str | None = None) -> None:
        try:
            import wandb
        except ImportError as error:
            raise MissingExtraError("Logging to Weights & Biases", "wandb") from error
        self._joined = wandb.run is not None
        run: Any = wandb.run if self._joined else wandb.init(project=project or PROJECT, name=name)
        run.define_metric(_STEP, hidden=True)
        run.define_metric("peelwise/*", step_metric=_STEP)
        self._run = run

    def step(self, row: StepRow) -> None:
        """Log the loss and the share of time, to a run of its own."""
        if not self._joined:
            self._log(row.step, row.scalars())

    def probe(self, row: ProbeRow) -> None:
        """Log the numbers of a look."""
        self._log(row.step, {"peelwise/share": row.share, **row.scalars()})
        for event in row.events:
            self.event(event)

    def event(self, event: Event) -> None:
        """Raise an alert, if it is worth one."""
        if event.level != "info":
            title, level = f"peelwise: {event.kind}", "ERROR" if event.level == "alert" else "WARN"
            # Alerts of one title are held back for a minute unless told otherwise, and 0 tells nothing.
            self._run.alert(title=title, text=clean(str(event)), level=level, wait_duration=0.001)

    def close(self) -> None:
        """Finish the run, if it is its own."""
        if not self._joined:
            self._run.finish()

    def _log(self, step: int, values: dict[str, float]) -> None:
        self._run.log({_STEP: step, **values}, commit=not self._joined)


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

    def probe(self, row: ProbeRow) -> None:
        """Log the numbers of a look."""
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

    def probe(self, row: ProbeRow) -> None:
        """Log the numbers of a look."""
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
