"""What measurements on different parts of a text say together decides; what each said stays on record beside it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import peelwise
from peelwise.distributed.processes import ONE_PROCESS
from peelwise.evidence.intervals import Paired
from peelwise.model.architectures import find_blocks
from peelwise.model.guard import untouched
from peelwise.model.runner import Runner
from peelwise.probe.rolling import Part
from peelwise.tasks.monitor.planner import PLAN, Planner
from tasks.monitor.test_chronicle import add, chronicle, visit_of
from zoo import ZOO, sample_ids

LENGTH = 8
UNSURE = Paired(0.008, 0.004, 20)  # at a margin of 0.015: 1.75 standard errors below


def part(number, corpus=1_000):
    """Return the part of the ``number``-th measurement of twenty sequences."""
    return Part(None, range(20 * number, 20 * number + 20), corpus)


def rows_of(row, name):
    return {s.block: s for s in row.statistics if s.name == name}


def rolling(**options):
    return peelwise.Probe.rolling(
        sample_ids(400, LENGTH + 1), **{"tokens": 3_000, "each": 600, "in_distribution": True, **options}
    )


def test_three_unsure_measurements_decide_together_and_each_stays_on_record():
    made = chronicle()
    for number in range(4):
        row = add(made, 200 + 10 * number, visit_of(alone={0: UNSURE}), part=part(number))
        assert rows_of(row, "recoverable")[0].value == 0.008
        single = rows_of(row, "recoverable")[0]
        if number == 0:
            assert row.letters[0] == "?"
            assert not rows_of(row, "recoverable_level")
    level = rows_of(row, "recoverable_level")[0]
    assert row.letters[0] == "G"
    assert level.value == pytest.approx(0.008)
    assert level.high - level.low < 0.75 * (single.high - single.low)


def test_the_same_text_again_and_again_decides_nothing():
    made = chronicle()
    for number in range(4):
        row = add(made, 200 + 10 * number, visit_of(alone={0: UNSURE}))
    assert row.letters[0] == "?"
    made = chronicle()
    for number in range(4):  # a corpus of one measurement: all begins from the same sequences
        row = add(made, 200 + 10 * number, visit_of(alone={0: UNSURE}), part=part(number, corpus=20))
    assert row.letters[0] == "?"


def test_a_level_ages_between_measurements_and_outlasts_training_that_goes_on():
    made = chronicle()
    for number in range(3):
        row = add(made, 200 + 10 * number, visit_of(alone={0: UNSURE}), part=part(number))
    later = add(made, 320, visit_of(2.9), part=part(3))  # training has gained more than the level, which drifts
    before, after = (rows_of(each, "recoverable_level")[0] for each in (row, later))
    assert after.value == pytest.approx(before.value)
    assert after.high - after.low > 1.1 * (before.high - before.low)


def test_a_fault_ends_a_level_of_nothing():
    nothing = Paired(0.001, 0.001, 20)
    made = chronicle()
    for number in range(3):
        row = add(made, 200 + 10 * number, visit_of(3.0, alone={0: nothing, 1: nothing}), part=part(number))
    assert row.letters[:2] == "GG"
    row = add(made, 240, visit_of(3.2), part=part(3))
    assert row.letters[:2] == "??"
    assert not rows_of(row, "recoverable_level")
    row = add(made, 250, visit_of(3.2, alone={0: Paired(0.08, 0.01, 20)}), part=part(4))
    assert row.letters[:2] == "R?"
    assert not rows_of(row, "recoverable_level")  # the first measurement of something else


def test_bounds_are_put_together_too():
    bound = Paired(0.010, 0.003, 20)
    made = chronicle()
    letters = [
        add(made, 200 + 10 * n, visit_of(bounds={0: bound}), part=part(n) if together else None).letters[0]
        for together in (False, True)
        for n in range(4)
    ]
    assert letters[:4] == ["?"] * 4
    assert letters[-1] == "G"


def planner(probe, **options):
    return Planner(probe, PLAN, **{"budget": 0.03, "per_token": 1e-6, "processes": ONE_PROCESS, **options})


def test_a_planner_takes_another_part_of_the_size_that_the_budget_allows():
    probe = rolling()
    made = planner(probe)
    first, second = made.take(), made.take()
    assert made.probe is second.probe
    assert first.report.stop == second.report.start
    assert 500 < sum(getattr(second.probe, each).tokens for each in ("fit", "select", "report")) < 700
    assert "600 probe tokens" in made.forecast(0).text
    assert not made.grow(1e6)
    fixed = planner(replace_kind(probe))
    assert fixed.take() is None


def replace_kind(probe):
    """Return the same text as a probe that does not roll."""
    return peelwise.Probe(probe.fit, probe.select, probe.report, source="text", in_distribution=True)


def kinds_of(probe, count, undecided):
    made, kinds = planner(probe), []
    for _ in range(count):
        kinds.append(made.due(0.0, 1e6, undecided=undecided))
        made.begin(kinds[-1])
    return kinds


def test_what_may_decide_comes_first_at_every_measurement_of_a_rolling_probe():
    fixed = replace_kind(rolling())
    assert kinds_of(rolling(), 4, undecided=1.0) == ["alone"] * 4
    assert kinds_of(fixed, 4, undecided=1.0) == ["alone", "alone", "alone", "joint"]
    assert kinds_of(fixed, 14, undecided=1.0)[8:] == ["alone", "ranking", "alone", "joint", "alone", "ranking"]


def test_rankings_come_where_there_are_many_measurements_already():
    kinds = kinds_of(replace_kind(rolling()), 14, undecided=0.0)
    assert kinds[:8] == ["alone", "alone", "alone", "joint", "alone", "alone", "alone", "alone"]
    assert kinds[8:] == ["ranking", "joint", "ranking", "alone", "ranking", "alone"]


def test_a_rolling_probe_is_refined_at_every_measurement_and_joint_rounds_keep_their_turn():
    made, kinds = planner(rolling()), []
    for _ in range(6):
        kinds.append(made.due(0.0, 1e6, undecided=0.0))
        made.begin(kinds[-1])
    assert kinds == ["alone", "alone", "alone", "joint", "alone", "alone"]


def test_the_loss_is_always_of_the_same_text():
    model = ZOO["plain"]()
    probe = rolling()
    with untouched(model):
        expected = Runner(model, find_blocks(model), micro_batch_tokens=256).trace(probe.fixed).mean
    with peelwise.Monitor(model, probe, budget=None, schedule=peelwise.every(1), store=None) as monitor:
        losses = [monitor.step(step, loss=expected).probe_loss for step in range(3)]
    assert losses == pytest.approx([expected] * 3, rel=1e-6)
    assert not [event for event in monitor.events if event.level != "info"]


def test_without_what_is_kept_for_it_the_loss_would_move():
    """The control: the parts themselves have losses of their own."""
    model, probe = ZOO["plain"](), replace(rolling(), each=600)
    roll = peelwise.probe.rolling.Roll(probe)
    with untouched(model):
        runner = Runner(model, find_blocks(model), micro_batch_tokens=256)
        losses = [runner.trace(roll.take(600).probe.report).mean for _ in range(3)]
    assert max(losses) - min(losses) > 1e-4
    assert torch.is_grad_enabled()
