"""From visits to rows: verdicts over time, changes of level, events, and what measurements are worth."""

from dataclasses import replace

import numpy as np
import pytest

from peelwise.evidence.events import Seen
from peelwise.evidence.intervals import Paired
from peelwise.records.run import WHOLE_MODEL, MatrixShare
from peelwise.tasks.monitor.chronicle import Chronicle
from peelwise.tasks.monitor.measure import Measured
from peelwise.tasks.monitor.pace import Pace, missing

BLOCKS = 4
MUCH, NOTHING = Paired(0.05, 0.004, 40), Paired(0.001, 0.001, 40)


def visit_of(loss=3.0, *, energies=(1.0,) * BLOCKS, alone=None, unique=None, bounds=None):
    free = {
        "energy": list(energies),
        "natural_energy": [None if e is None else e / 2 for e in energies],
        "gradient_norm": [None if e is None else e**0.5 for e in energies],
    }
    return Measured(
        "alone", loss, free, alone or {}, unique or {}, None, None, (MatrixShare(0, "out", 1.0),), bounds=bounds or {}
    )


def chronicle(losses="flat", count=200, **options):
    made = Chronicle(BLOCKS, **({"margin": None, "in_distribution": True} | options))
    noise = np.random.default_rng(0).normal(scale=0.05, size=count)
    for step in range(count):
        made.loss(step, 3.0 + noise[step] - (0.01 * step if losses == "falling" else 0.0))
    return made


def add(made, step, measured, **options):
    return made.add(step, measured, **({"seconds": 1.0, "share": 0.03} | options))


def test_red_where_the_loss_stands_still_and_yellow_where_it_falls():
    row = add(chronicle(), 200, visit_of(alone={0: MUCH, 1: NOTHING}))
    assert row.letters == "RG??"
    assert (row.still_falling, row.slope_low < 0 < row.slope_high) == (False, True)
    row = add(chronicle("falling"), 200, visit_of(alone={0: MUCH, 1: NOTHING}))
    assert row.letters == "YG??"
    assert row.still_falling is True
    assert row.slope == pytest.approx(-0.01, rel=0.1)


@pytest.mark.parametrize(("fall", "letter"), [(0.004, "Y"), (0.0, "R"), (2e-5, "R")], ids=["falls", "stands", "creeps"])
def test_a_probe_that_falls_by_more_than_the_margin_is_not_red_whatever_the_noise_of_the_batches(fall, letter):
    made = chronicle()
    for step in range(100, 201, 10):
        row = add(made, step, visit_of(3.0 - fall * (step - 100), alone={0: MUCH} if step == 200 else {}))
    assert row.letters[0] == letter
    assert row.still_falling is False  # that is about the training loss


def test_a_block_is_not_green_on_an_old_measurement_once_the_loss_has_risen():
    made = chronicle()
    assert add(made, 200, visit_of(3.0, alone={0: MUCH, 1: NOTHING})).letters == "RG??"
    assert add(made, 210, visit_of(3.01)).letters == "RG??"  # by less than the margin
    assert add(made, 220, visit_of(3.05)).letters == "R???"
    assert made.wanted_first()[0] != 0
    assert add(made, 230, visit_of(3.05, alone={1: NOTHING})).letters == "RG??"


def test_a_verdict_lasts_while_nothing_contradicts_it_and_the_run_is_not_twice_as_long():
    unsure, above = Paired(0.014, 0.004, 30), Paired(0.02, 0.004, 30)
    made = chronicle()
    assert add(made, 200, visit_of(3.0, alone={0: MUCH, 1: NOTHING, 2: NOTHING})).letters == "RGG?"
    row = add(made, 210, visit_of(3.0, alone={0: above, 1: unsure, 2: above}))
    assert row.letters == "RG??"  # undecided by themselves; the last one points the other way
    assert row.verdicts[0].block == 2
    row = add(made, 220, visit_of(3.0, alone={0: unsure}))
    assert row.letters == "?G??"
    assert add(made, 230, visit_of(2.9)).letters == "?G??"  # training has gained more than the margin
    assert add(made, 240, visit_of(2.95)).letters == "?G??"
    assert add(made, 450, visit_of(2.9)).letters == "?G??"
    assert add(made, 451, visit_of(2.9)).letters == "????"


