"""One writer at a time, however the last one ended and by whatever name the file was given."""

from __future__ import annotations

import os
import sqlite3
import struct
import time
from contextlib import closing, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# Far behind any content, and behind the bytes that SQLite locks itself.
_BYTE = 2**60
_PATIENCE = 1.0  # a writer that was just killed needs a moment to end


class LockedError(Exception):
    """Another writer has the file."""


class WriterLock:
    """A lock that dies with its process, even one killed.

    It is twofold. An open exclusive transaction on a small file beside the history: SQLite brings the locks of every
    platform. And, on Linux, a lock on the history's own inode: it holds for any other name of the file (a link) and
    where the small file was removed. Both belong to the process that keeps the file, which never forks.

    Args:
        path: the history, links followed; made, empty, if there is none.

    Raises:
        LockedError: If another writer has it.
        sqlite3.Error: If the small file cannot be made.
        OSError: If the history cannot be opened for writing.
    """

    def __init__(self, path: Path) -> None:
        self._path = path.with_name(f"{path.name}-lock")
        self.file = -1
        self._connection = self._transaction()
        try:
            self.file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
            self._lock_inode()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let the next writer in; SQLite must have closed the history before."""
        if self.file >= 0:
            os.close(self.file)
            self.file = -1
        # Removed while still held: who opens it after this gets a new file, and we no longer write.
        with suppress(OSError, sqlite3.ProgrammingError):
            if self._connection.in_transaction:
                self._path.unlink()
        self._connection.close()

    def _transaction(self) -> sqlite3.Connection:
        """Return a connection with an exclusive transaction on the file that has the name now.

        Who ends removes it: one that was opened just before may be locked by us and seen by nobody.
        """
        until = time.monotonic() + _PATIENCE
        while True:
            connection = sqlite3.connect(self._path, timeout=0, isolation_level=None)
            try:
                connection.execute("PRAGMA journal_mode = OFF")  # nothing is written, and its name would be shared
                connection.execute("BEGIN EXCLUSIVE")
                if self._is_locked():
                    return connection
            except sqlite3.OperationalError as error:
                connection.close()
                if "unable to open" in str(error):
                    raise
                if time.monotonic() > until:
                    if "locked" in str(error):
                        raise LockedError from error
                    raise
            except BaseException:
                connection.close()
                raise
            connection.close()
            time.sleep(0.02)

    def _is_locked(self) -> bool:
        with closing(sqlite3.connect(self._path, timeout=0, isolation_level=None)) as other:
            try:
                other.execute("BEGIN EXCLUSIVE")
            except sqlite3.OperationalError as error:
                return "locked" in str(error)
        return False

    def _lock_inode(self) -> None:
        if fcntl is None or not hasattr(fcntl, "F_OFD_SETLK"):
            return
        # struct flock. Other descriptors of the same file may be closed without losing this kind of lock.
        whole = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, _BYTE, 1, 0)
        until = time.monotonic() + _PATIENCE
        while True:
            try:
                fcntl.fcntl(self.file, fcntl.F_OFD_SETLK, whole)
            except (BlockingIOError, PermissionError) as error:
                if time.monotonic() > until:
                    raise LockedError from error
                time.sleep(0.02)
            except OSError:
                return  # a file system without such locks: the small file has to do
            else:
                return
