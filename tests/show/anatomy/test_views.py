"""An anatomy in words, on the terminal, in a notebook and as a page: what was found is there, and nothing else."""

from __future__ import annotations

import re
from typing import get_args

import pytest
from rich.console import Console

from peelwise.records.anatomy import ABLATIONS, BENDS, Ablation, Bend
from peelwise.show import notebook, views
from peelwise.show.anatomy import words
from show import anatomy_sample

pytestmark = pytest.mark.slow


def printed(record: object, width: int = 120) -> str:
    console = Console(width=width, no_color=True, highlight=False)
    with console.capture() as captured:
        console.print(views.render(record))  # type: ignore[arg-type]
    return captured.get()


def test_every_code_has_words() -> None:
    assert tuple(words.ABLATIONS) == tuple(words.ABLATION_MEANINGS) == ABLATIONS == get_args(Ablation)
    assert tuple(words.BENDS) == BENDS == get_args(Bend)


def test_the_conclusion_follows_from_the_numbers() -> None:
    said = views.conclusion(anatomy_sample.record())
    assert "Without block 0 the loss rises most, by 2.1000 nats per token (perplexity x 8.17)" in said
    assert "without block 3 least, by -0.2500 (x 0.779)" in said
    assert "better without: 3 (skipped), 3 (attention silent)" in said
    assert "tell something of mlp.gate_proj." in said
    record = anatomy_sample.record()
    some = tuple(b.model_copy(update={"ablation": {}}) if b.index == 0 else b for b in record.blocks)
    said = views.conclusion(record.model_copy(update={"blocks": some}))
    assert "Of the 7 blocks measured: without block 7 the loss rises most" in said
    healthy = record.model_copy(update={"better_without": (), "predictability": record.predictability[1:]})
    said = views.conclusion(healthy)
    assert "No block or part was found without which the model is better" in said
    assert "no more of a block's than independent random matrices" in said


def test_the_terminal_shows_costs_tolerances_controls_and_correlations() -> None:
    shown = printed(anatomy_sample.record())
    for text in ("-0.250 [-0.260, -0.240]", "+2.100", "0.925", "40 %", "60 % in 20", "60 % in 35", "none", "10 %",
                 "-0.530 .. -0.470", "x 0.779", "+0.500  ", "+1.00  ", words.SIGNS[:40], "Cost: 1 min"):  # fmt: skip
        assert text in shown, text
    assert all(len(line) <= 80 for line in printed(anatomy_sample.record(), 80).splitlines())


def test_what_was_not_measured_is_said_and_not_drawn() -> None:
    nothing = anatomy_sample.record(measured=False)
    shown = printed(nothing)
    assert "Stopped early: what is missing was not measured within the budget" in shown
    assert "What the loss rises by" not in shown
    assert "The model is better without" not in shown
    page = views.render_html(nothing)
    assert "Not measured within the budget." in page
    assert "<svg" not in page


def test_the_page_holds_every_block_and_loads_nothing() -> None:
    page = views.render_html(anatomy_sample.record())
    assert page == views.render_html(anatomy_sample.record())
    assert page.count("<svg") == 2
    for block in anatomy_sample.record().blocks:
        assert f'<th scope="row">{block.index}</th>' in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert "<script" not in page
    assert "mathdefault" not in page  # ticks are plain numbers
    assert "<small>x 0.779</small>" in page  # perplexity
    assert "<b>predicted</b>" in page  # significant among all columns
    assert "<b>score</b>" not in page


def test_names_of_others_do_nothing_on_the_page() -> None:
    record = anatomy_sample.record()
    evil = record.model_copy(update={"model": record.model.model_copy(update={"name": "<script>x</script>"})})
    assert "<script>" not in views.render_html(evil)
    assert "<script>" not in notebook.record_html(evil)


def test_a_notebook_shows_the_table() -> None:
    shown = notebook.record_html(anatomy_sample.record())
    assert "skipped, nats/token" in shown
    assert "better without" in shown
