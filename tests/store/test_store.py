"""The run history: what is written is what is read, and what refuses to be written says why."""

import os
import re
import resource
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from peelwise.errors import StoreError
from peelwise.records.run import WHOLE_MODEL, Statistic, StepRow
from peelwise.store import schema
from peelwise.store import writer as writing
from peelwise.store.keeper import Keeper
from peelwise.store.reader import RunReader
from peelwise.store.writer import RunWriter
from runs import BLOCKS, STATISTICS, event, measurement_row, run_info, write_run

PAGE = Path(__file__).parents[2] / "docs" / "run-history.md"


def python(code):
    """Run code in a process of its own that finds what the tests find."""
    code = f"import sys; sys.path[:0] = {[p for p in sys.path if p]!r}\n{code}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def values(rows, *columns):
    return [tuple(row[c] for c in columns) for row in rows]


@pytest.fixture(scope="module")
def written_once(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("history") / "run.db")


@pytest.fixture
def run_db(written_once, tmp_path):
    return shutil.copy(written_once, tmp_path / "run.db")


def test_what_was_written_is_read(run_db):
    with RunReader(run_db) as reader:
        run = reader.latest()
        assert (run.id, run.status, run.pid) == (1, "finished", os.getpid())
        assert run.info == run_info()
        assert values(reader.steps(1), "step", "loss") == [(s, 4.0 - s / 100) for s in range(40)]
        assert values(reader.probes(1), "step", "kind", "letters")[:2] == [(0, "ranking", "RG?"), (10, "alone", "RG?")]
        assert [tuple(probe)[4:-1] for probe in reader.probes(1)][1] == (
            "alone",
            2.99,
            -1e-3,
            -2e-3,
            -1e-4,
            1,
            0.5,
            0.029,
        )
        for place, name in enumerate(STATISTICS):
            expected = [(s, b, s + b / 10 + place / 100) for s in range(0, 40, 10) for b in range(3)]
            assert values(reader.statistics(1, name), "step", "block", "value") == expected
        found = reader.statistics(1, "recoverable")
        assert values(found, "step", "block", "value", "low", "high") == [(s, 1, 0.03, 0.02, 0.04) for s in (10, 30)]
        assert values(reader.matrices(1, 1), "step", "matrix", "share")[:2] == [
            (0, "attention.out", 0.7),
            (0, "feed_forward.0", 0.3),
        ]
        assert values(reader.verdicts(1), "step", "block", "colour", "measured_step")[-1] == (30, 0, "red", 30)
        (alert,) = reader.events(1)
        assert (alert["step"], alert["level"], alert["kind"], alert["block"]) == (30, "alert", "red", 0)


def test_one_block_and_only_what_is_new(run_db):
    with RunReader(run_db) as reader:
        assert values(reader.statistics(1, "energy", block=2), "step", "value")[1] == (10, 10.2)
        assert values(reader.statistics(1, "energy", block=2, after=3), "probe_id") == [(4,)]
        assert values(reader.steps(1, after=38), "step") == [(38,), (39,)]
        assert values(reader.probes(1, after=4), "step") == []
        assert reader.events(1, after=1) == []


@pytest.mark.parametrize(("most", "steps"), [(1, [39]), (2, [19, 39]), (3, [11, 25, 39]), (40, list(range(40)))])
def test_thinning_is_even_and_keeps_the_last(run_db, most, steps):
    with RunReader(run_db) as reader:
        assert [row["step"] for row in reader.steps(1, most=most)] == steps
        assert [row["step"] for row in reader.statistics(1, "energy", block=0, most=2)] == [10, 30]
        # Only the probes that hold the statistic are counted.
        assert [row["step"] for row in reader.statistics(1, "recoverable", most=2)] == [10, 30]
        with pytest.raises(StoreError, match="at least 1, got 0"):
            reader.steps(1, most=0)


