"""The tables of docs/actions.md are those that benchmarks/actions makes from its result file."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def render():
    spec = importlib.util.spec_from_file_location("actions_render", ROOT / "benchmarks" / "actions" / "render.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_page_is_made_from_the_result_file(render):
    result, page = json.loads(render.FILE.read_text()), render.PAGE.read_text()
    assert render.filled(page, result) == page
    changed = json.loads(render.FILE.read_text())
    changed["arms"][0]["held_out"][0] += 1.0
    assert render.filled(page, changed) != page


def test_an_arm_is_judged_against_uniform_and_its_control_by_pairs(render):
    def run(arm, seed, losses, rate=1.0, budget=1.0, **other):
        mean = sum(losses) / len(losses)
        curve = [{"step": 1, "seconds": 5.0, "held_out": mean + 0.5}, {"step": 2, "seconds": 10.0, "held_out": mean}]
        return {"arm": arm, "rate": rate, "seed": seed, "budget": budget, "steps": 2, "block_steps": [2, 2],
                "processor_seconds": 10.0, "wall_seconds": 10.0, "held_out": mean, "by_window": losses, "curve": curve,
                "factors": []} | other  # fmt: skip

    own = "growth by importance"
    rows = []
    for seed in (11, 12):
        rows += [run("uniform", seed, [3.0, 2.0, 1.0]), run("uniform", seed, [3.5, 2.4, 1.6], budget=0.8)]
        rows += [run(own, seed, [2.9, 1.7, 0.5]), run(own, seed, [2.9, 1.9, 0.9 if seed == 11 else 1.5], budget=0.8)]
        rows += [run("growth by shuffled importance", seed, [2.8, 1.8, 0.8])]
    rows += [run(arm, 1, [loss], rate=rate) for arm in (own, "uniform", "growth by shuffled importance")
             for rate, loss in ((0.5, 3.0), (1.0, 2.0), (2.0, 2.5))]  # fmt: skip
    rows.append(run("unfinished", 11, [0.0, 0.0, 0.0]))
    rows.append(run("unfinished", 1, [0.0], rate=1.0))
    found = {each["arm"]: each for each in render.summary(rows, [11, 12])}
    assert set(found) == {"uniform", own, "growth by shuffled importance"}
    assert found[own]["rate"] == 1.0
    assert not found[own]["rate_at_end_of_grid"]
    assert found[own]["against_uniform"]["mean"] == pytest.approx(-0.3)
    assert found[own]["against_uniform"]["per_seed"][0]["low"] == pytest.approx(-0.797, abs=1e-3)  # t of 2 degrees
    against = render.against_controls(list(found.values()))
    assert [(each["arm"], each["control"]) for each in against] == [(own, "growth by shuffled importance")]
    assert against[0]["mean"] == pytest.approx(-0.1)
    assert against[0]["per_seed"] == pytest.approx([-0.1, -0.1])
    # its own curve falls from 2.2 after one step to 1.7 after two: uniform's 2.0 after 1.4
    assert found[own]["share_of_budget_to_uniform"][0] == pytest.approx(0.7)
    assert found["uniform"]["share_of_budget_to_uniform"] == [1.0, 1.0]
    assert render.reaching(list(found.values())) == []  # at 0.8 of the budget on one of two seeds
    for row in rows:
        if row["arm"] == own and row["seed"] == 12 and row["budget"] == 0.8:
            row["by_window"] = [2.9, 1.9, 0.9]
    assert render.reaching(render.summary(rows, [11, 12])) == [own]


def test_an_arm_on_record_stays_beside_new_ones_only_if_uniform_is_what_it_was(render):
    def run(arm, seed, loss):
        curve = [{"step": 1, "seconds": 5.0, "held_out": loss}]
        return {"arm": arm, "rate": 1.0, "seed": seed, "budget": 1.0, "steps": 2, "block_steps": [2, 2], "curve": curve,
                "processor_seconds": 10.0, "wall_seconds": 10.0, "held_out": loss, "factors": [],
                "by_window": [loss - 0.1, loss + 0.1]}  # fmt: skip

    def rows(arm, loss):
        return [run(arm, seed, loss) for seed in (1, 11, 12)]

    before = render.summary(rows("uniform", 2.0) + rows("old", 1.9), [11, 12])
    both = render.summary(rows("uniform", 2.0005) + rows("new", 1.8), [11, 12], before)
    assert [each["arm"] for each in both] == ["uniform", "old", "new"]
    assert both[1] == before[1]
    assert both[2]["against_uniform"]["mean"] == pytest.approx(-0.2005)
    with pytest.raises(SystemExit, match="nats from its record"):
        render.summary(rows("uniform", 2.01) + rows("new", 1.8), [11, 12], before)
    # its rate is on record: it need not be tuned again
    known = render.summary(rows("uniform", 2.0) + [run("old", seed, 1.7) for seed in (11, 12)], [11, 12], before)
    assert known[1]["held_out"] == [1.7, 1.7]
    assert known[1]["grid"] == before[1]["grid"]


def test_controls_are_those_of_the_arms(render):
    assert render.controls_of("map [1, 5] by Hill alpha")[0] == "constant at the mean of the map by Hill alpha"
    assert "map [1, 5] by permutation" in render.controls_of("map [1, 5] by Hill alpha")
    assert render.controls_of("map [1, 5] by permutation") == ()
    assert render.controls_of("uniform") == ()
    sys.path.insert(0, str(ROOT / "benchmarks" / "actions"))
    try:
        from arms import ARMS
    finally:
        sys.path.pop(0)
    names = {arm.name for arm in ARMS}
    assert {control for name in names for control in render.controls_of(name)} <= names
    assert set(render.CONTROLS) <= names
