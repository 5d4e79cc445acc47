"""What others do to the file while it is written: it is noticed and said, and the training's process lives on."""

import contextlib
import os
import signal
import sqlite3
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from peelwise.errors import StoreError
from peelwise.records.run import Statistic, StepRow
from peelwise.store import writer as writing
from peelwise.store.reader import RunReader
from peelwise.store.writer import RunWriter
from runs import event, measurement_row, run_info

pytestmark = pytest.mark.slow


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.db"


def step(number, loss=1.0):
    return StepRow(number, loss, 0.0)


def steps_in(path, run=1):
    with RunReader(path) as reader:
        return [row["step"] for row in reader.steps(run)]


def end(path, size):
    os.truncate(path, size)


def overwrite(path):
    with path.open("r+b") as file:
        file.write(os.urandom(path.stat().st_size))


def another(path):
    """As ``cp older.db run.db`` does: the same file, other content."""
    with RunWriter(path.with_name("other.db"), run_info()) as writer:
        for number in range(900):
            writer.step(step(number))
    content = path.with_name("other.db").read_bytes()
    with path.open("r+b") as file:
        file.write(content)
    assert path.stat().st_size >= len(content)


def log_of(path):
    return path.with_name("run.db-wal")


def copy_log(path):
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("PRAGMA wal_checkpoint")


