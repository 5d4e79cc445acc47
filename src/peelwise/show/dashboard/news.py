"""What came since: the messages of the live stream, whole records only.

A message's id is the place in the history behind it: for every run the ids of the last step, probe and event that
were sent. A browser that lost its connection gives the last one back and goes on from there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from peelwise.records.plain_text import clean
from peelwise.records.run import WHOLE_MODEL
from peelwise.show.dashboard import queries
from peelwise.store.reader import Run, RunReader

# Who is farther behind than this is told to load the page's data again, which is thinned.
MOST_STEPS, MOST_PROBES = 5_000, 200
_PLACE = re.compile(r"(\d{1,4}\.\d{1,9})@(\d{1,18})\.(\d{1,18})\.(\d{1,18})")


@dataclass(frozen=True)
class Place:
    """How far one run of a history has been read: ids of rows."""

    run: str
    steps: int = 0
    probes: int = 0
    events: int = 0

    def __str__(self) -> str:
        return f"{self.run}@{self.steps}.{self.probes}.{self.events}"


@dataclass(frozen=True)
class Message:
    """One message: its kind, its content, and the place in the run behind it, if it is about a run's records."""

    kind: str
    content: dict[str, Any]
    behind: Place | None = None


def parse_places(text: str) -> list[Place] | None:
    """Return the places that a text names, such as ``0.1@120.4.2,1.1@7.1.0``, or ``None`` if it is malformed."""
    places = []
    for part in text.split(","):
        found = _PLACE.fullmatch(part)
        if found is None:
            return None
        run, *numbers = found.groups()
        places.append(Place(run, *map(int, numbers)))
    return places


def since(reader: RunReader, run: Run, place: Place) -> list[Message]:
    """Return what a run has got since ``place``, oldest first.

    A probe is one message with everything that was written with it: on screen it appears whole or not at all.
    """
    last = reader.newest_ids(run.id)
    if last[0] - place.steps > MOST_STEPS or last[1] - place.probes > MOST_PROBES:
        return [Message("reload", {"run": place.run})]
    messages = []
    steps = reader.steps(run.id, after=place.steps) if last[0] > place.steps else []
    if steps:
        place = replace(place, steps=steps[-1]["id"])
        messages.append(Message("steps", {"run": place.run, "rows": [queries.step(row) for row in steps]}, place))
    for row in reader.probes(run.id, after=place.probes) if last[1] > place.probes else ():
        place = replace(place, probes=row["id"])
        messages.append(Message("probe", {"run": place.run} | _whole(reader, run, row), place))
    events = reader.events(run.id, after=place.events, most=queries.EVENTS) if last[2] > place.events else []
    if events:
        place = replace(place, events=events[-1]["id"])
        messages.append(Message("events", {"run": place.run, "rows": [queries.event(row) for row in events]}, place))
    return messages


def encoded(messages: Sequence[Message], places: dict[str, Place]) -> Iterator[bytes]:
    """Yield messages as server-sent events, and keep ``places`` (run -> place) up with what was sent."""
    for message in messages:
        # JSON holds no line break, so the data is one line.
        lines = [f"event: {message.kind}", f"data: {json.dumps(message.content, allow_nan=False)}"]
        if message.behind is not None:
            places[message.behind.run] = message.behind
            lines.insert(0, f"id: {','.join(map(str, places.values()))}")
        yield ("\n".join(lines) + "\n\n").encode()


def _whole(reader: RunReader, run: Run, row: Any) -> dict[str, Any]:
    rest = reader.record(row["id"])
    at = {"step": row["step"]}
    bounds = {s["name"]: s["value"] for s in rest["statistics"] if s["block"] == WHOLE_MODEL}
    unit = queries.unit_of_run(run)
    return {
        "look": queries.look(row),
        "bounds": queries.cloud_edges(run, row["probe_loss"], bounds),
        "statistics": [[s["name"], *queries.statistic({**dict(s), **at})] for s in rest["statistics"]],
        "matrices": [[m["block"], clean(m["matrix"]), m["share"]] for m in rest["matrices"]],
        "verdicts": [queries.verdict({**dict(v), **at}, unit) for v in rest["verdicts"]],
    }
