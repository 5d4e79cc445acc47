"""The page that says what to do names every letter and every event that there is."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from peelwise.evidence.events import Complaint
from peelwise.show.words import VERDICTS

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "tasks" / "what-now.md").read_text()


def kinds_in_source() -> Iterator[str]:
    """Yield the kinds that are written out where events and mistakes are made, or compared with."""
    for path in sorted((ROOT / "src" / "peelwise").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
                continue
            place = {"Event": 2, "Mistake": 0}.get(node.func.id)
            if place is not None and len(node.args) > place and isinstance(node.args[place], ast.Constant):
                yield node.args[place].value


def test_every_kind_of_event_has_a_row() -> None:
    kinds = {*kinds_in_source(), *Complaint.__args__, "worse-than-counting"}
    assert {"red", "leak", "rate-too-small", "not-recorded"} <= kinds  # the search finds those that there are
    assert not {kind for kind in kinds if f"`{kind}`" not in PAGE}


def test_every_letter_has_a_row() -> None:
    assert not {verdict.letter for verdict in VERDICTS.values() if f"| **{verdict.letter}**" not in PAGE}
