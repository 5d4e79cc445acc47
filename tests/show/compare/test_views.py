"""A comparison in words, on the terminal and as a page: what was found is there, and nothing that was not."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import get_args

import pytest
from rich.console import Console

from peelwise.records.compare import CompareConclusion, KindOfChange, Mended
from peelwise.show import notebook, views
from peelwise.show.compare import words
from peelwise.show.compare.terminal import render, render_series
from show import compare_sample

pytestmark = pytest.mark.slow


def _printed(view: object, width: int = 120) -> str:
    console = Console(width=width, no_color=True, highlight=False)
    with console.capture() as captured:
        console.print(view)
    return captured.get()


def test_every_kind_has_words_and_details_never_fail() -> None:
    assert set(words.KINDS) == set(get_args(KindOfChange))
    for code in words.KINDS:
        assert words.kind_words(code, {}) == words.KINDS[code]
    assert words.kind_words("scale", {"factor": 1.3}) == "scaled by 1.3"
    assert words.kind_words("scale", {"by": "rows", "least": 0.5, "largest": 2.0}) == "scaled rows by rows, 0.5 to 2"
    assert words.kind_words("permutation", {"of": "rows", "group": 64}) == "permuted: rows in groups of 64"
    assert words.kind_words("lattice", {"group": 0, "steps": 6}) == "quantised: 7 values per row"
    assert words.kind_words("zeroed", {"share": 0.5}) == "set to zero (50 %)"
    assert words.kind_words("low-rank", {"rank": 8}) == "update of low rank (8)"


def test_the_conclusion_follows_from_the_numbers() -> None:
    record = compare_sample.record()
    assert record.conclusion == CompareConclusion(
        case="worse", hurt=(4,), helped=(9,), changed=(4, 9, 12), unexplained=(12,)
    )
    said = words.conclusion(record)
    assert "NEW is worse by 0.7147 nats per token" in said
    assert "Putting back block 4 repairs more than the margin of 0.0161. Block 4 repairs 0.8213: sign flipped." in said
    assert "The change of block 9 helped" in said
    assert "first part that computes something else is block 4: its weights" in said
    assert "In block 12 configuration or code differs" in said


def test_the_terminal_lists_what_changed_and_says_the_signs() -> None:
    shown = _printed(render(compare_sample.record()))
    for text in ("+0.821 [0.811, 0.831]", "sign flipped", "16 more parts are the same", words.SIGNS[:40], "Note: "):
        assert text in shown
    assert "mlp.down_proj.weight" in shown
    assert shown.index("mlp.down_proj.weight") < shown.index("self_attn.o_proj.weight")  # the larger one first
    assert not re.search(r"^ +3 ", shown, re.MULTILINE)  # block 3 is unchanged
    every = _printed(render(compare_sample.record(), every=True))
    assert re.search(r"^ +3 ", every, re.MULTILINE)
    assert max(map(len, _printed(render(compare_sample.record()), 80).splitlines())) <= 80


def test_a_run_is_a_table_over_time() -> None:
    shown = _printed(render_series(compare_sample.series()))
    for name in ("step-100", "step-200", "step-300"):
        assert name in shown
    assert shown.count("+0.7147") == 2


def test_the_page_says_it_all_and_runs_nothing() -> None:
    page = views.render_html(compare_sample.record())
    for text in ("+0.7147", "sign flipped", "From NEW to OLD", "Layer by layer", "Interaction", "tuned &lt;b&gt;"):
        assert text in page
    assert page.count("<svg") == 3
    assert "<script" not in page
    assert "tuned <b>" not in page
    assert views.render_html(compare_sample.series()).count("<svg") == 1
    missing = compare_sample.record()
    bare = [
        b.model_copy(update=dict.fromkeys(("repairs_nats", "breaks_nats", "path_from_first_nats")))
        for b in missing.blocks
    ]
    ends = [e.model_copy(update=dict.fromkeys(("repairs_nats", "breaks_nats"))) for e in missing.ends]
    page = views.render_html(
        missing.model_copy(
            update={
                "blocks": tuple(bare),
                "ends": tuple(ends),
                "conclusion": CompareConclusion(case="worse", changed=(4,)),
            }
        )
    )
    assert page.count("<svg") == 1
    assert "Not measured within the budget" in page


def test_the_page_lists_what_changed_and_counts_the_rest() -> None:
    page = views.render_html(compare_sample.record())
    table = page[page.index('id="parts"') :]
    table = table[: table.index("</section>")]
    assert table.count("<tr>") == 1 + 3  # titles, and blocks 4, 9 and 12
    assert "The other 16 parts are the same in both models" in table
    same = compare_sample.record()
    quiet = same.blocks[0]
    blocks = tuple(quiet.model_copy(update={"index": b.index, "name": b.name}) for b in same.blocks)
    assert "All 19 parts are the same" in views.render_html(same.model_copy(update={"blocks": blocks}))


def test_a_notebook_shows_the_changed_parts() -> None:
    shown = notebook.record_html(compare_sample.record())
    assert "sign flipped" in shown
    assert "tuned &lt;b&gt;" in shown
    assert "step-300" in notebook.record_html(compare_sample.series())


def test_the_page_fits_its_width_in_a_browser(chromium: str, tmp_path: Path) -> None:
    page, image = tmp_path / "page.html", tmp_path / "page.png"
    page.write_text(views.render_html(compare_sample.record()), encoding="utf-8")
    command = [
        chromium,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--window-size=1100,900",
        f"--screenshot={image}",
    ]
    subprocess.run([*command, page.as_uri()], check=True, capture_output=True, timeout=120)
    assert image.stat().st_size > 10_000


def test_what_is_put_back_together_is_said_where_it_can_be_applied() -> None:
    record = compare_sample.record()
    assert "cannot be put back as tensors" in words.mended(record)  # block 4 hurts, and nothing was put back
    mended = Mended(blocks=(4,), ends=("head",), loss=3.1, gain=compare_sample.interval(0.83))
    found = record.model_copy(update={"mended": mended})
    assert words.mended(found) == (
        "NEW with block 4 and the head of OLD has loss 3.1000: 0.8300 lower (95 % interval 0.8200 to 0.8400)."
    )
    assert "peelwise apply out/x --out" in _printed(render(found, "out/x"))
    assert "peelwise apply DIR" in views.render_html(found)
    nothing = mended.model_copy(update={"gain": compare_sample.interval(0.005)})
    unproved = record.model_copy(update={"mended": nothing})
    assert "no proof of a gain" in words.mended(unproved)
    assert "peelwise apply" not in _printed(render(unproved, "out/x")) + views.render_html(unproved)


def test_nothing_hurts_and_nothing_is_put_back() -> None:
    record = compare_sample.record()
    calm = record.model_copy(update={"conclusion": record.conclusion.model_copy(update={"hurt": ()})})
    assert words.mended(calm) == ""
    ends = calm.model_copy(update={"conclusion": calm.conclusion.model_copy(update={"hurt_ends": ("norm",)})})
    assert "Putting back the final norm of OLD repairs" in words.conclusion(ends)


def test_a_narrow_terminal_keeps_the_kind_and_leaves_out_the_ways() -> None:
    narrow, wide = (_printed(render(compare_sample.record()), width) for width in (80, 120))
    for shown in (narrow, wide):
        assert "sign flipped" in shown
        assert "same weights, other configuration or code" in " ".join(shown.split())
    assert "…" not in narrow
    assert "inter-" in wide
    assert "inter-" not in narrow


def test_axes_of_the_page_are_plain_numbers() -> None:
    page = views.render_html(compare_sample.record())
    assert "mathdefault" not in page
    assert "fingerprint of OLD" in page
