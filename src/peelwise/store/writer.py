"""Write one run into a history, one transaction per record."""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from peelwise.errors import StoreError
from peelwise.records.run import Event, Measurement, RunInfo, StepRow
from peelwise.store import profiles
from peelwise.store.lock import locked
from peelwise.store.reader import Status
from peelwise.store.schema import atomic, explained, opened_for_writing


class RunWriter:
    """Writes one run into a history; the file may hold earlier runs, and there is one writer at a time.

    Args:
        path: the file; made if it does not exist, brought to this version's schema if it is older.
        info: what is known of the run.

    Raises:
        StoreError: If another writer has the file, it is no run history or a newer one, or cannot be written.
    """

    def __init__(self, path: str | Path, info: RunInfo) -> None:
        self.path = Path(path)
        self._blocks = len(info.blocks)
        self._lock = locked(self.path)
        try:
            with explained(self.path):
                self._connection = opened_for_writing(self.path)
                self.run_id = self._begin_run(info)
        except BaseException:
            self._lock.close()
            raise

    def step(self, row: StepRow) -> None:
        """Write one training step.

        Raises:
            StoreError: If it cannot be written; nothing of it then is.
        """
        with self._transaction():
            self._insert("steps", run_id=self.run_id, step=row.step, time=time.time(), loss=row.loss, share=row.share)

    def measurement(self, row: Measurement) -> int:
        """Write everything a probe found, as one transaction; return its id.

        Raises:
            StoreError: If it cannot be written; nothing of it then is.
        """
        with self._transaction():
            probe_id = self._insert(
                "probes",
                run_id=self.run_id,
                step=row.step,
                time=time.time(),
                kind=row.kind,
                probe_loss=row.probe_loss,
                slope=row.slope,
                slope_low=row.slope_low,
                slope_high=row.slope_high,
                still_falling=row.still_falling,
                seconds=row.seconds,
                share=row.share,
                letters=row.letters,
            )
            many = self._connection.executemany
            many(
                "INSERT INTO statistics VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                [(probe_id, s.name, s.block, s.value, s.low, s.high, s.to_median, s.to_trend) for s in row.statistics],
            )
            many(
                "INSERT INTO profiles VALUES (?, ?, ?, ?)",
                [(n, kind, probe_id, numbers) for n, kind, numbers in profiles.packed(row.statistics, self._blocks)],
            )
            many(
                "INSERT INTO matrices VALUES (?, ?, ?, ?)",
                [(probe_id, m.block, m.matrix, m.share) for m in row.matrices],
            )
            many(
                "INSERT INTO verdicts VALUES (?, ?, ?, ?, ?)",
                [(probe_id, v.block, v.colour, v.reason, v.measured_step) for v in row.verdicts],
            )
            for event in row.events:
                self._insert_event(event)
        return probe_id

    def event(self, event: Event) -> None:
        """Write one event that belongs to no probe.

        Raises:
            StoreError: If it cannot be written.
        """
        with self._transaction():
            self._insert_event(event)

    def close(self, status: Status = "finished") -> None:
        """End the run and let the next writer in; closing again does nothing."""
        try:
            with suppress(StoreError, sqlite3.ProgrammingError), self._transaction():
                self._connection.execute(
                    "UPDATE runs SET status = ?, ended = ? WHERE id = ?", (status, _now(), self.run_id)
                )
            self._connection.close()
        finally:
            self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close("finished" if kind is None else "failed")

    def _begin_run(self, info: RunInfo) -> int:
        with self._transaction():
            # We hold the only writer's lock, so whoever still counts as running was killed.
            self._connection.execute("UPDATE runs SET status = 'interrupted' WHERE status = 'running'")
            run_id = self._insert(
                "runs",
                name=info.name,
                started=_now(),
                status="running",
                host=socket.gethostname(),
                pid=os.getpid(),
                architecture=info.architecture,
                parameters=info.parameters,
                budget=info.budget,
                in_distribution=info.in_distribution,
                probe=json.dumps(dict(info.probe)),
                settings=json.dumps(dict(info.settings)),
                versions=json.dumps(dict(info.versions)),
            )
            rows = [(run_id, block, name) for block, name in enumerate(info.blocks)]
            self._connection.executemany("INSERT INTO blocks VALUES (?, ?, ?)", rows)
        return run_id

    def _insert_event(self, event: Event) -> None:
        self._insert(
            "events",
            run_id=self.run_id,
            step=event.step,
            time=time.time(),
            level=event.level,
            kind=event.kind,
            block=event.block,
            since_step=event.since_step,
            text=event.text,
            suggestion=event.suggestion,
        )

    def _insert(self, table: str, **values: Any) -> int:
        places = ", ".join("?" * len(values))
        sql = f"INSERT INTO {table} ({', '.join(values)}) VALUES ({places})"
        return int(self._connection.execute(sql, tuple(values.values())).lastrowid or 0)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with explained(self.path), atomic(self._connection):
            yield


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
