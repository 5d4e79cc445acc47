"""The files behind the page, looked at once for all who have it open, and read again only where they changed."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from peelwise.errors import StoreError
from peelwise.records.plain_text import clean
from peelwise.show.dashboard import queries
from peelwise.store.reader import RunReader
from peelwise.store.schema import sound

_COARSE = 2.0  # seconds within which two changes may bear the same time
_AGAIN = 5.0  # seconds after which a file that could not be read is tried again
_MOST_KEPT = 256

Signature = tuple[tuple[int, int, int] | None, ...]


class Histories:
    """Knows of each file whether it has changed since it was last looked at.

    Args:
        paths: the files.
        seconds: between two looks.
    """

    def __init__(self, paths: Sequence[Path], seconds: float) -> None:
        self.paths = tuple(paths)
        self._seconds = seconds
        self._lock = threading.RLock()
        self._looked = float("-inf")
        self._marks = [0] * len(self.paths)
        self._signatures: list[Signature | None] = [None] * len(self.paths)
        self._entries: list[tuple[int, dict[str, Any]] | None] = [None] * len(self.paths)
        self._failed = [0.0] * len(self.paths)
        self._kept: dict[tuple[Any, int], Any] = {}

    def marks(self, *, at_once: bool = False) -> tuple[int, ...]:
        """Return a number for each file that is another one whenever it may hold something new.

        Args:
            at_once: look now, for somebody who just came, however short ago the last look was.
        """
        with self._lock:
            now = time.monotonic()
            if at_once or now - self._looked >= 0.8 * self._seconds:
                self._looked = now
                for number, path in enumerate(self.paths):
                    self._look(number, path, now)
            return tuple(self._marks)

    def listing(self) -> dict[str, Any]:
        """Return all runs of all files; what is wrong with a file stands beside its name."""
        with self._lock:
            marks = self.marks()
            found = []
            for number, mark in enumerate(marks):
                known = self._entries[number]
                if known is None or known[0] != mark:
                    known = self._entries[number] = (mark, self._read(number))
                found.append(known[1])
            return {"files": found}

    def shared(self, number: int, question: Any, ask: Callable[[], Any]) -> Any:
        """Return the answer to a question about a file, asked once for all while it does not change."""
        key = (question, self._marks[number])
        if key in self._kept:
            return self._kept[key]
        answer = ask()
        with self._lock:
            if len(self._kept) >= _MOST_KEPT:
                self._kept.clear()
            self._kept[key] = answer
        return answer

    def _look(self, number: int, path: Path, now: float) -> None:
        signature = tuple(_stamp(each) for each in (path, path.with_name(f"{path.name}-wal")))
        fresh = any(each is not None and abs(time.time() - each[2] / 1e9) < _COARSE for each in signature)
        again = self._failed[number] and now - self._failed[number] > _AGAIN
        if signature != self._signatures[number] or fresh or again:
            self._signatures[number] = signature
            self._marks[number] += 1

    def _read(self, number: int) -> dict[str, Any]:
        path = self.paths[number]
        entry: dict[str, Any] = {"name": clean(path.name), "error": None, "runs": []}
        self._failed[number] = 0.0
        try:
            with RunReader(path) as reader, sound(path):
                entry["runs"] = [queries.run_facts(run, f"{number}.{run.id}", path.name) for run in reader.runs()]
        except StoreError as error:
            entry["error"] = clean(str(error))
            self._failed[number] = time.monotonic()
        return entry


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
