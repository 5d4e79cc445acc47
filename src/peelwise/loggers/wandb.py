"""Experiment trackers of other people that follow a run live: Weights & Biases, MLflow, trackio. No torch.

Each joins the run that the program has begun with the tracker, so that everything is in one place, and begins one of
its own where there is none. Where a run goes to (a server, a folder, offline) is left to the tracker's own settings.
"""

from __future__ import annotations

from typing import Any

from peelwise.errors import MissingExtraError
from peelwise.loggers.base import PROJECT
from peelwise.records.plain_text import clean
from peelwise.records.run import Event, Measurement, StepRow

_STEP = "peelwise/step"


class WeightsAndBiases:
    """Logs to Weights & Biases, also offline (``WANDB_MODE=offline``); events that warn become its alerts.

    Its own step only counts calls of ``log`` and never goes back, so everything is drawn over ``peelwise/step``. In a
    run that was begun elsewhere the numbers of measurements wait for that program's next ``log``, which would lose its
    own if they did not; losses are left to it.

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

    def measurement(self, row: Measurement) -> None:
        """Log the numbers of a measurement."""
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
