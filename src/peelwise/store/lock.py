"""One writer at a time, however the last one ended."""

from __future__ import annotations

import sqlite3
from contextlib import suppress
from pathlib import Path

from peelwise.errors import StoreError
from peelwise.store.reader import RunReader
from peelwise.store.schema import reason


class WriterLock:
    """A lock that dies with its process, even one killed, and that forked workers do not inherit.

    It is an open exclusive transaction on a small file of its own: SQLite brings the locks of every platform.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._connection = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
        try:
            self._connection.execute("BEGIN EXCLUSIVE")
        except BaseException:
            self._connection.close()
            raise

    def close(self) -> None:
        """Let the next writer in."""
        # Removed while still held: who opens it after this gets a new file, and we no longer write.
        with suppress(OSError, sqlite3.ProgrammingError):
            if self._connection.in_transaction:
                self._path.unlink()
        self._connection.close()


def locked(path: Path) -> WriterLock:
    """Take the writer's lock of ``path``, or say who has it."""
    try:
        return WriterLock(path.with_name(f"{path.name}-lock"))
    except sqlite3.OperationalError as error:
        if "locked" in str(error):
            raise StoreError(
                f"{path} is being written by {_writer_of(path)}; it takes one writer at a time. "
                "Give this run a file of its own with store=."
            ) from error
        raise StoreError(f"{path} cannot be written: {reason(path, error)}.") from error


def _writer_of(path: Path) -> str:
    """Return who writes the file, as far as it says so."""
    with suppress(StoreError), RunReader(path) as reader:
        run = reader.latest()
        return f"process {run.pid} on {run.host} (run {run.id}, {run.info.name!r})"
    return "another process"