def test_a_verdict_outlasts_two_measurements_however_far_apart_they_are():
    unsure = Paired(0.014, 0.004, 30)
    made = chronicle()
    assert add(made, 200, visit_of(3.0, alone={0: NOTHING})).letters[0] == "G"
    letters = [add(made, step, visit_of(3.0, alone={0: unsure})).letters[0] for step in (600, 900, 1200)]
    assert letters == ["G", "G", "?"]
    assert add(made, 1300, visit_of(3.0, alone={0: NOTHING})).letters[0] == "G"
    assert add(made, 1301, visit_of(3.05, alone={0: unsure})).letters[0] == "?"  # the loss has risen


def test_a_red_that_lasts_is_yellow_while_the_loss_falls():
    made = chronicle()
    assert add(made, 200, visit_of(3.0, alone={0: MUCH})).letters[0] == "R"
    for step in range(200, 320):
        made.loss(step, 3.0 - 0.02 * (step - 200))
    assert add(made, 320, visit_of(3.0, alone={0: Paired(0.02, 0.004, 30)})).letters[0] == "Y"


def test_an_undecided_block_is_yellow_while_training_gains_more_than_it_could():
    unsure, far = Paired(0.014, 0.004, 30), Paired(0.6, 0.4, 30)
    row = add(chronicle("falling"), 200, visit_of(alone={0: unsure, 1: far}, bounds={2: unsure}))
    assert row.letters == "Y?Y?"  # the loss falls by 1 in the window of its slope; nothing is known of the last block
    assert [v.reason for v in row.verdicts if v.block in (0, 2)] == ["within-progress"] * 2
    assert add(chronicle(), 200, visit_of(alone={0: unsure})).letters == "????"
    assert add(chronicle("falling"), 200, visit_of(alone={0: unsure}), at_fault=True).letters == "????"
    elsewhere = chronicle("falling", in_distribution=False)
    assert add(elsewhere, 200, visit_of(alone={0: unsure})).letters == "????"


@pytest.mark.parametrize(("deviation", "letter"), [(0.01, "?"), (0.05, "Y")])
def test_what_was_settled_by_the_progress_of_training_ends_where_its_slope_leaves_no_room(deviation, letter):
    made = chronicle("falling")
    assert add(made, 200, visit_of(3.0, alone={0: Paired(0.014, 0.004, 30)})).letters == "Y???"
    assert add(made, 210, visit_of(2.9)).letters == "Y???"
    noise = np.random.default_rng(1).normal(scale=deviation, size=200)
    for step in range(211, 411):
        made.loss(step, 1.0 + noise[step - 211])
    assert add(made, 411, visit_of(2.9)).letters == f"{letter}???"
    assert add(made, 460, visit_of(2.9)).letters == "????"  # and at the third that decides nothing


def test_a_green_that_lasts_is_not_settled_again():
    made = chronicle("falling")
    assert add(made, 200, visit_of(3.0, alone={0: NOTHING})).letters == "G???"
    assert add(made, 210, visit_of(3.0, alone={0: Paired(0.008, 0.006, 30)})).letters == "G???"


def test_undecided_blocks_are_refined_before_decided_ones():
    made = chronicle()
    row = add(made, 200, visit_of(alone={0: NOTHING, 1: MUCH, 2: Paired(0.014, 0.004, 30), 3: NOTHING}))
    assert row.letters == "GR?G"
    assert made.wanted_first()[0] == 2


@pytest.mark.parametrize("whole_before", [True, False], ids=["broke in mid-run", "frozen from the start"])
def test_changes_of_other_blocks_follow_one_that_broke_and_are_not_told(whole_before):
    made, healthy = chronicle(), {block: Seen() for block in range(BLOCKS)}
    told = []
    for index in range(16):
        broken = index >= 8 or not whole_before
        seen = healthy | {1: Seen("no-gradient")} if broken else healthy
        energies = (1.0, 1.0, 1.0, 8.0 if index >= 8 else 1.0)
        row = add(made, 200 + index, visit_of(energies=energies), seen=seen)
        told += [event.block for event in row.events if event.kind == "change"]
    assert told == ([] if whole_before else [3])


def test_no_block_is_green_in_a_run_that_is_at_fault_or_worse_than_counting():
    assert add(chronicle(), 200, visit_of(3.0, alone={0: MUCH, 1: NOTHING})).letters == "RG??"
    row = add(chronicle(), 200, visit_of(3.0, alone={0: MUCH, 1: NOTHING}), at_fault=True)
    assert (row.letters, row.events) == ("R???", ())
    assert row.verdicts[1].reason == "run-at-fault"
    assert add(chronicle(), 200, visit_of(3.0, alone={1: NOTHING}), counting=2.9).letters == "????"
    assert add(chronicle(), 200, visit_of(3.0, alone={1: NOTHING}), counting=3.1).letters == "?G??"
    assert add(chronicle(), 200, replace(visit_of(3.0, alone={1: NOTHING}), upper=2.9)).letters == "????"


