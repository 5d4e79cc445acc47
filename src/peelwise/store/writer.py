"""Write one run into a history, one transaction per record."""

from __future__ import annotations

import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from peelwise.errors import StoreError
from peelwise.records.run import Event, Measurement, RunInfo, StepRow
from peelwise.store import profiles
from peelwise.store.keeper import Part, keeper_of
from peelwise.store.lock import LockedError
from peelwise.store.plain import as_json, number, row, whole
from peelwise.store.reader import RunReader, Status

# Rows that wait while another program holds the file, some hundred bytes each.
MOST_WAITING = 200_000
_AT_ONCE = 5.0  # seconds that are waited for the file where nothing can wait in memory: at the beginning and the end
_RUN = "(SELECT max(id) FROM runs)"
_PROBE = "(SELECT max(id) FROM probes)"


class RunWriter:
    """Writes one run into a history; the file may hold earlier runs, and there is one writer at a time.

    The file is open in a process of its own, see `peelwise.store.keeper`. Every call returns when its record is in the
    file. Where another program holds the file for long, records wait in memory instead, and come when it lets go.

    Args:
        path: the file; made if it does not exist, brought to this version's schema if it is older.
        info: what is known of the run.

    Raises:
        StoreError: If another writer has the file, it is no run history or a newer one, or cannot be written.

    Attributes:
        run_id: number of the run.
    """

    def __init__(self, path: str | Path, info: RunInfo) -> None:
        self.path = Path(path)
        file = _file_of(path)
        self._blocks = len(info.blocks)
        self._owner = os.getpid()
        self._waiting: list[Part] = []
        self._since: float | None = None  # when the oldest of them came
        self._next = 0.0  # when the file is asked for again
        began = list(_begun(info))
        try:
            self._keeper = keeper_of(file)
        except LockedError as error:
            raise StoreError(
                f"{path} is being written by {_writer_of(file)}; it takes one writer at a time. "
                "Give this run a file of its own with store=."
            ) from error
        self._open = True
        try:
            found = self._keeper.write(began, _AT_ONCE)
            if found is None:
                raise StoreError(f"{path} cannot be written: another program holds it.")
        except BaseException:
            self._open = False
            self._keeper.close()
            raise
        self.run_id = found

    def step(self, row: StepRow) -> None:
        """Write one training step.

        Raises:
            StoreError: If it cannot be written; nothing of it then is.
        """
        self._write([_insert("steps", run_id=self.run_id, step=whole(row.step), time=time.time(),
                             loss=number(row.loss), share=_known(row.share))])  # fmt: skip

    def measurement(self, row: Measurement) -> None:
        """Write everything a probe found, as one transaction.

        Raises:
            StoreError: If it cannot be written; nothing of it then is.
        """
        self._write(list(self._measured(row)))

    def event(self, event: Event) -> None:
        """Write one event that belongs to no probe.

        Raises:
            StoreError: If it cannot be written.
        """
        self._write([self._event(event)])

    def close(self, status: Status = "finished") -> None:
        """End the run and let the next writer in; closing again, or in a forked process, does nothing."""
        if not self._open or os.getpid() != self._owner:
            return
        self._open = False
        end = ("UPDATE runs SET status = ?, ended = ? WHERE id = ?", [(status, _now(), self.run_id)])
        try:
            with suppress(StoreError):
                self._keeper.write([*self._waiting, end], _AT_ONCE)
        finally:
            self._keeper.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close("finished" if kind is None else "failed")

    def _write(self, parts: list[Part]) -> None:
        """Write parts, after those that wait; let them wait if another program holds the file."""
        if os.getpid() != self._owner:
            raise StoreError(f"{self.path} is written by process {self._owner}; a fork of it cannot write there.")
        if not self._open:
            raise StoreError(f"{self.path} cannot be written: the run was closed.")
        now = time.monotonic()
        self._waiting += parts
        if now < self._next:
            return self._wait(now)
        # The longer it lasts the longer is waited: some per cent of the training's time, but no reader or writer that
        # comes and goes keeps records out for ever.
        seconds = 0.1 if self._since is None else min(0.1 + (now - self._since) / 20, 5.0)
        try:
            found = self._keeper.write(self._waiting, seconds)
        except StoreError:
            self._waiting = self._waiting[: -len(parts)]
            raise
        if found is None:
            self._next = time.monotonic() + 10 * seconds
            return self._wait(now)
        self._waiting, self._since = [], None

    def _wait(self, now: float) -> None:
        self._since = now if self._since is None else self._since
        if sum(len(rows) for _, rows in self._waiting) > MOST_WAITING:
            minutes = (now - self._since) / 60
            raise StoreError(f"{self.path} cannot be written: another program has held it for {minutes:.0f} minutes.")

    def _measured(self, found: Measurement) -> Iterator[Part]:
        """Yield what a measurement writes; numbers that are NaN say nothing and are left out."""
        yield _insert(
            "probes",
            run_id=self.run_id,
            step=whole(found.step),
            time=time.time(),
            kind=found.kind,
            probe_loss=_known(found.probe_loss, unknown=float("inf")),
            slope=number(found.slope),
            slope_low=number(found.slope_low),
            slope_high=number(found.slope_high),
            still_falling=found.still_falling,
            seconds=_known(found.seconds),
            share=_known(found.share),
            letters=found.letters,
        )
        statistics = [s for s in found.statistics if number(s.value) is not None]
        yield _many(
            f"statistics VALUES ({_PROBE}, ?, ?, ?, ?, ?, ?, ?)",
            [(s.name, s.block, s.value, s.low, s.high, s.to_median, s.to_trend) for s in statistics],
        )
        yield _many(f"profiles VALUES (?, ?, {_PROBE}, ?)", profiles.packed(statistics, self._blocks))
        yield _many(
            f"matrices VALUES ({_PROBE}, ?, ?, ?)",
            [(m.block, m.matrix, m.share) for m in found.matrices if number(m.share) is not None],
        )
        yield _many(
            f"verdicts VALUES ({_PROBE}, ?, ?, ?, ?)",
            [(v.block, v.colour, v.reason, v.measured_step) for v in found.verdicts],
        )
        yield from map(self._event, found.events)

    def _event(self, event: Event) -> Part:
        return _insert(
            "events",
            run_id=self.run_id,
            step=whole(event.step),
            time=time.time(),
            level=event.level,
            kind=event.kind,
            block=event.block,
            since_step=event.since_step,
            text=event.text,
            suggestion=event.suggestion,
        )


