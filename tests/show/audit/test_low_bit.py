"""How the parts of a low-bit model's loss are shown."""

from __future__ import annotations

import pytest
from rich.console import Console

from peelwise.records.audit import AuditRecord, MatrixRecord
from peelwise.records.base import CostRecord, Interval, SplitRecord
from peelwise.records.quantcheck import LayerCheck, QuantcheckConclusion, QuantcheckRecord, QuantLosses
from peelwise.show.audit import terminal
from peelwise.show.audit.report import render_html
from peelwise.show.quantcheck import terminal as quant_terminal
from show.sample import whole


def _interval(mean: float) -> Interval:
    return Interval(
        mean=mean, low=mean - 0.01, high=mean + 0.01, standard_error=0.005, sequences=40, method="student-t"
    )


def _printed(view: object, width: int = 80) -> str:
    console = Console(width=width, no_color=True, highlight=False)
    with console.capture() as capture:
        console.print(view)
    return capture.get()


def low_bit_record() -> AuditRecord:
    """Return the sample with a format on every layer and the loss in three parts."""
    record = whole()
    current = record.loss.current
    split = SplitRecord(irreducible=current - 0.11, price_of_precision=0.04, left_on_the_table=0.07)
    layer = SplitRecord(irreducible=0.0, price_of_precision=0.002, left_on_the_table=0.0005)
    matrix = MatrixRecord(
        name="mlp.up_<proj>", share=0.5, format="ternary:tensor", bits_per_weight=1.59, flipped=0.012, split=layer
    )
    blocks = tuple(
        b.model_copy(update={"split": split, "price_nats": _interval(0.04), "matrices": (matrix,)})
        for b in record.blocks
    )
    loss = record.loss.model_copy(update={"split": split, "price": _interval(0.04), "dense": current - 0.11})
    return record.model_copy(update={"blocks": blocks, "loss": loss})


def test_the_terminal_shows_the_three_parts_at_any_width() -> None:
    for width in (60, 80, 140):
        text = _printed(terminal.render(low_bit_record()), width)
        assert max(map(len, text.splitlines())) <= width
        for words in (
            "irreducible",
            "quantisation gap",
            "≤ 0.0400",
            "recoverable at the same bit",
            "0.0700",
            "certified",
        ):
            assert words in text
    assert "quantisation gap" not in _printed(terminal.render(whole()))


@pytest.mark.slow
def test_the_report_has_a_section_with_every_layer_and_escapes_names() -> None:
    page = render_html(low_bit_record())
    assert '<section id="bits">' in page
    assert "up_&lt;proj&gt;" in page
    assert "ternary:tensor" in page
    assert '<section id="bits">' not in render_html(whole())


def test_a_comparison_is_shown_with_the_layers_that_were_not_reached() -> None:
    sample = whole()
    split = SplitRecord(irreducible=2.0, price_of_precision=0.2, left_on_the_table=0.3)
    part = SplitRecord(irreducible=0.0, price_of_precision=0.02, left_on_the_table=0.03)
    layers = [
        LayerCheck(
            name=f"model.layers.{i}.mlp.up_proj",
            block=i,
            format="int3:channel",
            bits_per_weight=3.1,
            error=0.05,
            flipped=0.3,
            split=part if i < 3 else None,
        )
        for i in range(5)
    ]
    record = QuantcheckRecord(
        created="2026-11-21T00:00:00+00:00", conclusion=QuantcheckConclusion(case="recoverable"), complete=False,
        quantised=sample.model, parent=sample.model, probe=sample.probe,
        loss=QuantLosses(parent=2.0, quantised=2.5, best=2.2, damage=_interval(0.5), left=_interval(0.3),
                         price=_interval(0.2), split=split, kept=True),
        layers=tuple(layers), cost=CostRecord(forward_equivalents=3.0, wall_seconds=9.0, peak_bytes=1), settings={},
        seed=0, versions={},
    )  # fmt: skip
    text = _printed(quant_terminal.render(record, 2))
    assert max(map(len, text.splitlines())) <= 80
    for words in (
        "≤ 0.2000",
        "0.3000",
        "mlp.up_proj",
        "The 2 with most to recover; all 3",
        "2 more layers: not measured",
    ):
        assert words in text
    assert text.count("mlp.up_proj") == 2
