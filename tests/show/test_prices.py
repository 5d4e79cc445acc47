"""The picture of what each layer costs: one cell per layer, darker where it is dearer, safe to show anywhere."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from peelwise.show.html.prices import Price, Shades, picture

SVG = "{http://www.w3.org/2000/svg}"


def _cells(svg: str) -> dict[str, float]:
    root = ElementTree.fromstring(svg)
    return {
        group.find(f"{SVG}title").text: float(group.findall(f"{SVG}rect")[1].get("fill-opacity"))
        for group in root.iter(f"{SVG}g")
    }


def test_every_layer_is_a_cell_and_the_dearest_is_the_darkest() -> None:
    prices = [Price(b, layer, 10.0 ** (b - 3) * size) for b in range(4) for layer, size in (("up", 1), ("down", 3))]
    cells = _cells(picture(prices, "a model", ("a line",), "nats"))
    assert len(cells) == 8
    assert cells["block 3, down: 3"] == 1
    assert max(cells, key=cells.__getitem__) == "block 3, down: 3"
    shades = [cells[f"block {b}, up: {10.0 ** (b - 3):.3g}"] for b in range(4)]
    assert shades == sorted(shades)
    assert shades[2] - shades[1] == pytest.approx(1 / 3, abs=1e-3)  # a decade is a third


def test_what_costs_nothing_is_empty_and_what_is_negative_too() -> None:
    assert Shades(1.0)(0) == Shades(1.0)(-1) == Shades.of([-1.0])(1) == 0
    assert Shades(1.0)(1e-9) > 0
    svg = picture([Price(0, "up", -0.1)], "a model", (), "nats")
    assert "No layer costs anything here." in svg
    assert list(_cells(svg).values()) == [0]


def test_prices_that_are_close_are_told_apart() -> None:
    close, wide = Shades.of([1.0, 2.0, 0.0]), Shades.of([1e-9, 1.0, 2.0])
    assert (close.decades, wide.decades) == (1, 3)
    assert close(2.0) - close(1.0) == pytest.approx(3 * (wide(2.0) - wide(1.0)))


def test_names_are_text_and_nothing_is_loaded() -> None:
    bad = '"><script>alert(1)</script>'
    svg = picture([Price(0, bad, 1.0, bad, bad)], bad, (bad,), bad)
    ElementTree.fromstring(svg)
    assert "<script" not in svg
    assert not re.search(r"(href|src|url\()", svg)


def test_a_picture_of_many_blocks_is_no_wider_than_a_page_bears() -> None:
    root = ElementTree.fromstring(picture([Price(b, "up", 1.0, "4") for b in range(200)], "m", (), "nats"))
    assert int(root.get("width")) < 2200
    assert "4" not in [text.text for text in root.iter(f"{SVG}text") if text.get("text-anchor")]
    wide = ElementTree.fromstring(picture([Price(0, "up", 1.0)], "m", ("a long sentence " * 20,), "nats"))
    assert int(wide.get("width")) > 320 * 6
