"""Loggers that follow a run live: console, JSON lines, TensorBoard, trackers. Each takes rows as they come. No torch.

A new one is a class with the four methods of `Logger`, one entry in ``LOGGERS`` and one test.
"""

from __future__ import annotations

from collections.abc import Callable

from peelwise.errors import OptionError
from peelwise.loggers.base import Logger
from peelwise.loggers.console import Console
from peelwise.loggers.jsonl import JsonLines
from peelwise.loggers.mlflow import MLflow
from peelwise.loggers.tensorboard import TensorBoard
from peelwise.loggers.trackio import Trackio
from peelwise.loggers.wandb import WeightsAndBiases

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
