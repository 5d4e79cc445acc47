"""From the values of linear layers to one of the block."""

import pytest

from peelwise.engine.signals import of_block, of_layer
from peelwise.records.signals import SIGNALS, Signal


def value(of):
    return of


@pytest.mark.parametrize(
    ("over_layers", "values", "expected"),
    [
        ("sum", [9.0, 16.0], 25.0),
        ("root of sum", [9.0, 16.0], 5.0),
        ("mean", [9.0, 16.0], 12.5),
        ("largest", [9.0, 16.0], 16.0),
        ("mean", [None, 4.0], 4.0),  # a layer that has none counts for nothing
        ("sum", [None, None], None),
    ],
)
def test_a_blocks_value_from_those_of_its_layers(monkeypatch, over_layers, values, expected):
    signal = Signal("dummy", "", "", "", kind="weights", function=f"{__name__}:value", over_layers=over_layers)
    monkeypatch.setitem(SIGNALS, "dummy", signal)
    found = of_block(["weights"], [of_layer(["weights"], each) for each in values])
    assert found.get("dummy") == expected
