"""The benchmark of diagnoses: are its figures what they are called, and its faults at fault?"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks" / "truth"))

import cases
import figures
import training


def row(block, scores, *, errors=None, cost=0.5, family="f", group="after training", rivals=None):
    return {
        "name": "case",
        "family": family,
        "group": group,
        "block": block,
        "cost_of_fault": None if block is None else {"mean": cost, "low": 0.9 * cost, "high": 1.1 * cost},
        "own": {
            "loss": 2.0,
            "verdicts": ["red"] + ["green"] * (len(scores) - 1),
            "scores": {"unique": scores},
            "errors": {"unique": errors} if errors else {},
            "seconds": {"losses of the model as it stands": 1.0, "leaving one block out": 2.0},
        },
        "rivals": rivals or {},
    }


def test_first_tied_and_near_are_three_different_things():
    scores = [0.0, 1.0, 0.9, 0.1]
    assert figures.is_first(scores, 1)
    assert not figures.is_first(scores, 2)
    assert figures.is_near(scores, 2)
    assert not figures.is_near(scores, 3)
    assert not figures.is_tied(scores, None, 2)
    assert figures.is_tied(scores, [0.1] * 4, 2)
    assert not figures.is_tied(scores, [0.1] * 4, 3)


def test_a_score_that_calls_all_alike_names_nobody():
    same = [1.0] * 4
    assert not figures.is_first(same, 2)
    assert not figures.is_tied(same, None, 2)
    assert not figures.is_near(same, 0)
    assert figures.share_below(same, 2) == 0.5


def test_the_area_counts_the_blocks_below():
    assert figures.share_below([3.0, 2.0, 1.0], 0) == 1.0
    assert figures.share_below([3.0, 2.0, 1.0], 1) == 0.5
    assert figures.share_below([3.0, 2.0, 1.0], 2) == 0.0


def test_what_costs_nothing_is_no_fault():
    assert figures.is_fault(row(1, [0.0, 1.0]))
    assert not figures.is_fault(row(1, [0.0, 1.0], cost=0.005))
    assert not figures.is_fault(row(None, [0.0, 1.0]))


def test_localisation_counts_right_and_wrong_cases_and_compares_with_rivals_on_the_same():
    rival = {"norm": {"scores": [9.0, 0.0, 0.0], "seconds": 4.0}, "absent": {"scores": None, "seconds": 0.0}}
    found = figures.localisation([row(1, [0.0, 5.0, 1.0], rivals=rival), row(2, [0.0, 5.0, 1.0], rivals=rival)])
    assert found.keys() == {"peelwise: unique", "norm"}
    assert found["peelwise: unique"]["first"] == 0.5
    assert found["peelwise: unique"]["within_one"] == 1.0
    assert found["norm"]["first"] == 0.0
    assert found["norm"]["cases"] == 2


def test_intervals_agree_with_fresh_text_as_often_as_they_should():
    generator = torch.Generator().manual_seed(0)
    errors = torch.randn(4000, 2, generator=generator).double() * torch.tensor([0.01, 0.004])
    fresh = [
        {"what": "alone", "low": a - 0.0196, "high": a + 0.0196, "fresh": b, "fresh_error": 0.004, "verdict": "red"}
        for a, b in (0.1 + errors).tolist()
    ]
    found = figures.coverage(fresh)["alone"]
    assert found["covered"] == pytest.approx(0.95, abs=0.012)
    assert found["fresh_below"] == pytest.approx(0.5, abs=0.03)


def test_red_that_fresh_text_does_not_bear_out_is_counted():
    fresh = [
        {"what": "alone", "low": 0.05, "high": 0.1, "fresh": gain, "fresh_error": 0.001, "verdict": "red"}
        for gain in (0.07, 0.0)
    ]
    found = figures.verdicts([row(None, [0.0, 1.0, 2.0]) | {"fresh": fresh}])
    assert found["colours"] == {"red": 1, "green": 2}
    assert found["red"] == {"checked": 2, "wrong": 1}


def test_a_bump_stands_out_against_its_neighbours_where_the_trend_hides_it():
    falling = [16.0, 8.0, 4.0, 2.0, 2.0, 0.5, 0.25]
    assert max(range(7), key=lambda i: falling[i]) == 0
    over = figures.against_depth(falling)
    assert max(range(2, 7), key=lambda i: over[i]) == 4
    assert figures.against_depth([0.0, -1.0, 3.0, 0.0])[2] == pytest.approx(3.0)


def test_history_compares_with_the_healthy_model_of_the_same_stage():
    healthy = row(None, [8.0, 1.0, 1.0], group="healthy") | {"seed": 1, "step": 2}
    damaged = row(1, [8.0, 3.0, 1.0]) | {"seed": 1, "step": 2}
    elsewhere = row(1, [8.0, 3.0, 1.0]) | {"seed": 9, "step": 2}
    (found,) = figures.with_history([healthy, damaged, elsewhere])
    assert figures.scores_of(found) == {"peelwise: unique": [1.0, 3.0, 1.0]}


def test_cases_have_names_of_their_own():
    names = [case.name for case in cases.all_cases()]
    assert len(set(names)) == len(names)
    assert not any(set(name) & set("/ \\:") for name in names)


@pytest.fixture(scope="module")
def stream():
    return torch.randint(0, training.RECIPE.vocabulary, (4000,), generator=torch.Generator().manual_seed(1))


def block_after(fault, stream, steps=2):
    """Return the parameters of block 1 before and after some steps of training."""
    settings = replace(training.RECIPE, width=16, heads=2, key_value_heads=1, mlp_width=16, blocks=2, batch=2)
    model = training.new_model(settings)
    block = model.model.layers[1]
    if fault.begin is not None:
        fault.begin(block)
    before = [p.detach().clone() for p in block.parameters()]
    optimizer = training._optimizer(model, block, settings, fault)
    for step in range(training.AT_FAULT_FROM, training.AT_FAULT_FROM + steps):
        training._step(model, block, optimizer, fault, settings, step, stream)
    return before, [p.detach() for p in block.parameters()]


def moved(before, after):
    return sum(float((a - b).norm()) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("fault", training.FAULTS, ids=lambda fault: fault.name)
def test_every_fault_changes_how_its_block_trains(fault, stream):
    healthy = moved(*block_after(training.Fault("none"), stream))
    before, after = block_after(fault, stream)
    distance = moved(before, after)
    if fault.name in ("frozen", "left out of the optimiser"):
        assert distance == 0.0
    elif fault.name in ("learning rate / 30", "gradients clipped to nothing"):
        assert 0 < distance < 0.2 * healthy
    elif fault.name == "weights kept in float8":
        assert all(torch.equal(p, p.to(torch.float8_e4m3fn).float()) for p in after)
    else:
        fresh, _ = block_after(training.Fault("none"), stream)
        assert distance != pytest.approx(healthy, rel=0.01) or moved(fresh, before) > 1.0