DAMAGES = {
    "removed": (lambda path: path.unlink(), "is gone"),
    "renamed": (lambda path: path.rename(path.with_name("other.db")), "is gone"),
    "replaced": (
        lambda path: path.with_name("new").write_bytes(b"") or path.with_name("new").replace(path),
        "replaced",
    ),
    "emptied": (lambda path: end(path, 0), "(damaged|malformed|disk I/O|not a database|no SQLite)"),
    "halved": (lambda path: end(path, path.stat().st_size // 2), "(damaged|malformed|disk I/O)"),
    "overwritten": (overwrite, "(damaged|malformed|no SQLite)"),
    "lengthened": (lambda path: end(path, path.stat().st_size + 4096), "size was changed"),
    "another history written over it": (another, "damaged by another program"),
    "log removed": (lambda path: log_of(path).unlink(), "removed, truncated or overwritten"),
    "log emptied": (lambda path: end(log_of(path), 0), "removed, truncated or overwritten"),
    "log halved": (lambda path: end(log_of(path), log_of(path).stat().st_size // 2), "truncated or overwritten"),
    "log overwritten": (lambda path: overwrite(log_of(path)), "truncated or overwritten"),
    "shared memory emptied": (lambda path: end(path.with_name("run.db-shm"), 0), r"(has ended \(SIGBUS|disk I/O)"),
}


@pytest.mark.parametrize("copied", ["half", "nothing", "all"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_during_training_is_said_at_the_next_record(damage, copied, path):
    """Also where all that the file holds stands in the log too, which SQLite would write over the damage unsaid."""
    hurt, words = DAMAGES[damage]
    with RunWriter(path, run_info()) as writer:
        for number in range(600):
            writer.step(step(number))
            if number == 300 and copied == "half":
                copy_log(path)
        writer.measurement(measurement_row(600))  # the control: what a checkpoint does is no damage
        if copied == "all":
            copy_log(path)
            writer.step(step(600))
        time.sleep(0.02)  # the clock of files has ticked
        hurt(path)
        with pytest.raises(StoreError, match=words):
            writer.step(step(601))


def touch(path):
    os.utime(path)


def copy_and_restart(path):
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def rewrite(path):
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("CREATE TABLE IF NOT EXISTS mine (x)")
        other.execute("VACUUM")


def back_up(path):
    with contextlib.closing(sqlite3.connect(path)) as other, contextlib.closing(sqlite3.connect(":memory:")) as copy:
        other.backup(copy)


@pytest.mark.parametrize("act", [touch, copy_log, copy_and_restart, rewrite, back_up])
def test_what_is_no_damage_ends_no_record(act, path):
    with RunWriter(path, run_info()) as writer:
        for number in range(300):
            writer.step(step(number))
            if number % 50 == 49:
                act(path)
    assert steps_in(path) == list(range(300))


def test_copying_of_the_log_at_any_moment_is_no_damage(path):
    """The file is then half written while the next record comes."""
    ended = threading.Event()

    def copy_again_and_again():
        with contextlib.closing(sqlite3.connect(path, timeout=10)) as other:
            while not ended.is_set():
                other.execute("PRAGMA wal_checkpoint")

    with RunWriter(path, run_info()) as writer:
        copier = threading.Thread(target=copy_again_and_again)
        copier.start()
        try:
            for number in range(2_000):
                writer.step(step(number))
        finally:
            ended.set()
            copier.join()
    assert len(steps_in(path)) == 2_000


def test_the_process_that_writes_is_killed(path):
    with RunWriter(path, run_info()) as writer:
        writer.step(step(0))
        os.kill(writer._keeper.pid, signal.SIGKILL)
        with pytest.raises(StoreError, match=r"the process that writes it has ended \(SIGKILL"):
            writer.step(step(1))
        with pytest.raises(StoreError, match="has ended"):
            writer.step(step(2))
    assert steps_in(path) == [0]


def test_signals_to_the_training_are_not_for_the_process_that_writes(path):
    with RunWriter(path, run_info()) as writer:
        for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(writer._keeper.pid, each)
        writer.step(step(0))
    with RunReader(path) as reader:
        assert (len(reader.steps(1)), reader.latest().status) == (1, "finished")


# -- others that write ---------------------------------------------------------------------------------------------


def test_while_another_program_writes_records_wait_and_then_come(path, monkeypatch):
    with RunWriter(path, run_info()) as writer:
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            other.execute("CREATE TABLE mine (x)")
            began = time.monotonic()
            for number in range(50):
                writer.step(step(number))
            writer.measurement(measurement_row(50, events=(event(50),)))
            assert time.monotonic() - began < 2  # the training is hardly held up
            assert steps_in(path) == []
            time.sleep(1.2)
            other.execute("COMMIT")
        monkeypatch.setattr(writer, "_next", 0.0)
        writer.step(step(51))
        assert steps_in(path) == [*range(50), 51]
        with RunReader(path) as reader:
            assert (len(reader.probes(1)), len(reader.events(1))) == (1, 1)


def test_what_waits_is_written_at_the_end(path):
    writer = RunWriter(path, run_info())
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        writer.step(step(0))
        other.execute("COMMIT")
    writer.close()
    assert steps_in(path) == [0]


def test_waiting_has_an_end(path, monkeypatch):
    monkeypatch.setattr(writing, "MOST_WAITING", 5)
    with (
        RunWriter(path, run_info()) as writer,
        contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other,
    ):
        other.execute("BEGIN IMMEDIATE")
        for number in range(5):
            writer.step(step(number))
        with pytest.raises(StoreError, match="another program has held it"):
            writer.step(step(5))
        other.execute("ROLLBACK")


def test_who_takes_the_run_away_is_noticed(path):
    """As a writer does that was let in somehow: on another machine, or where locks do not work."""
    with RunWriter(path, run_info()) as writer:
        writer.step(step(0))
        with contextlib.closing(sqlite3.connect(path)) as other, other:
            other.execute("UPDATE runs SET status = 'interrupted'")
        with pytest.raises(StoreError, match="was taken by another writer"):
            writer.step(step(1))


def linked(path):
    link = path.with_name("link.db")
    link.symlink_to(path.name)
    return link


def hard_linked(path):
    link = path.with_name("link.db")
    os.link(path, link)
    return link


def unlocked(path):
    path.with_name("run.db-lock").unlink()
    return path


@pytest.mark.parametrize(
    "other_name", [linked, hard_linked, unlocked, lambda path: path.parent / ".." / path.parent.name / path.name]
)
def test_a_second_writer_by_any_name_is_refused(other_name, path):
    with RunWriter(path, run_info("first")) as writer:
        name = other_name(path)
        with pytest.raises(StoreError, match=r"is being written by (process .* \(run 1, 'first'\)|another)"):
            RunWriter(name, run_info("second"))
        writer.step(step(0))
    with RunWriter(name, run_info("third")):  # the control
        pass
    with RunReader(path) as reader:
        assert [(run.info.name, run.status) for run in reader.runs()] == [("first", "finished"), ("third", "finished")]


def test_a_fork_neither_writes_nor_ends_the_run(path):
    with RunWriter(path, run_info()) as writer:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                writer.step(step(7))
            except StoreError:
                writer.close()
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        writer.step(step(0))
        with RunReader(path) as reader:
            assert reader.latest().status == "running"
    assert steps_in(path) == [0]


# -- names and values ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", " ", ".", ":memory:", "run\0.db", Path(), Path(":memory:")])
def test_what_names_no_file_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StoreError, match="takes the name of a file"):
        RunWriter(name, run_info())
    if isinstance(name, str):
        with pytest.raises(StoreError, match="No run history"):
            RunReader(name)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "round").symlink_to("round")
    for name in (tmp_path, tmp_path / "fifo", Path("/dev/null"), tmp_path / ("x" * 300), tmp_path / "round"):
        with pytest.raises(StoreError, match="cannot be written"):
            RunWriter(name, run_info())
        with pytest.raises(StoreError, match="No run history"):
            RunReader(name)


class Tensor:
    """Behaves as a tensor of one number does."""

    def __init__(self, value):
        self.value = value

    def __float__(self):
        return float(self.value)

    def __index__(self):
        if isinstance(self.value, float):
            raise TypeError
        return self.value


def test_numbers_of_other_libraries_are_stored_as_numbers(path):
    with RunWriter(path, run_info()) as writer:
        for number, loss in (
            (np.int64(3), np.float32(1.5)),
            (np.int32(4), np.float64(1.5)),
            (Tensor(5), Tensor(1.5)),
            (6.0, np.float16(1.5)),
            (True, np.int8(2)),
            (2**63 - 1, float("nan")),
        ):
            writer.step(StepRow(number, loss, np.float32(0.25)))
        row = measurement_row(np.int64(7))
        strange = (Statistic("energy", np.int64(0), np.float32(0.5)), Statistic("energy", 1, float("nan")))
        writer.measurement(type(row)(np.int64(7), "ranking", float("nan"), 0.5, 0.03, "RG?", statistics=strange))
        writer.event(event(np.int64(8), block=np.int64(1), text="a \ud800 half"))
    with contextlib.closing(sqlite3.connect(path)) as connection:
        found = connection.execute("SELECT step, loss, share FROM steps").fetchall()
        assert found == [
            (3, 1.5, 0.25), (4, 1.5, 0.25), (5, 1.5, 0.25), (6, 1.5, 0.25), (1, 2, 0.25), (2**63 - 1, None, 0.25),
        ]  # fmt: skip
        assert connection.execute("SELECT step, probe_loss FROM probes").fetchall() == [(7, float("inf"))]
        assert connection.execute("SELECT block, value FROM statistics").fetchall() == [(0, 0.5)]
        assert connection.execute("SELECT step, block, text FROM events").fetchall() == [(8, 1, "a ? half")]


@pytest.mark.parametrize("number", [2**63, -(2**63) - 1, 1.5, float("nan"), "7", None, np.arange(3), object()])
def test_a_step_that_is_no_whole_number_is_said_and_not_stored(number, path):
    with RunWriter(path, run_info()) as writer:
        with pytest.raises(StoreError, match="recorded"):
            writer.step(step(number))
        writer.step(step(1))
    assert steps_in(path) == [1]


def test_a_lock_file_that_is_removed_while_it_is_waited_for_locks_nobody_out_or_in(path):
    """Who ends removes the small file: whoever had it open by then must not take that for the lock."""
    for number in range(15):
        writer = RunWriter(path, run_info(str(number)))
        writer._open = False
        writer._keeper._stdin.close()  # its process ends when it likes, as after a kill
    with RunReader(path) as reader:
        assert [run.info.name for run in reader.runs()] == [str(number) for number in range(15)]


def test_what_another_lock_left_beside_is_no_hindrance(path):
    path.with_name("run.db-lock").write_bytes(b"")
    path.with_name("run.db-lock-journal").write_bytes(b"\xd9\xd5\x05\xf9 \xa1c\xd7" + b"\1" * 600)
    with RunWriter(path, run_info()) as writer:
        writer.step(step(0))
    assert steps_in(path) == [0]
