"""Ends a process that waits for another one which has failed, where waiting has no other way out.

Parts of a sharded model are gathered from all processes. One that fails in the middle of that (no memory for what is
gathered, say) tells the others where they next meet, which those that wait for its part never do. So it also leaves
word in the store that all processes share; a thread in each reads it, and ends a process that goes on waiting.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

_EVERY = 0.5  # seconds
_PATIENCE = 10.0  # seconds: gathering takes less as a rule, and whoever has failed will not come


class Watch:
    """Watches over one process while it gathers.

    Args:
        store: that of the processes, in which words are left.
        name: of this watch, the same in all processes and in no other watch.
        end: ends this process at once.
    """

    def __init__(self, store: Any, name: str, end: Callable[[int], Any] = os._exit) -> None:
        self._store, self._name, self._end = store, name, end
        self._round = 0
        self._since: float | None = None  # when this process began to gather what it now gathers
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """Begin another piece of work, of which no word has been left yet; all processes begin together."""
        self._round += 1
        self._since = None

    def failed(self, rank: int, reason: str) -> None:
        """Leave word that this process has failed."""
        self._since = None
        self._store.set(self._key, f"Process {rank} failed: {reason}")

    def since_now(self) -> None:
        """Be watched from now on: this process waits for all others."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        self._since = time.monotonic()

    def until_now(self) -> None:
        """Note that what was to be gathered is here."""
        self._since = None

    def close(self) -> None:
        """Watch no longer."""
        self._closed.set()

    @property
    def _key(self) -> str:
        return f"peelwise/failed/{self._name}/{self._round}"

    def _watch(self) -> None:
        known: tuple[str, float] | None = None  # of which round, and since when
        while not self._closed.wait(_EVERY):
            since, key = self._since, self._key
            if since is None or time.monotonic() - since < _EVERY or not self._store.check([key]):
                continue
            now = time.monotonic()
            known = known if known is not None and known[0] == key else (key, now)
            if now - max(known[1], since) < _PATIENCE or self._since != since:
                continue
            said = self._store.get(key).decode(errors="replace")
            print(f"error: {said}. This process waits for what it will not send, so it ends.", file=sys.stderr)
            sys.stderr.flush()
            self._end(1)
            return
