"""What the command line says on standard error while it works: progress, a status, warnings."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from peelwise.errors import PeelwiseWarning
from peelwise.records.plain_text import clean
from peelwise.show.words import stage_words

if TYPE_CHECKING:
    from peelwise.engine.clock import Progress as Step
    from peelwise.engine.clock import Watcher

stderr = Console(stderr=True, highlight=False)
_LONGEST = 2_000  # characters of a message


def one_line(said: object) -> str:
    """Return a message without what could steer or flood a terminal: it may quote what anybody wrote into a file."""
    text = clean(str(said))
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


@contextmanager
def at_work(what: str) -> Iterator[Watcher]:
    """Yield a watcher that draws the progress of a command, and say warnings meanwhile.

    Args:
        what: is done before the first progress is reported.
    """
    with quiet_warnings(), progress_bar(what) as watcher:
        yield watcher


@contextmanager
def quiet_warnings() -> Iterator[None]:
    """Show peelwise's own warnings as one line each; other libraries' do not belong between the progress bars."""

    def show(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        if issubclass(category, PeelwiseWarning):
            stderr.print(f"[yellow]warning:[/] {escape(one_line(message))}", soft_wrap=True)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        yield


@contextmanager
def status(what: str) -> Iterator[None]:
    """Say what is being done: for as long as it lasts on a terminal, in a line elsewhere."""
    if not stderr.is_terminal:
        stderr.print(what)
        yield
        return
    with stderr.status(what):
        yield


@contextmanager
def progress_bar(what: str) -> Iterator[Watcher]:
    """Yield a watcher that draws a bar on a terminal and a line per stage elsewhere; ``what`` comes first."""
    from rich.progress import BarColumn, Progress, TextColumn

    if not stderr.is_terminal:
        stderr.print(what, markup=False)
        yield _line_per_stage()
        return
    columns = TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[left]}")
    with Progress(*columns, console=stderr, transient=True) as bar:
        task = bar.add_task(what, total=1.0, left="")

        def watch(step: Step) -> None:
            detail = f" ({step.done} of {step.total})" if step.total else ""
            completed, left = _progress(step)
            bar.update(task, description=stage_words(step.stage) + detail, completed=completed, left=left)

        yield watch


def _progress(step: Step) -> tuple[float, str]:
    """Return how much of the bar is done, and what is said of the rest; without a budget, of this stage alone."""
    if math.isinf(step.left_seconds):
        return (step.done / step.total if step.total else 0.0), f"{_minutes(step.elapsed_seconds)} so far"
    left = f"at most {_minutes(step.left_seconds)} left" if step.left_seconds else "finishing"
    return step.elapsed_seconds / (step.elapsed_seconds + step.left_seconds), left


def _line_per_stage() -> Watcher:
    seen: set[str] = set()

    def watch(step: Step) -> None:
        if step.stage not in seen:
            seen.add(step.stage)
            stderr.print(f"{_minutes(step.elapsed_seconds):>6}  {stage_words(step.stage)}")

    return watch


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
