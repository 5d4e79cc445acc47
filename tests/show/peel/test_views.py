"""A peel on the terminal and as a page: nothing hidden, nothing foreign, nothing measured that was not."""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from rich.console import Console

pytest.importorskip("matplotlib", reason="the HTML report needs matplotlib")

from peelwise.records.peel import PeelRecord
from peelwise.show.peel.words import beats_head, stations
from peelwise.show.views import print_record, render_html
from show.audit.test_report import opened, text_of
from show.peel_sample import hostile_record, peel_record, unmeasured_record
from show.sample import HOSTILE, interval, whole

pytestmark = pytest.mark.slow

RECORDS = {
    "whole": peel_record(),
    "thirty blocks": peel_record(30),
    "unmeasured": unmeasured_record(),
    "hostile": hostile_record(),
}


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return {name: render_html(record) for name, record in RECORDS.items()}


def printed(record: PeelRecord, width: int = 110, *, encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    print_record(record, Console(file=stream, width=width, no_color=True, highlight=False), Path("out/mine"))
    stream.flush()
    return raw.getvalue().decode(encoding)


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.slow
def test_the_page_is_well_formed_and_has_nothing_foreign(name: str, pages: dict[str, str]) -> None:
    root = ET.fromstring(pages[name])
    assert len(pages[name].encode()) < 400_000
    tags = {element.tag for element in root.iter()}
    assert not tags & {"script", "iframe", "object", "embed", "img", "a", "base", "form"}
    assert "://" not in pages[name]
    found = [e.attrib["id"] for e in root.iter() if "id" in e.attrib]
    assert len(found) == len(set(found))
    assert render_html(RECORDS[name]) == pages[name]


def test_the_main_parts_are_there(pages: dict[str, str]) -> None:
    text = text_of(pages["whole"])
    for words in ("+0.1500", "1 2 5 5 5 6", "Informative", "better left out", "peelwise verify"):
        assert words in text, words
    assert text_of(pages["unmeasured"]).count("not measured within the budget") > 0


def test_hostile_strings_are_text(pages: dict[str, str]) -> None:
    assert "<script>" not in pages["hostile"]
    assert "alert('x')" in text_of(pages["hostile"])
    assert "\x1b" not in printed(RECORDS["hostile"])
    assert HOSTILE not in printed(RECORDS["hostile"])


@pytest.mark.parametrize("width", [80, 110, 160])
@pytest.mark.parametrize("name", RECORDS)
def test_the_terminal_fits_its_width(name: str, width: int) -> None:
    assert max(map(len, printed(RECORDS[name], width).splitlines())) <= width


def test_the_terminal_says_what_was_found_and_how_to_check_it() -> None:
    text = printed(RECORDS["whole"])
    lines = [line.strip() for line in text.splitlines()]
    rows = [line for line in lines if re.match(r"\d \d \d \d \d \d", line)]
    assert rows[0].startswith("1 2 5 5 5 6")
    assert "3.4200*" in rows[2]  # without a fitted head
    for words in ("* with the model's own head", "shuffled targets", "peelwise verify out/mine", "better left out"):
        assert words in text
    assert "not measured" in printed(RECORDS["unmeasured"])
    assert printed(RECORDS["whole"], encoding="ascii").isascii()


def test_a_gain_over_a_spoilt_head_alone_is_no_claim() -> None:
    record = peel_record()
    assert beats_head(record)
    spoilt = record.loss.model_copy(update={"bound_gain": interval(-0.01, 0.02)})
    assert not beats_head(record.model_copy(update={"loss": spoilt}))
    assert not beats_head(record.model_copy(update={"informative": False}))


def test_long_maps_are_written_as_runs() -> None:
    assert stations((1, 2, 3)) == "1 2 3"
    assert stations(tuple(range(1, 31))) == "1..30"
    assert stations((*range(1, 28), 30, 30, 30)) == "1..27 30×3"
    assert stations((5,) * 5 + (30,) * 25) == "5×5 30×25"
    assert stations(None) == "–"


def test_an_audit_is_still_shown_as_one() -> None:
    assert "peelwise audit" in render_html(whole(2))


@pytest.mark.parametrize("name", ["thirty blocks", "hostile"])
def test_a_browser_opens_it_without_complaint(name: str, pages: dict[str, str], tmp_path: Path, chromium: str) -> None:
    page = tmp_path / "report.html"
    page.write_text(pages[name], encoding="utf-8")
    dom, complaints = opened(page, tmp_path / "profile", chromium)
    assert complaints == []
    assert "<script" not in dom
