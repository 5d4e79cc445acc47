"""How many connections the server holds: who says nothing makes room for who asks.

Everybody who can reach the port can open connections, also without the token. Their number is bounded below what this
process may have open, and a new one takes the place of the oldest that waits, idles or does not read its answer; only
live streams, which the guard has let in and which are counted, keep theirs.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

STREAM = "/api/stream"
SECONDS_TO_ASK = 10.0  # from connecting to the end of the first request's head
MOST = 256
BACKLOG = 32  # how many are let in at once, before any of them is looked at
_OURS = 64  # files, histories and the rest of this process


def most_connections() -> int:
    """Return how many connections there may be at once."""
    try:
        import resource
    except ImportError:  # Windows, which has no such limit
        return MOST
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST if soft == resource.RLIM_INFINITY else max(8, min(MOST, soft - _OURS - BACKLOG))


def protocol_of(most: int) -> type[H11Protocol]:
    """Return the protocol of one server, whose connections know of each other."""
    present: dict[Bounded, None] = {}  # oldest first

    class Bounded(H11Protocol):
        """One connection."""

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            """Make room where there is none, and wait for a request for so long and no longer."""
            super().connection_made(transport)
            present[self] = None
            self._deadline = self.loop.call_later(SECONDS_TO_ASK, self._end_if_silent)
            if len(present) > most:
                quiet = next((each for each in present if not each._streams()), self)
                quiet._end()

        def connection_lost(self, exc: Exception | None) -> None:
            """Forget it."""
            self._deadline.cancel()
            present.pop(self, None)
            super().connection_lost(exc)

        def _streams(self) -> bool:
            cycle: Any = self.cycle
            going = cycle is not None and cycle.response_started and not cycle.response_complete
            return bool(going and self.scope["path"] == STREAM)

        def _end_if_silent(self) -> None:
            cycle: Any = self.cycle
            if cycle is None:
                self._end()

        def _end(self) -> None:
            present.pop(self, None)
            self.transport.abort()

    return Bounded
