"""Damaged histories end in one error of ours, in every reader and soon, and never in anything else."""

import contextlib
import io
import random
import shutil
import sqlite3
import time

import pytest
from rich.console import Console

from peelwise.errors import PeelwiseError, StoreError
from peelwise.show.dashboard import news, queries
from peelwise.show.runs.watch import watch
from peelwise.store.export import export
from peelwise.store.reader import RunReader
from peelwise.store.schema import sound
from runs import write_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("fuzz") / "run.db")


def read_everything(path, folder):
    """Read as the terminal, the page and the exports do."""
    with RunReader(path) as reader:
        watch(reader, None, Console(file=io.StringIO(), width=200), once=True)
        for run in reader.runs():
            with sound(path):
                queries.run_facts(run, "0.1", "run.db")
                queries.overview(reader, run)
                queries.heat(reader, run, "energy")
                for block in (-1, 0, 1):
                    queries.block(reader, run, block)
                list(news.encoded(news.since(reader, run, news.Place("0.1")), {}))
        for form in ("csv", "jsonl"):
            export(reader, reader.runs(), form, folder)


def ends_well(path, folder):
    """Return the error that reading ended in, if any; only ours is let through."""
    began, found = time.monotonic(), None
    try:
        read_everything(path, folder)
    except PeelwiseError as error:
        found = error
    assert time.monotonic() - began < 30
    assert "\n" not in str(found)
    return found


@pytest.mark.parametrize("seed", range(12))
def test_random_damage(seed, whole, tmp_path):
    draw, found = random.Random(seed), 0
    for _ in range(25):
        path = shutil.copy(whole, tmp_path / "run.db")
        content = bytearray(path.read_bytes())
        for _ in range(draw.choice((1, 5, 50))):
            start = draw.randrange(100, len(content))
            length = draw.choice((1, 2, 8, 64))
            content[start : start + length] = draw.randbytes(length)
        if draw.random() < 0.2:
            del content[draw.randrange(len(content)) :]
        path.write_bytes(content)
        found += ends_well(path, tmp_path) is not None
    assert found  # the control: some of it was seen


HUGE = "x'" + "00" * 100 + "'"
TYPED = [
    *(f"UPDATE runs SET {c} = {v}" for c in ("name", "started", "status", "host", "architecture") for v in ("7", HUGE)),
    *(f"UPDATE runs SET {c} = {v}" for c in ("probe", "settings", "versions") for v in ("'[1]'", "'{'", "x'00'", "7")),
    "UPDATE runs SET settings = '" + "[" * 100_000 + "'",
    'UPDATE runs SET settings = \'{"margin": "x"}\'',
    'UPDATE runs SET settings = \'{"margin": ' + "9" * 5_000 + "}'",
    *(f"UPDATE runs SET {c} = 'x'" for c in ("pid", "parameters", "budget", "in_distribution")),
    "DELETE FROM blocks",
    "UPDATE blocks SET name = x'ff'",
    "UPDATE blocks SET name = CAST(x'ff' AS TEXT)",
    *(f"UPDATE steps SET {c} = {v}" for c in ("step", "time", "loss", "share") for v in ("'x'", "x'0300000000000000'")),
    "UPDATE steps SET step = 1.5",
    "UPDATE steps SET time = 1e300",
    "UPDATE steps SET time = -1e17",
    "UPDATE steps SET share = 9e999, loss = 9e999",
    *(f"UPDATE probes SET {c} = 'x'" for c in ("step", "time", "probe_loss", "slope", "still_falling", "seconds")),
    *(f"UPDATE probes SET letters = {v}" for v in ("''", "'RG'", "'RGXYZ'", "'éab'", "7", "x'52'")),
    *(f"UPDATE statistics SET {c} = x'00'" for c in ("value", "low", "high", "to_median", "to_trend")),
    *(f"UPDATE OR IGNORE statistics SET {c} = 'x'" for c in ("block", "name", "probe_id")),
    "UPDATE OR IGNORE statistics SET block = 10000000",
    "UPDATE OR IGNORE statistics SET block = -7",
    *(f"UPDATE profiles SET numbers = {v}" for v in ("x'00'", "'text'", "7", "zeroblob(400)")),
    *(f"UPDATE matrices SET {c} = x'00'" for c in ("matrix", "share")),
    *(f"UPDATE verdicts SET {c} = {v}" for c in ("colour", "reason", "measured_step") for v in ("x'00'", "'x'")),
    *(f"UPDATE events SET {c} = x'00'" for c in ("step", "time", "level", "kind", "block", "text", "suggestion")),
    "PRAGMA user_version = -3",
    "PRAGMA user_version = 1",
    "PRAGMA application_id = 7",
    *(f"DROP TABLE {t}" for t in ("runs", "blocks", "steps", "probes", "statistics", "events", "profiles")),
    "ALTER TABLE steps RENAME COLUMN loss TO losses",
    "DROP VIEW history; CREATE VIEW history AS SELECT * FROM history",
    "DROP TABLE runs; CREATE VIEW runs AS SELECT * FROM runs",
    "DROP TABLE steps; CREATE VIEW steps AS WITH RECURSIVE n(id) AS (SELECT 1 UNION ALL SELECT id + 1 FROM n) "
    "SELECT id, 1 AS run_id, id AS step, 0.5 AS time, 1.0 AS loss, 0.0 AS share FROM n",
    "PRAGMA writable_schema = ON; UPDATE sqlite_master SET sql = 'nonsense' WHERE name = 'steps'",
    "PRAGMA writable_schema = ON; UPDATE sqlite_master SET sql = CAST(CAST(sql AS BLOB) || x'0aff' AS TEXT)",
    "PRAGMA writable_schema = ON; UPDATE sqlite_master SET rootpage = 2 WHERE type = 'table'",
    "PRAGMA writable_schema = ON; UPDATE sqlite_master SET type = 'view' WHERE name = 'runs'",
]


@pytest.mark.parametrize("statements", TYPED, ids=range(len(TYPED)))
def test_typed_damage(statements, whole, tmp_path):
    path = shutil.copy(whole, tmp_path / "run.db")
    with contextlib.closing(sqlite3.connect(path)) as connection, contextlib.suppress(sqlite3.IntegrityError):
        connection.executescript(statements)
    ends_well(path, tmp_path)


def test_a_step_stored_as_bytes_is_named(whole, tmp_path):
    """As versions before this one stored NumPy's whole numbers."""
    path = shutil.copy(whole, tmp_path / "run.db")
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE steps SET step = x'0300000000000000' WHERE step = 39")
    error = ends_well(path, tmp_path)
    assert isinstance(error, StoreError)
    assert "a step in it is bytes" in str(error)


def test_a_question_without_end_is_ended(whole, monkeypatch):
    from peelwise.store import reader as reading

    monkeypatch.setattr(reading, "_LONGEST", 0.2)
    endless = "WITH RECURSIVE n(id) AS (SELECT 1 UNION ALL SELECT id + 1 FROM n) SELECT max(id) AS id FROM n"
    with RunReader(whole) as reader:
        with pytest.raises(StoreError, match="takes too long"):
            reader._rows(endless)
        assert len(reader.steps(1)) == 40


def test_whole_files_are_read_without_an_error(whole, tmp_path):
    assert ends_well(shutil.copy(whole, tmp_path / "run.db"), tmp_path) is None