def test_never_red_before_the_slope_is_known():
    row = add(chronicle(count=10), 10, visit_of(alone={0: MUCH}))
    assert (row.letters[0], row.still_falling, row.slope) == ("Y", None, None)


def test_the_probes_own_loss_serves_where_no_other_is_given():
    made = Chronicle(BLOCKS, margin=None, in_distribution=True)
    for step in range(40):
        row = add(made, step, visit_of(5.0 - 0.02 * step))
    assert row.slope == pytest.approx(-0.02)


def test_equivalent_steps_are_recorded_while_the_loss_falls():
    row = add(chronicle("falling"), 200, visit_of(alone={0: MUCH}))
    (worth,) = [s for s in row.statistics if s.name == "equivalent_steps"]
    assert worth.block == 0
    assert worth.low < worth.value < worth.high
    assert worth.value == pytest.approx(0.05 / -row.slope)
    flat = add(chronicle(), 200, visit_of(alone={0: MUCH}))
    assert not [s for s in flat.statistics if s.name == "equivalent_steps"]


def test_red_is_told_when_it_begins_when_it_has_doubled_and_when_it_ends():
    made, told = chronicle(), {}
    for step in range(200, 1201, 50):
        row = add(made, step, visit_of(alone={2: MUCH if step < 1100 else NOTHING}))
        assert len(row.events) <= 1
        if row.events:
            told[step] = row.events[0]
    assert list(told) == [200, 250, 300, 400, 600, 1000, 1100]
    assert told[200].text.startswith("block 2 turned red: 0.0500 [0.0419, 0.0581] nats recoverable, ")
    assert told[600].text.startswith("block 2 red for 400 steps")
    assert told[1100].kind == "no-longer-red"


def test_red_is_told_again_after_it_had_ended_and_once_at_one_step():
    made = chronicle()
    told = [
        len(add(made, step, visit_of(alone={2: gain})).events)
        for step, gain in ((200, MUCH), (200, MUCH), (210, NOTHING), (220, MUCH), (221, MUCH), (222, MUCH))
    ]
    assert told == [1, 0, 1, 1, 0, 1]


def test_an_event_says_what_else_is_known_of_the_block():
    seen = {2: Seen("frozen"), 3: Seen(None, 0.01)}
    row = add(chronicle(), 200, visit_of(alone={2: MUCH, 3: MUCH}), seen=seen)
    assert ["frozen" in row.events[0].suggestion, "learning rate is 0.01" in row.events[1].suggestion] == [True, True]


def test_verdict_rows_only_where_one_changes():
    made = chronicle()
    first = add(made, 200, visit_of(alone={0: MUCH}))
    change = first.verdicts[0]
    assert (change.block, change.colour, change.measured_step) == (0, "red", 200)
    assert len(first.verdicts) == BLOCKS
    assert add(made, 210, visit_of()).verdicts == ()
    (change,) = add(made, 220, visit_of(alone={1: NOTHING})).verdicts
    assert (change.block, change.colour, change.measured_step) == (1, "green", 220)


@pytest.mark.parametrize(("losses", "letters"), [("flat", "RR?"), ("falling", "YYY")])
def test_a_red_lasts_until_training_has_gained_as_much_and_yellow_while_it_goes_on(losses, letters):
    made = chronicle(losses)
    first = add(made, 200, visit_of(3.0, alone={0: MUCH}))
    later = [add(made, step, visit_of(loss)) for step, loss in ((210, 2.96), (220, 2.94))]
    assert "".join(row.letters[0] for row in (first, *later)) == letters


def test_foreign_text_needs_a_block_that_stands_out():
    row = add(chronicle(in_distribution=False), 200, visit_of(alone=dict.fromkeys(range(BLOCKS), MUCH)))
    assert row.letters == "YYYY"


