"""Write a run history in other programs' formats: CSV, JSON lines, Parquet, TensorBoard. No torch."""

from __future__ import annotations

import csv
import json
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from itertools import chain, islice
from pathlib import Path
from typing import Any

from peelwise.errors import MissingExtraError, OptionError
from peelwise.records.run import tag
from peelwise.store.reader import Run, RunReader
from peelwise.store.schema import TABLES, sound

MANIFEST = "export.json"  # tells an earlier export from a third-party folder
_ROWS_AT_A_TIME = 10_000
_FORMULAS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")

Rows = Iterator[sqlite3.Row]


def export(reader: RunReader, runs: Sequence[Run], form: str, folder: Path) -> None:
    """Write ``runs`` into ``folder``, one file per table (for TensorBoard: one folder per run).

    Args:
        reader: of the history.
        runs: which runs.
        form: a key of ``FORMATS``.
        folder: exists; what it holds besides is left alone.

    Raises:
        OptionError: If the format is not known.
        MissingExtraError: If the format needs a library that is not installed.
    """
    if form not in FORMATS:
        raise OptionError(f"--to takes {', '.join(FORMATS)}; got {form!r}.")
    with sound(reader.path):
        FORMATS[form](reader, runs, folder)
    facts = {"format": form, "source": reader.path.name, "runs": [run.id for run in runs]}
    (folder / MANIFEST).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _tables(reader: RunReader, runs: Sequence[Run]) -> Iterator[tuple[str, list[str], Rows]]:
    """Yield name, columns and rows of every table that has any."""
    for name in TABLES:
        rows = chain.from_iterable(reader.table(name, run.id) for run in runs)
        first = next(rows, None)
        if first is not None:
            yield name, first.keys(), chain([first], rows)


def _csv(reader: RunReader, runs: Sequence[Run], folder: Path) -> None:
    for name, columns, rows in _tables(reader, runs):
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows(map(_cell, row) for row in rows)


def _cell(value: Any) -> Any:
    """Return text that a spreadsheet would take for a formula behind an apostrophe, as spreadsheets mark text."""
    return f"'{value}" if isinstance(value, str) and value.lstrip(" ").startswith(_FORMULAS) else value


def _jsonl(reader: RunReader, runs: Sequence[Run], folder: Path) -> None:
    for name, columns, rows in _tables(reader, runs):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(dict(zip(columns, row, strict=True))) + "\n")


def _parquet(reader: RunReader, runs: Sequence[Run], folder: Path) -> None:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtraError("Export to Parquet", "parquet") from error
    kinds = {"INTEGER": pa.int64(), "REAL": pa.float64(), "TEXT": pa.string()}
    for name, columns, rows in _tables(reader, runs):
        # Types are the table's, not those of the first rows, which may hold nothing but nulls.
        types = reader.column_types(name) | {"run_id": "INTEGER", "step": "INTEGER"}
        schema = pa.schema([(column, kinds[types[column]]) for column in columns])
        with parquet.ParquetWriter(folder / f"{name}.parquet", schema) as writer:
            while some := list(islice(rows, _ROWS_AT_A_TIME)):
                arrays = [
                    pa.array(values, kind) for values, kind in zip(zip(*some, strict=True), schema.types, strict=True)
                ]
                writer.write_table(pa.table(arrays, schema=schema))


def _tensorboard(reader: RunReader, runs: Sequence[Run], folder: Path) -> None:
    try:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
    except ImportError as error:
        raise MissingExtraError("Export to TensorBoard", "tensorboard") from error
    for run in runs:
        with ExitStack() as stack:
            writer = EventFileWriter(str(folder / f"run-{run.id}"))
            stack.callback(writer.close)
            for time, step, tag, value in scalars(reader, run):
                summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
                writer.add_event(Event(wall_time=time, step=step, summary=summary))


def scalars(reader: RunReader, run: Run) -> Iterator[tuple[float, int, str, float]]:
    """Yield ``(time, step, tag, value)`` of everything that is one number at one step, as trackers want it."""
    for row in reader.table("steps", run.id):
        if row["loss"] is not None:
            yield row["time"], row["step"], "peelwise/loss", row["loss"]
        yield row["time"], row["step"], "peelwise/share", row["share"]
    times: dict[int, float] = {}
    for row in reader.table("probes", run.id):
        times[row["id"]] = row["time"]
        yield row["time"], row["step"], "peelwise/probe_loss", row["probe_loss"]
        if row["slope"] is not None:
            yield row["time"], row["step"], "peelwise/slope", row["slope"]
    for row in reader.table("statistics", run.id):
        yield times[row["probe_id"]], row["step"], tag(row["name"], row["block"]), row["value"]


FORMATS: dict[str, Callable[[RunReader, Sequence[Run], Path], Any]] = {
    "csv": _csv,
    "jsonl": _jsonl,
    "parquet": _parquet,
    "tensorboard": _tensorboard,
}
