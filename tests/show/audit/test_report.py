from __future__ import annotations

import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="the HTML report needs matplotlib")

from peelwise.errors import MissingExtraError
from peelwise.show.audit.report import render_html
from peelwise.show.audit.words import conclusion
from peelwise.show.words import note_words
from show.sample import HOSTILE, hostile, partial, unmeasured, whole

pytestmark = pytest.mark.slow

RECORDS = {
    "whole": whole(),
    "low-bit": whole(12, low_bit=True),
    "two blocks": whole(2),
    "eighty blocks": whole(80),
    "partial": partial(),
    "unmeasured": unmeasured(),
    "hostile": hostile(),
}


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return {name: render_html(record) for name, record in RECORDS.items()}


def text_of(page: str) -> str:
    """What a reader sees: the text of all elements except the style sheet."""
    body = ET.fromstring(page).find("body")
    assert body is not None
    return " ".join(body.itertext())


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.slow
def test_well_formed_small_and_without_foreign_references(name: str, pages: dict[str, str]) -> None:
    page = pages[name]
    root = ET.fromstring(page)
    assert len(page.encode()) < 400_000
    assert "default-src 'none'" in page
    tags = {element.tag for element in root.iter()}
    assert not tags & {"script", "iframe", "object", "embed", "img", "a", "base", "form"}
    links = [v for e in root.iter() for k, v in e.attrib.items() if k in ("href", "src")]
    assert all(link == "data:," or link.startswith("#") for link in links)
    assert "url(" not in re.sub(r"url\(#\w+\)", "", page)
    assert "@import" not in page
    assert "://" not in page


@pytest.mark.parametrize("name", RECORDS)
def test_ids_are_unique_and_every_block_is_there(name: str, pages: dict[str, str]) -> None:
    root = ET.fromstring(pages[name])
    ids = [element.attrib["id"] for element in root.iter() if "id" in element.attrib]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'(?:href="|url\()#([\w-]+)', pages[name]))
    assert used <= set(ids)
    cells = [element for element in root.iter("li") if "data-block" in element.attrib]
    assert [cell.attrib["data-block"] for cell in cells] == [str(b.index) for b in RECORDS[name].blocks]
    assert all(cell.attrib["aria-label"] and "".join(cell.itertext())[0] in "RYG?" for cell in cells)


@pytest.mark.slow
def test_the_same_record_gives_the_same_page(pages: dict[str, str]) -> None:
    assert render_html(whole()) == pages["whole"]


def test_hostile_strings_are_text(pages: dict[str, str]) -> None:
    page = pages["hostile"]
    assert "<script" not in page
    assert "\x1b" not in page
    assert "\u202e" not in page
    assert HOSTILE.split("\x1b")[0].strip() in text_of(page)


@pytest.mark.parametrize("name", ["partial", "unmeasured"])
def test_what_was_not_measured_is_said_and_never_zero(name: str, pages: dict[str, str]) -> None:
    text = text_of(pages[name])
    assert "not measured within the budget" in text
    assert "Stopped early" in text
    assert not re.search(r"\bNone\b(?! found)", text)
    assert not re.search(r"[+-]0\.0000", text)


def test_uninformative_and_foreign_text_are_said() -> None:
    record = whole(4)
    probe = record.probe.model_copy(update={"in_distribution": False})
    text = text_of(render_html(record.model_copy(update={"informative": False, "probe": probe})))
    assert "Uninformative" in text
    assert "Verdicts follow the marginal gain" in text


def test_the_main_parts_are_there(pages: dict[str, str]) -> None:
    text = text_of(pages["whole"])
    record = RECORDS["whole"]
    for part in (
        conclusion(record),
        "+0.1308",
        "[+0.1247, +0.1369]",
        "Informative",
        "peelwise verify DIR",
        record.model.fingerprint,
        record.probe.fingerprint,
        "interaction with neighbours",
        "never “optimal”",
        "leaving each block out",
        "relaxed",
        note_words(record.notes[0]),
    ):
        assert part in text
    assert pages["whole"].count("<svg") == 5
    assert pages["low-bit"].count("<svg") == 6


def test_charts_take_their_colours_from_the_page(pages: dict[str, str]) -> None:
    drawings = "".join(re.findall(r"<svg.*?</svg>", pages["whole"], flags=re.DOTALL))
    assert "var(--red)" in drawings
    assert not re.search(r"#[0-9a-f]{6}(?![0-9a-f])[;\"]", drawings)


def test_missing_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"peelwise\[plots\]"):
        render_html(whole(2))


def test_settings_of_the_user_do_not_change_the_page(pages: dict[str, str]) -> None:
    import matplotlib

    with matplotlib.rc_context({"axes.facecolor": "yellow", "font.size": 30, "lines.linewidth": 9}):
        assert render_html(RECORDS["two blocks"]) == pages["two blocks"]


@pytest.mark.parametrize("name", ["whole", "partial", "hostile"])
def test_a_browser_opens_it_without_complaint(name: str, pages: dict[str, str], tmp_path: Path, chromium: str) -> None:
    page = tmp_path / "report.html"
    page.write_text(pages[name], encoding="utf-8")
    dom, complaints = opened(page, tmp_path / "profile", chromium)
    assert complaints == []
    assert re.findall(r'data-block="(\d+)"', dom) == [str(block.index) for block in RECORDS[name].blocks]
    assert "<script" not in dom


def test_the_browser_check_notices_a_broken_page(tmp_path: Path, chromium: str) -> None:
    page = tmp_path / "report.html"
    broken = render_html(whole(2)).replace("<main>", '<main><script>1</script><img src="http://127.0.0.1:9/x.png"/>')
    page.write_text(broken, encoding="utf-8")
    _, complaints = opened(page, tmp_path / "profile", chromium)
    assert any("Content Security Policy" in line for line in complaints)


def opened(page: Path, profile: Path, chromium: str) -> tuple[str, list[str]]:
    """Open the page and return its DOM and what the console said; a blocked request is said there too."""
    command = [
        chromium,
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"),
        # The browser's own calls home stay on this machine too.
        "--host-resolver-rules=MAP * ~NOTFOUND",
        *(f"--user-data-dir={profile}", "--enable-logging=stderr", "--v=0", "--dump-dom", page.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