def test_the_clouds_edges_are_those_of_the_reference_without_blocks_and_of_the_composed_witness():
    def edges(made, measured):
        return {s.name: s for s in add(made, 200, measured).statistics if s.name.startswith("bound")}

    made, joint = chronicle(), replace(visit_of(3.0), kind="joint", composed=MUCH, upper=3.4)
    assert edges(made, visit_of()) == {}
    found = edges(made, joint)
    assert all(edge.block == WHOLE_MODEL for edge in found.values())
    assert (found["bound_upper"].value, found["bound_upper"].low) == (3.4, None)
    lower, gain = found["bound_lower"], MUCH.interval()
    assert lower.value == pytest.approx(2.95)
    assert (3.0 - lower.high, 3.0 - lower.low) == (pytest.approx(gain.low), pytest.approx(gain.high))
    assert list(edges(made, visit_of(2.9))) == ["bound_upper"]  # as last measured; the lower one is the model's own
    worse = edges(made, replace(joint, composed=Paired(-0.05, 0.004, 40)))["bound_lower"]
    none = edges(made, replace(joint, composed=None, upper=None))
    assert [(e.value, e.low, e.high) for e in (worse, none["bound_lower"])] == [(3.0, 3.0, 3.0)] * 2
    assert none["bound_upper"].value == 3.4


def test_statistics_against_their_own_history():
    made = chronicle()
    for step in range(0, 100, 10):
        row = add(made, step, visit_of(energies=(2.0**-step, 1.0, 1.0, 3.0 if step == 90 else 1.0)))
    found = {(s.name, s.block): s for s in row.statistics}
    assert found["energy", 0].to_trend == pytest.approx(1.0)
    assert found["energy", 0].to_median < 0.01
    assert found["energy", 3].to_median == pytest.approx(3.0)
    assert found["gradient_norm", 3].to_trend == pytest.approx(3.0**0.5)


@pytest.mark.parametrize("factor", [1.0, 4.0, 0.2])
def test_a_change_of_level_is_told_once_with_its_date(factor):
    made, draw, told = chronicle(), np.random.default_rng(0), []
    for step in range(0, 300, 10):
        energies = np.exp(0.05 * draw.normal(size=BLOCKS)) * (0.5 if step > 150 else 1.0)  # all fall together
        energies[1] *= factor if step >= 200 else 1.0
        told += add(made, step, visit_of(energies=energies)).events
    if factor == 1.0:  # the control
        assert told == []
    else:
        (event,) = told
        assert (event.kind, event.block, event.since_step, event.step) == ("change", 1, 200, 210)
        assert "between steps 190 and 200" in event.text
        assert ("rose" if factor > 1 else "fell") in event.text


@pytest.mark.parametrize(
    ("probe", "options", "kinds"),
    [
        (1.8, {}, ["losses-disagree"]),
        (4.5, {}, ["losses-disagree"]),
        (3.0, {}, []),  # the control
        (4.5, {"in_distribution": False}, []),  # other text costs more
        (1.8, {"in_distribution": False}, ["losses-disagree"]),
    ],
)
def test_losses_that_disagree_by_far_are_told_once(probe, options, kinds):
    made, told = chronicle(**options), []
    for step in range(100, 200, 20):
        told += add(made, step, visit_of(probe)).events
    assert [event.kind for event in told] == kinds
    assert all("Usual causes" in event.suggestion and event.step == 140 for event in told)


def test_differences_that_are_no_numbers_count_as_not_measured():
    made, lost = chronicle(), Paired(float("nan"), float("nan"), 40)
    row = add(made, 200, visit_of(alone={0: MUCH, 1: lost}, unique={2: lost, 3: NOTHING}))
    assert row.letters == "R???"
    assert all(np.isfinite(s.value) for s in row.statistics)
    (event,) = [event for event in row.events if event.kind == "gains-not-finite"]
    assert "(block 1, block 2)" in event.text
    assert add(made, 210, visit_of(alone={1: MUCH})).letters == "RR??"
    assert "gains-not-finite" not in [event.kind for event in add(chronicle(), 200, visit_of(alone={0: MUCH})).events]


def test_frozen_blocks_have_no_colour_and_are_not_refined():
    made = chronicle(frozen=frozenset({1, 2}))
    assert add(made, 200, visit_of(alone={0: MUCH, 3: NOTHING})).letters == "RFFG"
    assert sorted(made.wanted_first()) == [0, 3]
    made.frozen = frozenset({2})
    assert add(made, 210, visit_of()).letters == "R?FG"


