"""The process that has a history open for writing, and the training's end of the pipe to it.

SQLite's write-ahead mode maps a small file into memory; where another program truncates that file, the operating system
ends the process that looks at it (SIGBUS). It is this one then, not the training, which hears that nobody answers.
No rollback journal instead: without the shared memory every step would wait for the disk (20 ms here, against 0.3).
"""

from __future__ import annotations

import os
import pickle
import select
import signal
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

from peelwise.errors import StoreError
from peelwise.store.lock import LockedError, WriterLock
from peelwise.store.schema import atomic, explained, opened_for_writing

Part = tuple[str, list[tuple[Any, ...]]]  # SQL and the rows it is executed with
LOCKED = "locked"

_START = "import sys; sys.path.insert(0, {root!r}); from peelwise.store.keeper import main; main()"
_PAGE = 4096
_COPIED = (96, 128)  # nBackfill and nBackfillAttempted in the shared memory (sqlite.org/walformat.html)
_SILENCE = 120.0  # seconds without an answer after which the keeper is given up


class Keeping(Protocol):
    """What a writer needs: one transaction at a time."""

    def write(self, parts: list[Part], seconds: float) -> int | None:
        """Write parts as one transaction; return the first new row's id, ``None`` if others held the file so long."""

    def close(self) -> None:
        """Close the file and let the next writer in."""


