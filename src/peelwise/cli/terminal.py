"""What the command line says on standard error while it works: progress, a status, warnings."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from peelwise.errors import PeelwiseWarning
from peelwise.show.words import stage_words

if TYPE_CHECKING:
    from peelwise.engine.clock import Progress as Step
    from peelwise.engine.clock import Watcher

stderr = Console(stderr=True, highlight=False)


@contextmanager
def quiet_warnings() -> Iterator[None]:
    """Show peelwise's own warnings as one line; other libraries' do not belong between the progress bars."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        if issubclass(warning.category, PeelwiseWarning):
            stderr.print(f"[yellow]warning:[/] {escape(str(warning.message))}", soft_wrap=True)


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
def progress_bar() -> Iterator[Watcher]:
    """Yield a watcher that draws a bar on a terminal and a line per stage elsewhere."""
    from rich.progress import BarColumn, Progress, TextColumn

    if not stderr.is_terminal:
        yield _line_per_stage()
        return
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}")
    with Progress(*columns, console=stderr, transient=True) as bar:
        task = bar.add_task("starting", total=1.0, left="")

        def watch(step: Step) -> None:
            total = step.elapsed_seconds + step.left_seconds
            detail = f" ({step.done} of {step.total})" if step.total else ""
            left = f"at most {_minutes(step.left_seconds)} left" if step.left_seconds else "finishing"
            bar.update(
                task, description=stage_words(step.stage) + detail, completed=step.elapsed_seconds / total, left=left
            )

        yield watch


def _line_per_stage() -> Watcher:
    seen: set[str] = set()

    def watch(step: Step) -> None:
        if step.stage not in seen:
            seen.add(step.stage)
            stderr.print(f"{_minutes(step.elapsed_seconds):>6}  {stage_words(step.stage)}")

    return watch


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