@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_changes_of_level_are_dated_beside_frozen_blocks(factor):
    made, draw, told = chronicle(frozen=frozenset({0})), np.random.default_rng(0), []
    for step in range(0, 300, 10):
        energies = np.exp(0.05 * draw.normal(size=BLOCKS)).tolist()
        energies[2] *= factor if step >= 200 else 1.0
        told += add(made, step, visit_of(energies=(None, *energies[1:]))).events
    assert [(event.kind, event.block) for event in told] == ([] if factor == 1.0 else [("change", 2)])


def test_what_was_seen_behind_a_step_that_training_goes_back_to_is_forgotten():
    made, plain = chronicle(count=300), chronicle(count=100)
    add(plain, 90, visit_of(alone={1: NOTHING}))
    add(made, 90, visit_of(alone={1: NOTHING}))
    for step in range(150, 300, 10):
        row = add(made, step, visit_of(alone={0: MUCH, 3: MUCH}))
    assert row.letters[0] == row.letters[3] == "R"
    made.forget_from(100)
    found, expected = (add(each, 100, visit_of(alone={2: NOTHING})) for each in (made, plain))
    # As if it had never been there; but for the verdicts, which the history has to take back.
    assert replace(found, verdicts=()) == replace(expected, verdicts=())
    assert [(verdict.block, verdict.colour) for verdict in found.verdicts] == [(0, "grey"), (2, "green"), (3, "grey")]


def test_blocks_are_refined_in_turn_and_changed_ones_first():
    made = chronicle()
    add(made, 0, visit_of(energies=(1.0, 4.0, 2.0, 3.0)))
    assert made.wanted_first() == [1, 3, 2, 0]
    add(made, 10, visit_of(alone={1: NOTHING, 3: NOTHING}))
    add(made, 20, visit_of(alone={2: NOTHING, 0: NOTHING}))
    assert made.wanted_first() == [1, 3, 0, 2]
    for step in range(30, 300, 10):
        add(made, step, visit_of(energies=(1.0, 1.0, 1.0 if step < 200 else 9.0, 1.0)))
    assert made.wanted_first() == [2, 1, 3, 0]


def test_a_slope_that_leaves_no_room_makes_green_what_was_not_refined():
    made = chronicle()
    row = add(made, 200, visit_of(bounds={0: MUCH, 1: NOTHING}))
    assert row.letters == "?G??"
    assert [v.reason for v in row.verdicts if v.block == 1] == ["screened"]
    assert {(s.name, s.block) for s in row.statistics if s.low is not None} == {("first_order", 0), ("first_order", 1)}
    assert made.wanted_first()[-1] == 1


def test_a_later_slope_outdoes_an_earlier_gain_only_where_it_leaves_no_room():
    made = chronicle()
    assert add(made, 200, visit_of(alone={0: MUCH, 1: MUCH})).letters == "RR??"
    assert add(made, 210, visit_of(bounds={0: NOTHING, 1: MUCH})).letters == "GR??"
    assert add(made, 220, visit_of(alone={0: MUCH})).letters == "RR??"


def test_an_undecided_block_says_how_many_tokens_would_decide_it_and_when_they_are_paid():
    made = chronicle()
    near, nearer = Paired(0.010, 0.004, 40), Paired(0.012, 0.004, 40)  # the margin is 0.015
    row = add(made, 200, visit_of(alone={0: near, 1: nearer, 2: MUCH}), pace=Pace(16, 0.01, 0.1))
    assert row.letters == "??R?"
    found = {(s.name, s.block): s.value for s in row.statistics if s.name.endswith("to_decide")}
    # As many as bring 2.5 standard errors down to the distance from the margin: 40 (2.5 0.004 / 0.005)^2 = 160.
    assert found["tokens_to_decide", 0] == pytest.approx(160 * 16, rel=0.01)
    assert found["seconds_to_decide", 0] == pytest.approx(160 * 16 * 0.01 / 0.1, rel=0.01)
    assert found["tokens_to_decide", 1] > found["tokens_to_decide", 0]
    assert not {block for _, block in found} & {2, 3}  # decided; never measured
    assert made.wanted_first() == [3, 0, 1, 2]


def test_what_is_held_already_needs_not_be_paid_again():
    pace = Pace(tokens=10, seconds=0.5, budget=0.03)
    assert missing(100, 0, pace) == (1000, pytest.approx(1000 * 0.5 / 0.03))
    assert missing(100, 60, pace) == (1000, pytest.approx(400 * 0.5 / 0.03))
    assert missing(100, 120, pace) == (1000, 0)
    assert missing(100, 0, Pace(10, 0.5, None)) == (1000, None)
