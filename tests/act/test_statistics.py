"""Numbers per block from a check and from a monitor's measurement."""

from types import SimpleNamespace

import pytest
import torch

import peelwise
from peelwise.act import param_groups, weights_from
from peelwise.errors import OptionError
from peelwise.records.run import Statistic
from plain_gpt import PlainGPT


def test_a_check_feeds_rates():
    torch.manual_seed(0)
    model = PlainGPT(blocks=5)
    report = peelwise.check(model, text=False)
    key = next(name for name in report.record.blocks[0].signals if name.startswith("weight_rms"))
    found = weights_from(report, key)
    assert found == [block.signals[key] for block in report.record.blocks]
    assert weights_from(report.record, "score") == [block.score for block in report.record.blocks]
    groups = param_groups(model, found, base_lr=1e-3)
    largest = max(groups, key=lambda group: group["factor"])
    assert largest["block"] == found.index(max(found))


def test_a_measurement_and_intervals_and_negative_numbers():
    rows = [Statistic("energy", 0, 2.0), Statistic("energy", 1, -3.0), Statistic("loss", -1, 9.0)]
    rows += [Statistic("unique", 1, 1.0)]
    measurement = SimpleNamespace(statistics=rows)
    assert weights_from(measurement, "energy") == [2.0, 0.0]
    assert weights_from(measurement, "energy", least=0.5) == [2.0, 0.5]
    with pytest.raises(OptionError, match=r"unique was not measured for blocks \[0\]"):
        weights_from(measurement, "unique")
    with pytest.raises(OptionError, match=r"no statistic 'beauty' here\. Known: energy, unique"):
        weights_from(measurement, "beauty")
    with pytest.raises(OptionError, match="Expected a record with blocks or a measurement, got int"):
        weights_from(3, "energy")


def test_intervals_give_their_mean():
    block = SimpleNamespace(index=0, verdict="red", signals=None, ablation=SimpleNamespace(mean=0.25, low=0.1))
    assert weights_from(SimpleNamespace(blocks=[block]), "ablation") == [0.25]
