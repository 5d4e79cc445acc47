"""A check on the terminal, as a page and in a notebook: legible from 4 to 126 blocks, and safe with hostile names."""

from __future__ import annotations

import io
import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from rich.console import Console

from peelwise.records.check import CheckRecord
from peelwise.records.plain_text import clean
from peelwise.show.check import charts
from peelwise.show.check.report import render_html
from peelwise.show.check.terminal import print_record
from peelwise.show.check.words import UNLIKE, conclusion
from peelwise.show.notebook import record_html
from peelwise.show.views import conclusion as conclusion_of_any
from peelwise.show.views import render_html as page_of_any
from show.audit.test_report import opened, text_of
from show.check_sample import NAMED, checked, hostile_check
from show.sample import HOSTILE
from show.test_notebook import tree

RECORDS = {
    "few": checked(4, named=()),
    "nothing": checked(30, named=()),
    "whole": checked(30),
    "several": checked(30, named=(15, 3, 4, 29)),
    "deep": checked(126, named=(0, 15, 125)),
    "weights": checked(30, text=False),
    "hostile": hostile_check(),
}
EACH = pytest.mark.parametrize("name", RECORDS)


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return {name: render_html(record) for name, record in RECORDS.items()}


def printed(record: CheckRecord, width: int, *, encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    print_record(record, Console(file=stream, width=width, color_system=None), folder="out/check")
    stream.flush()
    return raw.getvalue().decode(encoding)


# -- terminal ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [60, 80, 120])
@EACH
def test_it_fits_the_width(name: str, width: int) -> None:
    text = printed(RECORDS[name], width)
    assert max(map(len, text.splitlines())) <= width
    assert "\x1b" not in text
    assert "\u202e" not in text


@pytest.mark.parametrize(("width", "lines"), [(120, 2), (80, 2), (140, 1)])
def test_the_strip_has_a_bar_for_each_block_and_marks_the_named(width: int, lines: int) -> None:
    text = printed(RECORDS["deep"], width).splitlines()
    bars = [line for line in text if re.fullmatch(r" {4}[▁-█]+", line)]
    assert sum(len(line.strip()) for line in bars) == 126
    assert len(bars) == lines
    marks = [(text[place + 1], len(bar)) for place, bar in enumerate(text) if bar in bars]
    assert sum(line.count("▲") for line, _ in marks) == 3
    assert marks[0][0][4] == "▲"  # below block 0
    assert marks[0][0][4 + NAMED] == "▲"
    high = bars[0][4 + NAMED]
    assert high == "█"
    assert all(bar < high for bar in bars[0][5 : 4 + NAMED])


def test_few_blocks_are_numbered_with_their_scores() -> None:
    text = printed(RECORDS["whole"], 120)
    assert re.search(r"^ +0 +1 +2 .* 29 *$", text, re.MULTILINE)
    assert re.search(r"^ ?1\.5 +1\.5 .* 12 ", text, re.MULTILINE)
    assert "▲" in text
    assert "▲" not in printed(RECORDS["nothing"], 120)


def test_the_table_has_signals_factors_and_what_they_gain() -> None:
    text = printed(RECORDS["whole"], 120)
    row = next(line for line in text.splitlines() if line.startswith(f"   {NAMED}") and "weight RMS" in line)
    assert row.split() == ["15", "12", "weight", "RMS", "mlp.down_proj", "0.0021", "0.07", "41.0", "-0.2100"]
    assert "+1.300 [1.100, 1.500]" in text
    assert "Of 1 more factor the gain may be nothing" in text
    assert "out/check" in text
    assert "lowers the loss" in text


def test_few_blocks_show_their_raw_signals() -> None:
    text = printed(RECORDS["few"], 100)
    assert "block 3" in text
    assert "linear CKA" in text
    assert "mlp.down_proj" not in text  # of matrices there are too many


def test_without_text_there_is_no_column_for_ablation() -> None:
    text = printed(RECORDS["weights"], 120)
    assert "ablation\n" not in text
    assert "nats/token" not in text
    assert "weights alone" in text


def test_a_terminal_without_unicode_keeps_the_columns() -> None:
    plain, rich = (printed(RECORDS["deep"], 100, encoding=name).splitlines() for name in ("ascii", "utf-8"))
    assert [len(line) for line in plain] == [len(line) for line in rich]
    assert not any("?" in line for line in plain if set(line.strip()) <= set(".oO#?"))


# -- page --------------------------------------------------------------------------------------------------------


@EACH
def test_the_page_is_well_formed_small_and_self_contained(name: str, pages: dict[str, str]) -> None:
    page = pages[name]
    root = ET.fromstring(page)
    assert len(page.encode()) < 1_500_000
    assert "default-src 'none'" in page
    tags = {element.tag for element in root.iter()}
    assert not tags & {"script", "iframe", "object", "embed", "img", "a", "base", "form"}
    assert "://" not in page
    assert "url(" not in page
    ids = [element.attrib["id"] for element in root.iter() if "id" in element.attrib]
    assert len(ids) == len(set(ids))
    assert not re.search(r"\b(None|nan|inf)\b", text_of(page).replace("None found", ""))
    assert conclusion_of_any(RECORDS[name]) == conclusion(RECORDS[name])
    assert page == page_of_any(RECORDS[name])


@EACH
def test_every_block_has_its_tile_and_every_named_block_its_mark(name: str, pages: dict[str, str]) -> None:
    record, root = RECORDS[name], ET.fromstring(pages[name])
    tiles = [element for element in root.iter("li") if "data-block" in element.attrib]
    scored = [str(block.index) for block in record.blocks if block.score is not None]
    assert [tile.attrib["data-block"] for tile in tiles] == scored
    named = [t.attrib["data-block"] for t in tiles if "named" in t[0].attrib["class"].split()]
    blocks = {block.index for block in record.blocks}
    assert named == [str(index) for index in sorted(each.block for each in record.unlike or ()) if index in blocks]


def test_every_signal_has_its_chart_with_a_line_for_each_part_and_the_block_marked(pages: dict[str, str]) -> None:
    root = ET.fromstring(pages["whole"])
    charts_of = {e.attrib["id"]: e for e in root.iter("figure") if e.attrib.get("id", "").startswith("signal-")}
    assert set(charts_of) == {
        f"signal-{name}" for name in ("weight_rms", "neuron_mismatch", "linear_cka", "gain_t", "successive_cosine")
    }
    weights = charts_of["signal-weight_rms"]
    assert [title.text for title in weights.iter("title")][-1] == "mlp.down_proj"
    assert len(list(weights.iter("title"))) == 7
    assert len([r for r in weights.iter("rect") if r.attrib["class"] == "band"]) == 1
    assert [t.text for t in weights.iter("text") if t.attrib.get("class") == "named"] == [str(NAMED)]
    assert "The same everywhere: gain RMS (1)." in text_of(pages["whole"])
    assert 'class="band"' not in pages["nothing"]


def test_a_line_goes_through_the_values_and_has_a_gap_where_there_is_none() -> None:
    rows = {"": (None, 1.0, 3.0, None, 2.0)}
    svg = ET.fromstring(charts.chart("linear_cka", rows, {"": charts.Style("block", "", True)}, [2]))
    (line,) = (path for path in svg.iter("path") if "whole" in path.attrib["class"])
    moves = re.findall(r"([MLh])(\d+\.\d)? ?(\d+\.\d|\d+)", line.attrib["d"])
    assert [move for move, *_ in moves] == ["M", "L", "M", "h"]
    low, high, alone = (float(y) for _, _, y in moves[:3])
    assert low > alone > high  # counted from the top
    assert [t.text for t in svg.iter("text") if t.attrib.get("text-anchor") == "end"] == ["1", "3", "2"]
    assert charts.chart("linear_cka", {"": (None, None)}, {}, []) == ""


def test_quotients_are_logarithmic_and_differences_bear_a_block_far_out() -> None:
    style = {"": charts.Style("block", "", True)}

    def heights(signal: str, values: tuple[float, ...]) -> list[float]:
        svg = charts.chart(signal, {"": values}, style, [])
        (path,) = re.findall(r'class="block whole" d="M([^"]*)"', svg)
        return [float(point.split()[1]) for point in path.split("L")]

    one, two, three = heights("weight_rms", (1.0, 10.0, 100.0))
    assert one - two == pytest.approx(two - three, abs=0.2)
    usual = heights("linear_cka", (0.1, 0.2, 0.3, 0.2, 0.1, 0.2, 1000.0))
    assert usual[0] - usual[2] > 4  # a linear scale would draw them 0.02 apart
    assert usual[6] < usual[2]


def test_labels_tell_values_apart() -> None:
    svg = charts.chart(
        "attention_entropy", {"": (0.99981, 0.99989, 0.99985)}, {"": charts.Style("block", "", True)}, []
    )
    labels = re.findall(r'text-anchor="end">([^<]*)<', svg)
    assert labels == ["0.99981", "0.99989", "0.99985"]


def test_the_main_parts_are_there(pages: dict[str, str]) -> None:
    text, record = text_of(pages["whole"]), RECORDS["whole"]
    for part in (
        conclusion(record),
        UNLIKE,
        "self_attn.o_proj, head 3",
        "signals of the weights",
        record.model.fingerprint,
        "+1.3000 [+1.1000, +1.5000]",
        "Block 15: score 12",
        "of 30 blocks",
        "peelwise verify DIR --model MODEL --text FILE",
    ):
        assert part in text
    assert "--text FILE" not in text_of(pages["weights"])
    assert "peelwise verify DIR --model MODEL --full" in text_of(pages["weights"])
    assert "Without text there are signals of the weights alone" in text_of(pages["weights"])
    assert "none: weights alone" in text_of(pages["weights"])
    assert "no depth to compare with" in text_of(pages["few"])


def test_no_matplotlib_is_needed(monkeypatch: pytest.MonkeyPatch, pages: dict[str, str]) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert render_html(RECORDS["whole"]) == pages["whole"]


def test_hostile_strings_are_text(pages: dict[str, str]) -> None:
    for shown in (pages["hostile"], record_html(RECORDS["hostile"])):
        assert "<script" not in shown
        assert "\x1b" not in shown
        assert "\u202e" not in shown
    assert clean(HOSTILE) in " ".join(text_of(pages["hostile"]).split())
    assert "[red]b[/red]" in printed(RECORDS["hostile"], 100)


@pytest.mark.parametrize("name", ["whole", "deep", "hostile"])
def test_a_browser_opens_it_without_complaint(name: str, pages: dict[str, str], tmp_path: Path, chromium: str) -> None:
    page = tmp_path / "report.html"
    page.write_text(pages[name], encoding="utf-8")
    dom, complaints = opened(page, tmp_path / "profile", chromium)
    assert complaints == []
    assert dom.count("<svg") == pages[name].count("<svg")


# -- notebook ----------------------------------------------------------------------------------------------------


@EACH
def test_a_notebook_shows_conclusion_bars_and_reasons(name: str) -> None:
    record = RECORDS[name]
    found = tree(record_html(record))
    assert " ".join(clean(conclusion(record)).split()) in " ".join(found.text.split())
    assert found.tags.count("rect") == (len(record.blocks) if record.unlike is not None else 0)
    if name == "whole":
        assert "weight RMS" in found.text
        assert "+1.3000 [1.1000, 1.5000]" in found.text