def test_runs_follow_each_other_in_one_file(run_db):
    write_run(run_db, steps=5, name="second")
    with RunReader(run_db) as reader:
        assert [(r.id, r.info.name, r.info.blocks) for r in reader.runs()] == [
            (1, "run", BLOCKS),
            (2, "second", BLOCKS),
        ]
        assert [row["step"] for row in reader.steps(2, most=3)] == [0, 2, 4]
        assert len(reader.probes(1)) == 4


def test_plain_sql(run_db):
    """The queries of docs/run-history.md work, and give what they say."""
    queries = re.findall(r"```sql\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(queries) >= 4
    with sqlite3.connect(run_db) as connection:
        for query in queries:
            assert connection.execute(query).fetchall(), query
        rows = connection.execute("SELECT step, value, letter FROM history WHERE statistic = 'energy' AND block = 1")
        assert rows.fetchall() == [(s, s + 0.1, "G") for s in range(0, 40, 10)]


def test_every_table_and_column_is_documented(run_db):
    text = PAGE.read_text()
    with sqlite3.connect(run_db) as connection:
        for table in (*schema.TABLES, "profiles"):
            for _, column, *_ in connection.execute(f"PRAGMA table_info({table})"):
                assert f"`{column}`" in text, f"{table}.{column}"


def test_statistics_of_the_whole_model(tmp_path):
    row = measurement_row(0)
    row = replace(row, statistics=(*row.statistics, Statistic("composed", WHOLE_MODEL, 0.1, 0.05, 0.15)))
    with RunWriter(tmp_path / "run.db", run_info()) as writer:
        writer.measurement(row)
    with sqlite3.connect(tmp_path / "run.db") as connection:
        found = connection.execute("SELECT block, block_name, value, letter FROM history WHERE statistic = 'composed'")
        assert found.fetchall() == [(-1, None, 0.1, "")]


# -- live ----------------------------------------------------------------------------------------------------------


def test_readers_see_whole_records_while_it_is_written(tmp_path):
    path = tmp_path / "run.db"
    with RunWriter(path, run_info()) as writer, RunReader(path) as reader:
        assert reader.latest().status == "running"
        writer.measurement(measurement_row(0))
        writer.measurement(measurement_row(1))
        assert [row["step"] for row in reader.probes(1)] == [0, 1]
        twice = measurement_row(2)
        with pytest.raises(StoreError, match="UNIQUE"):
            writer.measurement(replace(twice, statistics=twice.statistics * 2))
        assert [row["step"] for row in reader.probes(1)] == [0, 1]
        writer.step(StepRow(1, None, 0.0))
        assert values(reader.steps(1), "step", "loss") == [(1, None)]
    assert {file.name for file in tmp_path.iterdir()} == {"run.db"}


KILLS = """
import os
from kills import killed_children
from peelwise.store.reader import RunReader
from peelwise.store.writer import RunWriter
from runs import measurement_row, run_info
from peelwise.records.run import StepRow
path, kills = {path!r}, {kills}

def write(name, tell):
    writer = RunWriter(path, run_info(name))
    for step in range(10**9):
        writer.step(StepRow(step, 1.0, 0.0))
        writer.measurement(measurement_row(step, kind="alone"))
        os.write(tell, b".")

# From before the file is opened to long after, and then at any moment of a record.
soon = lambda draw: draw.random() ** 2 * 0.02
for kill, written in killed_children(write, kills, wanted=[0, 1, 3, 10], seconds=soon):
    if not os.path.exists(path):
        continue
    with RunReader(path) as reader:
        runs = [run for run in reader.runs() if run.info.name == kill]
        if not runs:
            assert written == 0, "the run itself is lost"
            continue
        reader._connection.execute("BEGIN")  # one moment: what the killed one had sent may come just now
        probes, steps = reader.probes(runs[0].id), reader.steps(runs[0].id)
        assert written <= len(probes) <= written + 1, (written, len(probes))
        assert [p["step"] for p in probes] == list(range(len(probes)))
        assert len(probes) <= len(steps) <= len(probes) + 1
        assert len(reader.statistics(runs[0].id, "energy")) == 3 * len(probes)
        assert len(reader.statistics(runs[0].id, "recoverable")) == len(probes)
        print(len(probes))
with RunWriter(path, run_info("last")), RunReader(path) as reader:
    assert {{run.status for run in reader.runs()[:-1]}} == {{"interrupted"}}
    (whole,) = reader._rows("PRAGMA integrity_check")
    assert whole[0] == "ok"
"""


def check_killed_writers(folder, kills):
    """Kill so many processes that write, one after another; also called with dozens, nightly."""
    done = python(KILLS.format(path=str(folder / "run.db"), kills=kills))
    assert done.returncode == 0, done.stderr
    assert sum(map(int, done.stdout.split())) > 2 * kills  # the control: there was something to lose


@pytest.mark.slow
def test_kill_9_at_any_moment_loses_at_most_the_record_being_written(tmp_path):
    check_killed_writers(tmp_path, 8)


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_second_writer_is_refused_and_told_who_writes(run_db):
    with RunWriter(run_db, run_info("first")) as writer:
        with pytest.raises(StoreError, match=rf"is being written by process {os.getpid()} on .* \(run 2, 'first'\)"):
            RunWriter(run_db, run_info("second"))
        done = python(f"from runs import write_run; write_run({str(run_db)!r})")
        assert "StoreError" in done.stderr
        assert "one writer at a time" in done.stderr
        writer.step(StepRow(0, 1.0, 0.0))
    write_run(run_db, steps=1)
    with RunReader(run_db) as reader:
        assert [run.info.name for run in reader.runs()] == ["run", "first", "run"]


def test_a_full_disk_is_said_and_what_was_written_stays(tmp_path):
    """A real refusal of the operating system: files of the process that writes may not grow."""
    path = tmp_path / "run.db"
    writer = RunWriter(path, run_info())
    written = 0
    resource.prlimit(writer._keeper.pid, resource.RLIMIT_FSIZE, (600_000, 600_000))
    words = rf"{path} cannot be written: (database or disk is full|disk I/O error)"
    with pytest.raises(StoreError, match=words):  # noqa: PT012
        for written in range(10_000):
            writer.measurement(measurement_row(written))
    assert written > 10
    with RunReader(path) as reader:
        assert [row["step"] for row in reader.probes(1)] == list(range(written))
    writer.close()


@pytest.mark.parametrize("path", ["/proc/run.db", "missing/run.db", "file.txt/run.db"])
def test_a_folder_that_cannot_be_written(path, tmp_path):
    (tmp_path / "file.txt").write_text("text")
    with pytest.raises(StoreError, match=r"cannot be written: (unable to open|there is no folder)"):
        RunWriter(tmp_path / path, run_info())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_can_be_read_but_not_written(run_db):
    run_db.parent.chmod(0o500)
    try:
        with pytest.raises(StoreError, match="cannot be written"):
            RunWriter(run_db, run_info())
        with RunReader(run_db) as reader:
            assert len(reader.steps(1)) == 40
    finally:
        run_db.parent.chmod(0o700)


def test_a_newer_file_is_refused_and_left_alone(run_db):
    with sqlite3.connect(run_db) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    before = run_db.read_bytes()
    for opening in (lambda: RunReader(run_db), lambda: RunWriter(run_db, run_info())):
        with pytest.raises(StoreError, match=r"has schema 99; this version knows up to 2\. Update peelwise"):
            opening()
    assert run_db.read_bytes() == before


def test_foreign_files_are_refused_and_left_alone(tmp_path):
    other, text = tmp_path / "other.db", tmp_path / "notes.txt"
    connection = sqlite3.connect(other)
    connection.execute("CREATE TABLE mine (x)")
    connection.close()
    text.write_text("no database, but long enough to be read as one. " * 100)
    for path, words in ((other, "no run history of peelwise"), (text, "it is no SQLite file")):
        before = path.read_bytes()
        for opening in (RunReader, lambda path: RunWriter(path, run_info())):
            with pytest.raises(StoreError, match=words):
                opening(path)
        assert path.read_bytes() == before
    with pytest.raises(StoreError, match="No run history at"):
        RunReader(tmp_path / "none.db")
    assert {file.name for file in tmp_path.iterdir()} == {"other.db", "notes.txt"}


def test_a_damaged_file_is_an_error_of_ours(run_db):
    content = bytearray(run_db.read_bytes())
    content[4096 * 2 :] = os.urandom(len(content) - 4096 * 2)
    run_db.write_bytes(content)

    def read_all():
        with RunReader(run_db) as reader:
            return [list(reader.table(table, 1)) for table in schema.TABLES]

    with pytest.raises(StoreError, match="cannot be read"):
        read_all()


def test_an_older_file_is_migrated_for_writing_and_read_as_it_is(run_db, monkeypatch):
    before = run_db.read_bytes()
    newer = (*schema.MIGRATIONS, ("ALTER TABLE steps ADD COLUMN tokens INTEGER DEFAULT 7",))
    monkeypatch.setattr(schema, "MIGRATIONS", newer)
    monkeypatch.setattr(writing, "keeper_of", Keeper)  # another process would not know of it
    with RunReader(run_db) as reader:
        assert next(iter(reader.table("steps", 1)))["tokens"] == 7
    assert run_db.read_bytes() == before
    write_run(run_db, steps=1)
    with sqlite3.connect(run_db) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (3,)
        assert connection.execute("SELECT count(*) FROM steps WHERE tokens = 7").fetchone() == (41,)


def test_a_migration_that_fails_changes_nothing(run_db, monkeypatch):
    broken = (*schema.MIGRATIONS, ("ALTER TABLE steps ADD COLUMN tokens", "ALTER TABLE absent ADD COLUMN x"))
    monkeypatch.setattr(schema, "MIGRATIONS", broken)
    monkeypatch.setattr(writing, "keeper_of", Keeper)
    with pytest.raises(StoreError, match="no such table"):
        RunWriter(run_db, run_info())
    monkeypatch.undo()
    write_run(run_db, steps=1)
    with RunReader(run_db) as reader:
        assert "tokens" not in next(iter(reader.table("steps", 1))).keys()  # noqa: SIM118


def test_a_copy_at_rest_is_read_where_nothing_can_be_written(run_db):
    """Read-only media: the file is opened without shared memory."""
    with tempfile.TemporaryDirectory() as name:  # unlike pytest's own, others may look into it
        folder = Path(name) / "media"
        shutil.copytree(run_db.parent, folder)
        folder.parent.chmod(0o755)
        folder.chmod(0o555)
        done = python(f"""if True:
            import os
            from peelwise.store.reader import RunReader
            if os.geteuid() == 0:
                os.setuid(65534)
            assert not os.access({str(folder)!r}, os.W_OK)
            with RunReader({str(folder / "run.db")!r}) as reader:
                print(len(reader.steps(1)))
        """)
        folder.chmod(0o755)
    assert done.stdout == "40\n", done.stderr


def test_events_without_a_probe(tmp_path):
    with RunWriter(tmp_path / "run.db", run_info()) as writer, RunReader(tmp_path / "run.db") as reader:
        writer.event(event(5, kind="frozen", block=None))
        (found,) = reader.events(writer.run_id)
        assert (found["step"], found["kind"], found["block"]) == (5, "frozen", None)


def test_a_run_that_ends_in_an_error_says_so(tmp_path):
    with pytest.raises(ZeroDivisionError), RunWriter(tmp_path / "run.db", run_info()):
        raise ZeroDivisionError
    with RunReader(tmp_path / "run.db") as reader:
        assert reader.latest().status == "failed"
