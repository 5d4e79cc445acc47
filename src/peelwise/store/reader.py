"""Read a run history, also while it is being written."""

from __future__ import annotations

import json
import math
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from peelwise.errors import StoreError
from peelwise.records.run import RunInfo
from peelwise.store import profiles
from peelwise.store.profiles import Held, Kind
from peelwise.store.schema import TABLES, explained, opened_for_reading, sound
from peelwise.store.sound import checked, one_by_one

Status = Literal["running", "finished", "failed", "interrupted"]
Between = tuple[int, int]  # first and last training step that is wanted
ALL_STEPS: Between = (-(2**62), 2**62)
_EVENTS = "SELECT * FROM events WHERE run_id = ? AND id > ?"
_LONGEST = 30.0  # seconds for one question: a damaged file can be one that never ends


@dataclass(frozen=True)
class Run:
    """One run of a history as a reader sees it. ``status`` is ``running`` until the next writer finds it was killed."""

    id: int
    started: str
    ended: str | None
    status: Status
    host: str
    pid: int
    info: RunInfo


class RunReader:
    """Reads a history, also while it is being written; every call sees whole records only.

    A file of an older schema is left as it is; what it lacks is made in memory.

    Args:
        path: the file.

    Raises:
        StoreError: If there is none, or it is no run history, or a newer one.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not _is_file(self.path):
            raise StoreError(f"No run history at {self.path}. Give the file that the monitor's store= names.")
        with explained(self.path, "read"):
            self._connection = opened_for_reading(self.path)
        self._until = math.inf
        self._connection.set_progress_handler(lambda: time.monotonic() > self._until, 100_000)

    def runs(self) -> list[Run]:
        """Return all runs, oldest first."""
        return self._runs("")

    def latest(self) -> Run:
        """Return the newest run.

        Raises:
            StoreError: If the file holds no run yet.
        """
        found = self._runs("WHERE id = (SELECT max(id) FROM runs)")
        if not found:
            raise StoreError(f"{self.path} holds no run yet.")
        return found[0]

    def run(self, run_id: int) -> Run:
        """Return one run.

        Raises:
            StoreError: If there is none of that number.
        """
        found = self._runs(f"WHERE id = {int(run_id)}")
        if not found:
            numbers = ", ".join(str(row["id"]) for row in self._rows("SELECT id FROM runs ORDER BY id")) or "none"
            raise StoreError(f"{self.path} has no run {run_id}; it holds: {numbers}.")
        return found[0]

    def steps(self, run_id: int, *, after: int = 0, most: int | None = None) -> list[sqlite3.Row]:
        """Return ``id, step, time, loss, share`` of steps whose id is beyond ``after``, thinned evenly to ``most``."""
        return self._thinned("id, step, time, loss, share", "steps", run_id, after, most)

    def probes(self, run_id: int, *, after: int = 0, most: int | None = None) -> list[sqlite3.Row]:
        """Return the probes whose id is beyond ``after``, thinned evenly to ``most``; the last one is always there."""
        return self._thinned("probes.*", "probes", run_id, after, most)

    def loss_bins(self, run_id: int, *, most: int, between: Between = ALL_STEPS) -> list[sqlite3.Row]:
        """Return at most ``most`` bins of consecutive steps: nothing is left out, so that no spike is.

        Each has ``last_id, first, last`` (steps), ``rows``, the ``mean, low, high`` of its losses (null where none was
        given), the latest ``share``, and the ``stride`` that all of them but the last are long.
        """
        # A bare column beside max() is taken from the row that holds it.
        return self._rows(
            """SELECT max(id) AS last_id, min(step) AS first, max(step) AS last, count(*) AS rows, avg(loss) AS mean,
            min(loss) AS low, max(loss) AS high, share, stride FROM steps,
            (SELECT min(id) AS base, max(count(*) - 1, 0) / :most + 1 AS stride FROM steps
             WHERE run_id = :run AND step BETWEEN :first AND :end)
            WHERE run_id = :run AND step BETWEEN :first AND :end GROUP BY (id - base) / stride ORDER BY last_id""",
            {"run": run_id, "most": _at_most(most), "first": between[0], "end": between[1]},
        )

    def measurements(self, run_id: int, *, between: Between = ALL_STEPS) -> list[sqlite3.Row]:
        """Return ``id, step, probe_loss, letters`` of all probes: what a map of verdicts needs."""
        return self._rows(
            "SELECT id, step, probe_loss, letters FROM probes WHERE run_id = ? AND step BETWEEN ? AND ? ORDER BY id",
            (run_id, *between),
        )

    def to_median(self, run: Run, name: str, *, between: Between = ALL_STEPS) -> Held:
        """Return how far a statistic of every block is from its own running median, over all measurements that tell."""
        blocks = len(run.info.blocks)
        if self._has_profiles(run.id):
            found = self._packed(run.id, name, "to_median", "numbers", between)
            whole = profiles.of_profiles(found, blocks + 1)
            return profiles.held(whole.probe_ids, whole.numbers[:, :blocks])
        told = "s.block >= 0 AND s.to_median IS NOT NULL"
        return profiles.of_statistics(self._plain(run.id, name, "s.block, s.to_median", told, between), blocks)

    def values(self, run: Run, name: str, block: int, *, between: Between = ALL_STEPS) -> Held:
        """Return one block's values of a statistic, over all measurements that hold it."""
        if self._has_profiles(run.id):
            cut = profiles.cut(block, len(run.info.blocks))
            return profiles.of_profiles(self._packed(run.id, name, "value", cut, between), 1)
        return profiles.of_statistics(self._plain(run.id, name, "0, s.value", f"s.block = {int(block)}", between), 1)

    def at(self, probe_ids: Iterable[int], name: str, block: int) -> list[sqlite3.Row]:
        """Return one block's rows of a statistic, as `statistics` does, of the probes named."""
        ids = ", ".join(str(int(each)) for each in probe_ids)
        return self._rows(
            f"""SELECT s.probe_id, p.step, s.block, s.value, s.low, s.high, s.to_median, s.to_trend
            FROM probes p CROSS JOIN statistics s WHERE p.id IN ({ids}) AND s.probe_id = p.id AND s.name = ?
            AND s.block = ? ORDER BY s.probe_id""",
            (name, block),
        )

    def statistic_names(self, run_id: int, *, name: str | None = None, among: int = 100) -> list[sqlite3.Row]:
        """Return ``name, of_blocks, of_model, has_interval`` of all statistics (or one) in the latest probes."""
        return self._rows(
            f"""SELECT s.name, max(s.block) >= 0 AS of_blocks, min(s.block) < 0 AS of_model, count(s.low) > 0 AS
            has_interval FROM (SELECT id FROM probes WHERE run_id = :run ORDER BY id DESC LIMIT :among) p
            CROSS JOIN statistics s WHERE s.probe_id = p.id {"" if name is None else "AND s.name = :name"}
            GROUP BY s.name ORDER BY s.name""",
            {"run": run_id, "among": among, "name": name},
        )

    def record(self, probe_id: int) -> dict[str, list[sqlite3.Row]]:
        """Return everything else that was written with one probe: its statistics, matrices and verdicts."""
        tables = ("statistics", "matrices", "verdicts")
        return {t: self._rows(f"SELECT * FROM {t} WHERE probe_id = ?", (probe_id,)) for t in tables}

    def statistics(
        self,
        run_id: int,
        name: str,
        *,
        block: int | None = None,
        after: int = 0,
        most: int | None = None,
        between: Between = ALL_STEPS,
    ) -> list[sqlite3.Row]:
        """Return one statistic's ``probe_id, step, block, value, low, high, to_median, to_trend``.

        Args:
            run_id: the run.
            name: of the statistic.
            block: one block only; all of them otherwise.
            after: only probes whose id is beyond it.
            most: thin evenly to so many of the probes that hold it.
            between: first and last step.
        """
        where = "AND s.block = :block" if block is not None else ""
        # Counted from the newest, so that the latest numbers are always there.
        picked = f"""SELECT id, step, row_number() OVER (ORDER BY id DESC) - 1 AS place, count(*) OVER () AS held
            FROM probes p WHERE p.run_id = :run AND p.id > :after AND p.step BETWEEN :first AND :end AND EXISTS
            (SELECT 1 FROM statistics s WHERE s.probe_id = p.id AND s.name = :name {where})"""
        # CROSS JOIN forces the order: for one block, one look-up per probe beats any scan.
        return self._rows(
            f"""SELECT s.probe_id, p.step, s.block, s.value, s.low, s.high, s.to_median, s.to_trend
            FROM ({picked}) p CROSS JOIN statistics s WHERE p.place % max((p.held + :most - 1) / :most, 1) = 0
            AND s.probe_id = p.id AND s.name = :name {where} ORDER BY s.probe_id, s.block""",
            {
                "run": run_id,
                "name": name,
                "block": block,
                "after": after,
                "most": _at_most(most),
                "first": between[0],
                "end": between[1],
            },
        )

    def newest(self, run_id: int, name: str, *, among: int = 500) -> dict[int, sqlite3.Row]:
        """Return block -> the newest row of a statistic, as `statistics` does, if it is ``among`` the latest probes."""
        (last,) = self._rows("SELECT max(id) AS newest FROM probes WHERE run_id = ?", (run_id,))
        rows = self.statistics(run_id, name, after=max((last["newest"] or 0) - among, 0))
        return {row["block"]: row for row in rows}

    def matrices(self, run_id: int, block: int) -> list[sqlite3.Row]:
        """Return ``probe_id, step, matrix, share`` of one block."""
        return self._rows(
            """SELECT m.probe_id, p.step, m.matrix, m.share FROM probes p CROSS JOIN matrices m
            WHERE m.probe_id = p.id AND p.run_id = ? AND m.block = ? ORDER BY m.probe_id, m.matrix""",
            (run_id, block),
        )

    def verdicts(self, run_id: int) -> list[sqlite3.Row]:
        """Return every change of a verdict: ``probe_id, step, block, colour, reason, measured_step``."""
        return self._rows(
            """SELECT v.probe_id, p.step, v.block, v.colour, v.reason, v.measured_step FROM verdicts v
            JOIN probes p ON p.id = v.probe_id WHERE p.run_id = ? ORDER BY v.probe_id, v.block""",
            (run_id,),
        )

    def events(self, run_id: int, *, after: int = 0, most: int | None = None) -> list[sqlite3.Row]:
        """Return the events whose id is beyond ``after``, or the ``most`` newest of them."""
        newest = f"SELECT * FROM ({_EVENTS} ORDER BY id DESC LIMIT {_at_most(most)}) ORDER BY id"
        return self._rows(f"{_EVENTS} ORDER BY id" if most is None else newest, (run_id, after))

    def newest_ids(self, run_id: int) -> tuple[int, int, int]:
        """Return the last ids of a run's steps, probes and events, 0 where it has none, however many there are."""
        return self._newest("steps", run_id), self._newest("probes", run_id), self._newest("events", run_id)

    def table(self, name: str, run_id: int) -> Iterator[sqlite3.Row]:
        """Yield the rows of one run from one of ``TABLES``, with the step where only the probe's id is stored."""
        if name not in TABLES:
            raise StoreError(f"No table {name!r} in a run history; there are {', '.join(TABLES)}.")
        if name in ("statistics", "matrices", "verdicts"):
            sql = f"SELECT p.run_id, p.step, t.* FROM {name} t JOIN probes p ON p.id = t.probe_id WHERE p.run_id = ?"
        else:
            sql = f"SELECT * FROM {name} WHERE {'id' if name == 'runs' else 'run_id'} = ?"
        with explained(self.path, "read"):
            yield from one_by_one(self._connection.execute(sql, (run_id,)), self.path)

    def column_types(self, table: str) -> dict[str, str]:
        """Return SQLite's type of every column of one of ``TABLES``."""
        return {row["name"]: row["type"] for row in self._rows(f"PRAGMA table_info({table})")}

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _newest(self, table: str, run_id: int) -> int:
        """Return the last id of a run in a table by bisection: there is one writer at a time, so runs do not mix."""
        (ends,) = self._rows(f"SELECT max(id) AS newest FROM {table}")
        low, high = 0, ends["newest"] or 0  # ids up to low belong to this run or earlier ones, those beyond high do not
        while low < high:
            middle = (low + high + 1) // 2
            (row,) = self._rows(f"SELECT id, run_id FROM {table} WHERE id >= ? ORDER BY id LIMIT 1", (middle,))
            low, high = (row["id"], max(high, row["id"])) if row["run_id"] <= run_id else (low, middle - 1)
        own = self._rows(f"SELECT 1 AS there FROM {table} WHERE id = ? AND run_id = ?", (low, run_id))
        return low if own else 0

    def _has_profiles(self, run_id: int) -> bool:
        """Whether a run was written with them; one writer writes a run, so its first measurement tells of all."""
        found = self._rows(
            """SELECT 1 FROM statistics s JOIN profiles f ON f.name = s.name AND f.kind = 'value' AND
            f.probe_id = s.probe_id WHERE s.probe_id = (SELECT min(id) FROM probes WHERE run_id = ?) LIMIT 1""",
            (run_id,),
        )
        return bool(found)

    def _packed(self, run_id: int, name: str, kind: Kind, column: str, between: Between) -> list[tuple[int, bytes]]:
        # Measurements of a run follow each other without a gap in the file. Steps may come back after a restart.
        whole = between == ALL_STEPS
        return self._tuples(
            f"""WITH own AS (SELECT id FROM probes WHERE run_id = ? AND step BETWEEN ? AND ?)
            SELECT probe_id, {column} FROM profiles WHERE name = ? AND kind = ? AND probe_id BETWEEN
            (SELECT min(id) FROM own) AND (SELECT max(id) FROM own) {"" if whole else "AND +probe_id IN own"}
            ORDER BY probe_id""",
            (run_id, *between, name, kind),
        )

    def _plain(
        self, run_id: int, name: str, columns: str, where: str, between: Between
    ) -> list[tuple[int, int, float]]:
        # CROSS JOIN forces the order: one look-up per probe.
        return self._tuples(
            f"""SELECT s.probe_id, {columns} FROM probes p CROSS JOIN statistics s WHERE p.run_id = ?
            AND p.step BETWEEN ? AND ? AND s.probe_id = p.id AND s.name = ? AND {where}""",
            (run_id, *between, name),
        )

    def _tuples(self, sql: str, values: Iterable[Any]) -> list[tuple[Any, ...]]:
        """Return plain rows, which take half the time of those with names."""
        cursor = self._connection.cursor()
        cursor.row_factory = None
        with self._limited():
            return cursor.execute(sql, tuple(values)).fetchall()

    @contextmanager
    def _limited(self) -> Iterator[None]:
        self._until = time.monotonic() + _LONGEST
        try:
            with explained(self.path, "read"):
                yield
        finally:
            self._until = math.inf

    def _thinned(self, columns: str, table: str, run_id: int, after: int, most: int | None) -> list[sqlite3.Row]:
        # There is one writer at a time, so the ids of a run follow each other without a gap. News are few: they are
        # found by their ids, not among all rows of the run (with the + no index is used).
        run = "+run_id" if after else "run_id"
        return self._rows(
            f"""SELECT {columns} FROM {table},
            (SELECT max(id) AS last, max(count(*) - 1, 0) / :most + 1 AS stride FROM {table}
             WHERE {run} = :run AND id > :after)
            WHERE {run} = :run AND id > :after AND (last - id) % stride = 0 ORDER BY id""",
            {"run": run_id, "after": after, "most": _at_most(most)},
        )

    def _runs(self, where: str) -> list[Run]:
        names: dict[int, list[str]] = {}
        for row in self._rows(f"SELECT run_id, name FROM blocks {where.replace('id', 'run_id', 1)} ORDER BY 1, block"):
            names.setdefault(row["run_id"], []).append(row["name"])
        rows = self._rows(f"SELECT * FROM runs {where} ORDER BY id")
        with sound(self.path):
            return [_run(row, tuple(names.get(row["id"], ()))) for row in rows]

    def _rows(self, sql: str, values: Iterable[Any] | Mapping[str, Any] = ()) -> list[sqlite3.Row]:
        with self._limited():
            found = self._connection.execute(sql, values).fetchall()  # type: ignore[arg-type]
        return checked(found, self.path)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _run(row: sqlite3.Row, blocks: tuple[str, ...]) -> Run:
    info = RunInfo(
        name=row["name"],
        architecture=row["architecture"],
        parameters=row["parameters"],
        blocks=blocks,
        budget=row["budget"],
        in_distribution=bool(row["in_distribution"]),
        probe=_facts(row["probe"]),
        settings=_facts(row["settings"]),
        versions=_facts(row["versions"]),
    )
    return Run(row["id"], row["started"], row["ended"], row["status"], row["host"], row["pid"], info)


def _facts(text: str) -> dict[str, Any]:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise TypeError("JSON of the wrong kind")
    return found


def _at_most(most: int | None) -> int:
    if most is not None and most < 1:
        raise StoreError(f"most= must be at least 1, got {most}.")
    return 2**62 if most is None else most
