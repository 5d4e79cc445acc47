"""A real server of the page, and requests to it with any header, sent over a socket."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peelwise.show.dashboard.serve import Address, Server


@dataclass(frozen=True)
class Answer:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def content(self) -> Any:
        return json.loads(self.body)


class Asker:
    """Asks one server; headers given as pairs may occur twice."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.port = int(server.url.split(":")[2].split("/")[0])
        self.token = server.url.partition("token=")[2]

    def __call__(self, address: str, *headers: tuple[str, str], method: str = "GET", host: str | None = "") -> Answer:
        connection = self.connected(address, *headers, method=method, host=host)
        found = connection.getresponse()
        answer = Answer(found.status, found.headers, found.read())
        connection.close()
        return answer

    def connected(
        self, address: str, *headers: tuple[str, str], method: str = "GET", host: str | None = ""
    ) -> http.client.HTTPConnection:
        """Send a request; ``host=None`` leaves that header out."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        connection.putrequest(method, address, skip_host=True, skip_accept_encoding=True)
        if host is not None:
            connection.putheader("Host", host or f"127.0.0.1:{self.port}")
        for name, value in headers:
            connection.putheader(name, value)
        connection.endheaders()
        return connection

    def messages(self, places: str, count: int, *, last: str = "") -> list[tuple[str, str, Any]]:
        """Follow the stream until ``count`` messages came; return their ids, kinds and contents."""
        headers = (("Last-Event-ID", last),) if last else ()
        connection = self.connected(f"/api/stream?from={places}", *headers)
        stream = connection.getresponse()
        assert stream.status == 200, stream.read()
        found: list[tuple[str, str, Any]] = []
        fields: dict[str, str] = {}
        while len(found) < count:
            line = stream.readline().decode().rstrip("\n")
            if line:
                name, _, value = line.partition(": ")
                fields[name] = value
            elif "data" in fields:
                found.append((fields.get("id", ""), fields["event"], json.loads(fields["data"])))
                fields = {}
            else:
                fields = {}
        connection.close()
        return found


@contextmanager
def served(*histories: Path, **options: Any) -> Iterator[Asker]:
    """Serve histories on a free port."""
    server = Server(histories, Address(port=0, **options))
    thread = server.beside()
    try:
        yield Asker(server)
    finally:
        server.stop()
        thread.join(10)
        assert not thread.is_alive()
