"""Serve the page: choose an address, say where it is, and stop when told to."""

from __future__ import annotations

import ipaddress
import secrets
import socket
import tempfile
import threading
import webbrowser
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from peelwise.errors import MissingExtraError, OptionError
from peelwise.store.reader import RunReader

if TYPE_CHECKING:
    import uvicorn

PORT = 8717


@dataclass(frozen=True)
class Address:
    """Where the page is to be found.

    Attributes:
        host: name or address to listen at; anything but loopback asks for a token.
        port: ``None`` for the usual one, or any free one if that is taken; 0 for any free one.
        allowed_hosts: further names under which browsers may ask.
        token: whether to ask for a token on loopback too, where other users share the machine.
    """

    host: str = "127.0.0.1"
    port: int | None = None
    allowed_hosts: tuple[str, ...] = ()
    token: bool = False


class Server:
    """A server of the page that can run here or beside something else.

    Args:
        histories: files of run histories.
        address: where to listen.

    Raises:
        StoreError: If a file cannot be read.
        OptionError: If the address cannot be listened at.
        MissingExtraError: Without the extra ``dashboard``.

    Attributes:
        url: what to open; with the token, if one is asked for.
    """

    def __init__(self, histories: Sequence[Path], address: Address | None = None) -> None:
        try:
            import uvicorn

            from peelwise.show.dashboard.app import Dashboard, application
            from peelwise.show.dashboard.connections import BACKLOG, most_connections, protocol_of
            from peelwise.show.dashboard.guard import LOOPBACK, Access
        except ImportError as error:
            raise MissingExtraError("The live page", "dashboard") from error
        for path in histories:
            with RunReader(path):
                pass
        address = address or Address()
        self._socket = _listening(address.host, address.port)
        port = self._socket.getsockname()[1]
        near = is_loopback(address.host)
        token = secrets.token_urlsafe(24) if address.token or not near else None
        names = () if near else (address.host.lower(), socket.gethostname().lower(), socket.getfqdn().lower())
        access = Access(
            hosts=(*LOOPBACK, *names, *(name.lower() for name in address.allowed_hosts)),
            addresses=not near,
            token=token,
            cookie=f"peelwise-{port}",
        )
        app = application(Dashboard(histories, ending=lambda: self._server.should_exit), access)
        config = uvicorn.Config(
            app,
            http=protocol_of(most_connections()),
            backlog=BACKLOG,
            log_level="warning",
            access_log=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=2,
            server_header=False,
            proxy_headers=False,
        )
        self._server: uvicorn.Server = uvicorn.Server(config)
        self.url = f"http://{_shown(address.host)}:{port}/" + (f"?token={token}" if token else "")

    def run(self) -> None:
        """Serve until Ctrl-C or `stop`."""
        try:
            self._server.run(sockets=[self._socket])
        finally:
            self._socket.close()

    def beside(self) -> threading.Thread:
        """Serve in a thread of its own, so that something else can go on here; returns when it answers."""
        thread = threading.Thread(target=self.run, name="peelwise dashboard", daemon=True)
        thread.start()
        while thread.is_alive() and not self._server.started:
            thread.join(0.02)
        return thread

    def stop(self) -> None:
        """End serving; streams close by themselves."""
        self._server.should_exit = True


def serve(
    histories: Sequence[Path],
    address: Address,
    *,
    browser: bool,
    say: Callable[[str], None],
    open_browser: Callable[[str], object] = webbrowser.open,
) -> None:
    """Serve the page until Ctrl-C.

    Args:
        histories: files of run histories.
        address: where to listen.
        browser: whether to open one.
        say: prints a line.
        open_browser: opens an address; tests replace it.
    """
    server = Server(histories, address)
    with ExitStack() as stack:
        url = stack.enter_context(without_token(server.url)) if browser else server.url
        _announce(server, histories, address, say)
        if browser:
            # From a thread: some systems wait for the browser to end.
            threading.Thread(target=open_browser, args=(url,), daemon=True).start()
        server.run()


def _announce(server: Server, histories: Sequence[Path], address: Address, say: Callable[[str], None]) -> None:
    say(f"{', '.join(path.name for path in histories)} at {server.url}")
    if not is_loopback(address.host):
        say("Other machines can reach this. The token is for those you give it to; traffic is not encrypted.")
    say("Ctrl-C ends it.")


@contextmanager
def without_token(url: str) -> Iterator[str]:
    """Give an address that leads to ``url`` and may stand in the list of processes, which every user can read.

    Where ``url`` has a token, that is a file which only this user can read.
    """
    if "?token=" not in url:
        yield url
        return
    with tempfile.TemporaryDirectory(prefix="peelwise-") as folder:  # for this user alone, as mkdtemp has it
        page = Path(folder) / "open.html"
        page.touch(mode=0o600)
        page.write_text(
            f'<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="0; url={escape(url)}">'
            "<title>peelwise</title>",
            encoding="utf-8",
        )
        yield page.as_uri()


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens at ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _listening(host: str, port: int | None) -> socket.socket:
    """Return a socket that listens at the port, or at any free one if the usual port is taken."""
    if port is None:
        try:
            return _bound(host, PORT)
        except OSError:
            port = 0
    try:
        return _bound(host, port)
    except OSError as error:
        raise OptionError(
            f"{host}:{port} cannot be listened at: {error.strerror or error}. Choose another --port (0: any free one) "
            "or --host."
        ) from error


def _bound(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(place)
        bound.listen(128)
    except OSError:
        bound.close()
        raise
    return bound


def _shown(host: str) -> str:
    """Return the host as it stands in an address; a wildcard is no place to go to."""
    if host in ("0.0.0.0", "::"):
        return socket.gethostname()
    return f"[{host}]" if ":" in host else host
