"""The addresses of the page and what answers at each. No part of an address ever becomes a path."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from functools import cache, partial
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import anyio
from anyio.to_thread import run_sync
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from peelwise.errors import StoreError
from peelwise.records.plain_text import clean
from peelwise.records.run import WHOLE_MODEL
from peelwise.show.dashboard import news, queries
from peelwise.show.dashboard.connections import STREAM
from peelwise.show.dashboard.guard import PAGE, Access, Guard
from peelwise.show.dashboard.watched import Histories
from peelwise.show.html.page import style_sheet
from peelwise.store.reader import ALL_STEPS, Between, Run, RunReader
from peelwise.store.schema import sound

MOST_STREAMS = 32
_RUN = re.compile(r"(\d{1,4})\.(\d{1,9})")
_KINDS = {".js": "text/javascript", ".css": "text/css", ".html": "text/html", ".svg": "image/svg+xml"}


class Dashboard:
    """Answers for the histories it was given at the start, and for no other file.

    Args:
        histories: files of run histories; an address names them by their place in this list.
        seconds: between two readings.
        ending: whether the server is about to stop: streams then end by themselves.
    """

    def __init__(
        self, histories: Sequence[Path], *, seconds: float = 0.5, ending: Callable[[], bool] = lambda: False
    ) -> None:
        self._files = Histories(histories, seconds)
        self._facts = {"words": queries.verdict_words(), "version": version("peelwise")}
        self._seconds, self._ending = seconds, ending
        self._streams = 0

    def routes(self) -> list[Route]:
        """Return the addresses."""
        return [
            Route(PAGE, self.page),
            Route("/static/{name}", self.static),
            Route("/api/runs", self.runs),
            Route("/api/overview", self.overview),
            Route("/api/heat", self.heat),
            Route("/api/block", self.block),
            Route(STREAM, self.stream),
        ]

    def page(self, request: Request) -> Response:
        """Answer with the page; everything on it comes by the other addresses."""
        return _file("index.html")

    def static(self, request: Request) -> Response:
        """Answer with one of the page's own files, which are all known beforehand."""
        return _file(request.path_params["name"])

    def runs(self, request: Request) -> Response:
        """Answer with all runs of all files."""
        self._files.marks(at_once=True)
        return JSONResponse(self._files.listing() | self._facts)

    def overview(self, request: Request) -> Response:
        """Answer with one run."""
        return self._of_run(request, partial(queries.overview, between=_between(request)))

    def heat(self, request: Request) -> Response:
        """Answer with one statistic of all blocks against its median."""
        name = request.query_params.get("statistic", "")
        return self._of_run(request, partial(queries.heat, name=name, between=_between(request)))

    def block(self, request: Request) -> Response:
        """Answer with one block's history."""
        whole = request.query_params.get("block") == "model"
        index = WHOLE_MODEL if whole else _number(request, "block")
        return self._of_run(request, partial(queries.block, index=index, between=_between(request)))

    async def stream(self, request: Request) -> Response:
        """Answer with news as they come, from the places given, or from where the browser says it was."""
        text = request.headers.get("last-event-id") or request.query_params.get("from", "")
        places = news.parse_places(text)
        if not places or len(places) > len(self._files.paths) * 8 + 8:
            raise HTTPException(400, "from= takes places in runs, such as 0.1@120.4.2.")
        if self._streams >= MOST_STREAMS:
            raise HTTPException(503, "Too many pages are open.")
        self._streams += 1  # before anything is waited for, or a burst would find room for all
        try:
            await run_sync(self._check, places)
        except BaseException:
            self._streams -= 1
            raise
        return _Stream(self._news(places), media_type="text/event-stream", ended=self._stream_ended)

    def _stream_ended(self) -> None:
        self._streams -= 1

    async def _news(self, found: list[news.Place]) -> AsyncIterator[bytes]:
        places = {place.run: place for place in found}
        known: Any = None
        seen: tuple[int, ...] = ()
        quiet = 0.0
        yield b"retry: 1000\n\n"
        while not self._ending():
            marks = await run_sync(partial(self._files.marks, at_once=not seen))
            messages: list[news.Message] = []
            if marks != seen:
                known, messages = await run_sync(self._since, tuple(places.values()), known)
                seen = marks
            for chunk in news.encoded(messages, places):
                yield chunk
            quiet = 0.0 if messages else quiet + self._seconds
            if quiet > 15:  # whoever forwards this may close a silent connection
                yield b": still here\n\n"
                quiet = 0.0
            await anyio.sleep(self._seconds)

    def _since(self, places: Sequence[news.Place], known: Any) -> tuple[Any, list[news.Message]]:
        """Return the list of all runs, and what there is to tell: records, and that list where it changed."""
        messages: list[news.Message] = []
        for place in places:
            # What is wrong with a file that can no longer be read, the list of runs says.
            with suppress(StoreError, HTTPException):
                number = int(place.run.split(".")[0])
                messages += self._files.shared(number, place, partial(self._news_of, place))
        present = self._files.listing()
        if present != known:
            messages.append(news.Message("runs", present))
        return present, messages

    def _news_of(self, place: news.Place) -> list[news.Message]:
        with self._opened(place.run) as (reader, run), sound(reader.path):
            return news.since(reader, run, place)

    def _check(self, places: list[news.Place]) -> None:
        for place in places:
            with self._opened(place.run):
                pass

    def _of_run(self, request: Request, ask: Callable[[RunReader, Run], queries.Json]) -> Response:
        try:
            with self._opened(request.query_params.get("run", "")) as (reader, run), sound(reader.path):
                return JSONResponse(ask(reader, run))
        except StoreError as error:
            raise HTTPException(500, clean(str(error))) from error

    def _opened(self, key: str) -> _Opened:
        found = _RUN.fullmatch(key)
        if found is None or int(found[1]) >= len(self._files.paths):
            raise HTTPException(404, "No such run. /api/runs lists them.")
        return _Opened(self._files.paths[int(found[1])], int(found[2]))