def _begun(info: RunInfo) -> Iterator[Part]:
    """Yield what begins a run."""
    yield _insert(
        "runs",
        name=info.name,
        started=_now(),
        status="running",
        host=socket.gethostname(),
        pid=os.getpid(),
        architecture=info.architecture,
        parameters=whole(info.parameters, "number of parameters"),
        budget=number(info.budget),
        in_distribution=bool(info.in_distribution),
        probe=as_json(info.probe),
        settings=as_json(info.settings),
        versions=as_json(info.versions),
    )
    # There is one writer at a time, so whoever still counts as running was killed.
    yield f"UPDATE runs SET status = 'interrupted' WHERE status = 'running' AND id < {_RUN}", [()]
    yield _many(f"blocks VALUES ({_RUN}, ?, ?)", list(enumerate(info.blocks)))


def _insert(table: str, **values: Any) -> Part:
    places = ", ".join("?" * len(values))
    return f"INSERT INTO {table} ({', '.join(values)}) VALUES ({places})", [row(values.values())]


def _many(what: str, rows: list[Any]) -> Part:
    return f"INSERT INTO {what}", [row(each) for each in rows]


def _known(value: Any, unknown: float = 0.0) -> float:
    """Return a number for a column that holds one in every row."""
    found = number(value)
    return unknown if found is None else found


def _file_of(path: str | Path) -> Path:
    """Return the file that a path leads to, links followed: its name is what is locked.

    Raises:
        StoreError: If no file can have that name, or something else does.
    """
    text = os.fspath(path)
    if not isinstance(text, str) or text.strip() in ("", ".", ":memory:") or "\0" in text:
        raise StoreError(f"store= takes the name of a file, such as run.db; got {text!r}. None keeps no history.")
    try:
        file = Path(text).resolve()
        kind = file.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return file  # what cannot be made there, the attempt says
    except (OSError, RuntimeError, ValueError) as error:  # too long a name, a circle of links
        raise StoreError(f"{text!r} cannot be written: {error}.") from error
    if not stat.S_ISREG(kind):
        raise StoreError(f"{text} cannot be written: it is no file but a folder, a device or the like.")
    return file


def _writer_of(path: Path) -> str:
    """Return who writes the file, as far as it says so."""
    with suppress(StoreError), RunReader(path) as reader:
        run = reader.latest()
        return f"process {run.pid} on {run.host} (run {run.id}, {run.info.name!r})"
    return "another process"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
