"""Suggestions name an action only where a result file says that it helped in such a case."""

import json
import re
from pathlib import Path

import pytest

from peelwise.evidence import events
from peelwise.evidence.actions import CASES, MEASURED, PAGE, helpful, suggestion
from peelwise.evidence.events import Change, Finding, Seen, red_advice, wrong

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
ACTION = re.compile(
    r"drawing|anew|re-init|larger learning rate|lower the|raise|clip less|apply|witness|may help|may bring"
)


def helped(row):
    """Return whether a result file says that an arm was better at equal cost, over seeds."""
    arms = json.loads((RESULTS / row.result).read_text())["arms"]
    if row.result == "mended_block.json":
        found = arms[row.arm]["at_equal_cost"]
        control = arms[row.control]["at_equal_cost"]["mean"] if row.control else 0.0
        everywhere = found["better_on_seeds"] == len(found["per_seed"]) >= 3
        return found["high"] < 0 and everywhere and found["mean"] < control
    found = next(each for each in arms if each["arm"] == row.arm)["against_uniform"]
    return found["high"] < 0


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: f"{row.case}-{row.arm}")
def test_a_row_says_what_its_result_file_says(row):
    assert helped(row) == row.helps


def test_the_best_is_named_first():
    arms = json.loads((RESULTS / "mended_block.json").read_text())["arms"]
    means = [arms[row.arm]["at_equal_cost"]["mean"] for row in helpful("damaged-block")]
    assert means == sorted(means)


def test_a_suggestion_names_what_helped_and_links_to_a_section_that_there_is():
    said = suggestion("damaged-block")
    for row in MEASURED:
        assert bool(row.words and row.words in said) == (row.case == "damaged-block" and row.helps)
    page = (ROOT / PAGE).read_text()
    anchors = {re.sub(r"[^a-z0-9 -]", "", line.strip("# ").lower()).replace(" ", "-")
               for line in page.splitlines() if line.startswith("#")}  # fmt: skip
    assert {row.section for row in MEASURED} <= anchors
    assert suggestion("healthy-training") == ""
    assert set(CASES) == {row.case for row in MEASURED}


def test_no_advice_names_an_action_that_is_not_from_the_table():
    dead, rise = Finding("dead-units", ("out",), (7,), 16, 3), Change("energy", 2.34, 380, 400)
    seen = [Seen(), Seen("frozen"), Seen(None, 0.1), Seen(None, 1.0, rise), Seen(None, 1.0, None, dead),
            Seen(None, 1.0, None, None, 1.0)]  # fmt: skip
    said = [red_advice(each) for each in seen]
    said += [wrong(1, Finding(kind, ("a",), (0,), 4, 2)).suggestion for kind in events._ADVICE if kind != "still-zero"]
    said += [events.codes_still(1, 0, 3).suggestion, events.dead_rows(1, 0, 3, "out").suggestion]
    measured = suggestion("damaged-block")
    assert sum(measured in each for each in said) == 2  # where no cause was seen, and where something passed
    assert ACTION.search(measured)  # the pattern finds those that there are
    for each in said:
        assert not ACTION.search(each.replace(measured, "")), each