class _Stream(StreamingResponse):
    """An answer that tells when it has ended, also where its content was never asked for."""

    def __init__(self, content: AsyncIterator[bytes], *, media_type: str, ended: Callable[[], None]) -> None:
        super().__init__(content, media_type=media_type)
        self._ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ended()


class _Opened:
    """A history open for reading, and one of its runs."""

    def __init__(self, path: Path, run_id: int) -> None:
        self._path, self._run_id = path, run_id

    def __enter__(self) -> tuple[RunReader, Run]:
        try:
            self._reader = RunReader(self._path)
        except StoreError as error:
            raise HTTPException(404, str(error)) from error
        try:
            return self._reader, self._reader.run(self._run_id)
        except StoreError as error:
            self._reader.close()
            raise HTTPException(404, str(error)) from error

    def __exit__(self, *_: object) -> None:
        self._reader.close()


def application(dashboard: Dashboard, access: Access) -> Guard:
    """Return the whole application: nothing is answered that the guard has not let through."""
    # Streams are left alone by the compression, which would hold them back.
    small = Middleware(GZipMiddleware, minimum_size=2_000, compresslevel=3)
    return Guard(Starlette(routes=dashboard.routes(), middleware=[small]), access)


@cache
def static_files() -> dict[str, bytes]:
    """Return the page's own files by name, read once."""
    folder = files("peelwise.show.dashboard").joinpath("static")
    found = {file.name: file.read_bytes() for file in folder.iterdir() if Path(file.name).suffix in _KINDS}
    found["style.css"] = style_sheet().encode() + found["dashboard.css"]
    return found


def _file(name: str) -> Response:
    found = static_files().get(name)
    if found is None:
        raise HTTPException(404, "No such file.")
    return Response(found, media_type=_KINDS[Path(name).suffix])


def _between(request: Request) -> Between:
    if "first" not in request.query_params and "last" not in request.query_params:
        return ALL_STEPS
    return _number(request, "first"), _number(request, "last")


def _number(request: Request, name: str) -> int:
    text = request.query_params.get(name, "")
    if re.fullmatch(r"\d{1,15}", text) is None:
        raise HTTPException(400, f"{name}= takes a whole number.")
    return int(text)
