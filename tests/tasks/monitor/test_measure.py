"""One measurement: one block's step is searched for, the others take it, and their slopes bound them."""

from __future__ import annotations

import copy

import pytest
import torch

from audits import tiny_probe
from peelwise.model.architectures import find_blocks
from peelwise.tasks.monitor.measure import measure
from zoo import BLOCKS, ZOO

EVERY = list(range(BLOCKS))


def measured(model, kind, order=EVERY, **options):
    return measure(model, find_blocks(model), tiny_probe(), kind, order, micro_batch_tokens=64, **options)


@pytest.mark.parametrize("name", ["plain", "llama"])
def test_others_take_the_first_ones_step(name):
    model = ZOO[name]()
    before = copy.deepcopy(model.state_dict())
    found = measured(model, "alone")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert set(found.steps) <= {"two-sided", "input-whitened"}
    assert len(found.steps) == 1
    assert 0 in found.alone
    assert set(found.bounds) == set(EVERY) - set(found.alone)


def test_a_ranking_bounds_all_by_the_steps_of_an_earlier_measurement():
    model = ZOO["plain"]()
    assert measured(model, "ranking").bounds == {}
    steps = measured(model, "alone").steps
    again = measured(model, "ranking", steps=steps)
    assert set(again.bounds) == set(EVERY)
    assert again.steps == steps
    assert again.alone == {}
