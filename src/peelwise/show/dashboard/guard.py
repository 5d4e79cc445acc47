"""Who may ask what: everything that is checked before a request reaches the page.

* Host: a page on the internet can let its own name point to this machine (DNS rebinding); its name is then the host.
* Origin and Sec-Fetch-Site: no other site may read from here, embed this page, or follow its stream.
* Method: the page only reads.
* Token: wanted where other machines can reach the page. It is once in the address, then a cookie stands for it.
"""

from __future__ import annotations

import ipaddress
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders, QueryParams
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

PAGE = "/"
# Own files only, nothing inline, no other site, no frames; strings are never taken for markup.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Access:
    """Who is let in.

    Attributes:
        hosts: names under which the page may be asked for.
        addresses: whether any IP address will do as well: an address cannot be rebound as a name can.
        token: what a browser must show once, or ``None`` where only this machine can ask.
        session: what the cookie holds from then on; another secret, so that neither gives the other away.
        cookie: its name. Cookies do not tell ports apart, so the name does.
    """

    hosts: tuple[str, ...] = LOOPBACK
    addresses: bool = False
    token: str | None = None
    session: str = field(default_factory=lambda: secrets.token_urlsafe(32))
    cookie: str = "peelwise"


class Guard:
    """Refuses what may not be asked, and puts the headers on every answer.

    Args:
        app: what answers.
        access: who is let in.
    """

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        given = self._token_given(scope)

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                if given:
                    session = f"{self._access.cookie}={self._access.session}"
                    headers.append("Set-Cookie", f"{session}; Path=/; HttpOnly; SameSite=Strict")
            await send(message)

        refusal = self._refusal(scope, given)
        answer = self._app if refusal is None else PlainTextResponse(f"{refusal[1]}\n", refusal[0])
        await answer(scope, receive, with_headers)

    def _refusal(self, scope: Scope, given: bool) -> tuple[int, str] | None:
        """Return the status and reason with which a request is refused, or ``None``."""
        headers, access = Headers(scope=scope), self._access
        host = headers.get("host", "")
        if len(headers.getlist("host")) != 1 or not self._is_ours(host):
            return 421, "This server does not go by that name. --allow-host adds one."
        if scope["method"] not in ("GET", "HEAD"):
            return 405, "This server only reads."
        if any(_host_of(origin) != host for origin in headers.getlist("origin")):
            return 403, "Other sites may not ask here."
        site = headers.get("sec-fetch-site", "none")
        navigation = (
            scope["path"] == PAGE
            and headers.get("sec-fetch-mode") == "navigate"
            and headers.get("sec-fetch-dest") == "document"
        )
        if site not in ("same-origin", "none") and not navigation:
            return 403, "Other sites may not ask here."
        if access.token is not None and not given and not self._has_cookie(headers.getlist("cookie")):
            return 403, "Open the whole address that peelwise serve printed; its token is missing or wrong here."
        return None

    def _is_ours(self, host: str) -> bool:
        # The port is not looked at: it may be another one at the near end of a tunnel.
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name in self._access.hosts:
            return True
        return self._access.addresses and _is_address(name)

    def _token_given(self, scope: Scope) -> bool:
        token = self._access.token
        given = QueryParams(scope["query_string"]).get("token") if scope["path"] == PAGE else None
        return token is not None and given is not None and _same(given, token)

    def _has_cookie(self, lines: Iterable[str]) -> bool:
        # By hand: all pages of this machine share their cookies, and one that is malformed would hide ours.
        for cookie in ";".join(lines).split(";"):
            name, _, value = cookie.strip().partition("=")
            if name == self._access.cookie and _same(value, self._access.session):
                return True
        return False


def _host_of(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


def _same(one: str, other: str) -> bool:
    return secrets.compare_digest(one.encode(), other.encode())


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