class Keeper:
    """Has the file open, and notices when others remove, replace or damage it.

    Args:
        path: the file, links followed.

    Raises:
        LockedError: If another writer has it.
        StoreError: If it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._wal = path, path.with_name(f"{path.name}-wal")
        self._run: int | None = None
        with explained(path):
            try:
                self._lock = WriterLock(path)
            except OSError as error:
                raise StoreError(f"{path} cannot be written: {error.strerror}.") from error
        try:
            with explained(path):
                self._connection = opened_for_writing(path)
        except BaseException:
            self._lock.close()
            raise
        self._shared = _opened(path.with_name(f"{path.name}-shm"))
        self._seen = self._state()

    def write(self, parts: list[Part], seconds: float) -> int | None:
        """Write parts as one transaction; return the first new row's id, ``None`` if others held the file so long.

        Raises:
            StoreError: If it cannot be written, is gone, or was damaged; nothing of it then is written.
        """
        first: int | None = None
        with explained(self._path):
            self._connection.execute(f"PRAGMA busy_timeout = {int(seconds * 1000)}")
            try:
                with atomic(self._connection):
                    self._check()
                    for sql, rows in parts:
                        if len(rows) == 1:
                            found = self._connection.execute(sql, rows[0]).lastrowid or 0
                            first = found if first is None else first
                        else:
                            self._connection.executemany(sql, rows)
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                    return None
                raise
            if self._run is None:
                (self._run,) = self._connection.execute("SELECT max(id) FROM runs").fetchone()
        self._seen = self._state()
        return first or 0

    def close(self) -> None:
        """Close the file and let the next writer in."""
        self._connection.close()
        if self._shared >= 0:
            os.close(self._shared)
        self._lock.close()

    def _state(self) -> _State:
        """Return what changes when somebody else writes."""
        (version,) = self._connection.execute("PRAGMA data_version").fetchone()
        begun = self._copied()
        head = os.pread(self._lock.file, _PAGE, 0) if hasattr(os, "pread") else b""
        return _State(version, _stamp(self._path), _stamp(self._wal), head, begun, self._copied())

    def _copied(self) -> tuple[bytes, ...]:
        """Return how much of the log was copied into the file, and was to be; an attempt is noted before it begins."""
        return tuple(os.pread(self._shared, 4, at) for at in _COPIED) if self._shared >= 0 else (b"", b"")

    def _check(self) -> None:
        """Refuse to go on with a file that is no longer the one that was opened, or no longer whole."""
        path, now, before = self._path, self._state(), self._seen
        own = os.fstat(self._lock.file)
        if now.file is None:
            raise StoreError(f"{path} is gone: it was removed or renamed while the run was recorded in it.")
        if now.file[:2] != (own.st_dev, own.st_ino):
            raise StoreError(f"{path} was replaced by another file while the run was recorded in it.")
        if now.version == before.version:  # no other program has written by way of SQLite
            if now.log != before.log:
                raise StoreError(f"{self._wal} was removed, truncated or overwritten while {path.name} was written.")
            if (now.file, now.head) == (before.file, before.head):
                return
            # Nor has one copied pages from the log, so the file is to be as it was but for its time. What the log
            # holds hides from SQLite what the file has become, until it writes all of that over it.
            untouched = before.begun == now.ended and len(set(now.ended)) == 1
            if now.file[2] < before.file[2] or (untouched and now.file[2] > before.file[2]):
                raise StoreError(f"{path} was damaged by another program while it was written: its size was changed.")
            if untouched and now.head != before.head:
                raise StoreError(f"{path} was damaged by another program while it was written: it was overwritten.")
        elif self._run is not None:
            row = self._connection.execute("SELECT status FROM runs WHERE id = ?", (self._run,)).fetchone()
            if row is None or row[0] != "running":
                raise StoreError(f"{path} was taken by another writer, which ended or removed run {self._run}.")
        # Another connection does not see this one's memory, only what is in the file.
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as other:
            (verdict,) = other.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise StoreError(f"{path} was damaged by another program while it was written: {verdict}.")


class _State(NamedTuple):
    """What changes when somebody else writes."""

    version: int  # SQLite's own mark of other connections' commits
    file: Any  # device, inode, size and time, `None` if there is none
    log: Any
    head: bytes  # the file's first page, as it is on the disk
    begun: tuple[bytes, ...]  # how much of the log was copied before that was read,
    ended: tuple[bytes, ...]  # and after


def _opened(path: Path) -> int:
    """Return a descriptor for reading, -1 if there is no such file.

    It stays open as long as SQLite's own: closing any descriptor of a file gives up all the process's locks on it.
    """
    try:
        return os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except OSError:
        return -1


def _stamp(path: Path) -> tuple[int, int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


class Remote:
    """A keeper in a process of its own.

    Args:
        path: the file, links followed.

    Raises:
        LockedError: If another writer has it.
        StoreError: If it cannot be written, or the process cannot be started.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._talk = threading.Lock()
        self._asked = 0
        self._heard = b""
        root = str(Path(__file__).parents[2])
        try:
            # A session of its own: Ctrl-C at the terminal is for the training, which then ends the run as it likes.
            self._process = subprocess.Popen(
                # Isolated: nothing that lies in the working folder is imported.
                [sys.executable, "-I", "-S", "-c", _START.format(root=root)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                start_new_session=True,
            )
        except OSError as error:
            raise StoreError(f"{path} cannot be written: no process can be started for it ({error}).") from error
        try:
            self._ask("open", str(path))
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self._process.pid

    def write(self, parts: list[Part], seconds: float) -> int | None:
        """Write parts as one transaction; return the first new row's id, ``None`` if others held the file so long."""
        found: int | None = self._ask("write", parts, seconds)
        return found

    def close(self) -> None:
        """End the process, which closes the file."""
        with suppress(OSError):
            self._stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._stdout.close()

    @property
    def _stdin(self) -> BinaryIO:
        assert self._process.stdin is not None
        return self._process.stdin  # type: ignore[return-value]

    @property
    def _stdout(self) -> BinaryIO:
        assert self._process.stdout is not None
        return self._process.stdout  # type: ignore[return-value]

    def _ask(self, *request: Any) -> Any:
        with self._talk:
            self._asked += 1
            try:
                _send(self._stdin.fileno(), (self._asked, request))
                number, kind, content = self._answer()
                while number != self._asked:  # of a question whose asker was interrupted
                    number, kind, content = self._answer()
            except (OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
                self._process.kill()
                code = self._process.wait()
                how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
                raise StoreError(
                    f"{self._path} cannot be written: the process that writes it has ended ({how}, {error})."
                ) from error
        if kind == LOCKED:
            raise LockedError
        if kind == "error":
            raise StoreError(content)
        return content

    def _answer(self) -> Any:
        while len(self._heard) < 8 or len(self._heard) < 8 + int.from_bytes(self._heard[:8], "little"):
            if os.name == "posix" and not select.select([self._stdout], [], [], _SILENCE)[0]:
                raise EOFError(f"no answer for {_SILENCE:.0f} s")
            some = os.read(self._stdout.fileno(), 2**16)
            if not some:
                raise EOFError("no answer")
            self._heard += some
        size = 8 + int.from_bytes(self._heard[:8], "little")
        answer, self._heard = self._heard[8:size], self._heard[size:]
        return pickle.loads(answer)


def _send(file: int, content: Any) -> None:
    text = pickle.dumps(content)
    left = memoryview(len(text).to_bytes(8, "little") + text)
    while left:
        left = left[os.write(file, left) :]


def _requests() -> Any:
    """Yield what the parent asks until it has ended; forked copies of it may hold the pipe open for longer."""
    parent, heard = os.getppid(), b""
    while True:
        while len(heard) >= 8 and len(heard) >= 8 + (size := int.from_bytes(heard[:8], "little")):
            request, heard = heard[8 : 8 + size], heard[8 + size :]
            yield pickle.loads(request)
        if os.name == "posix":
            while not select.select([0], [], [], 0.5)[0]:
                if os.getppid() != parent:
                    return
        some = os.read(0, 2**16)
        if not some:
            return
        heard += some


def main() -> None:
    """Keep the file that the parent names, write what it sends, and end when it has ended."""
    for each in ("SIGTERM", "SIGHUP", "SIGINT"):  # the training is asked to end, and may have something left to write
        if hasattr(signal, each):
            signal.signal(getattr(signal, each), signal.SIG_IGN)
    keeper: Keeper | None = None
    try:
        for number, (kind, *content) in _requests():
            answer: tuple[Any, ...]
            try:
                if keeper is None:
                    keeper = Keeper(Path(content[0]))
                    answer = (number, "done", None)
                else:
                    answer = (number, "done", getattr(keeper, kind)(*content))
            except LockedError:
                answer = (number, LOCKED, None)
            except StoreError as error:
                answer = (number, "error", str(error))
            except Exception as error:  # whatever it is, the training must hear of it
                answer = (number, "error", f"The run history cannot be written: {type(error).__name__}: {error}.")
            _send(1, answer)
    except OSError:  # the parent has ended before it heard the answer
        pass
    finally:
        if keeper is not None:
            keeper.close()


def keeper_of(path: Path) -> Keeping:
    """Return who keeps a file: a process of its own, or this one where Python cannot be started again."""
    return Keeper(path) if getattr(sys, "frozen", False) or not sys.executable else Remote(path)
