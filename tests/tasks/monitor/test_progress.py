"""Verdicts beside what training is about to gain by itself."""

import pytest

from peelwise.evidence.trends import Slope
from peelwise.evidence.verdict import Verdict
from peelwise.records.base import Interval
from peelwise.tasks.monitor.progress import unless_soon, within_progress

OPEN, RED = Verdict("grey", "more-tokens"), Verdict("red", "above-margin")
STEADY = Slope(-2e-4, -3e-4, -1e-4, 200)  # falls by 0.02 to 0.06 in its window


def gain(low, high):
    return Interval(
        mean=(low + high) / 2, low=low, high=high, standard_error=1e-3, sequences=30, skewness=0.0, method="student-t"
    )


@pytest.mark.parametrize(("high", "colour"), [(0.019, "yellow"), (0.021, "grey")])
def test_an_undecided_block_is_yellow_where_the_loss_surely_falls_by_more_than_it_may_gain(high, colour):
    assert within_progress(OPEN, gain(0.0, high), STEADY).colour == colour


@pytest.mark.parametrize("slope", [Slope(-2e-4, -5e-4, 1e-5, 200), Slope(2e-4, 1e-4, 3e-4, 200)])
def test_a_loss_that_is_not_shown_to_fall_settles_nothing(slope):
    assert within_progress(OPEN, gain(0.0, 1e-4), slope) == OPEN


@pytest.mark.parametrize(
    "verdict",
    [
        RED,
        Verdict("green", "nothing-above-margin"),
        Verdict("grey", "marginal-only"),
        Verdict("grey", "more-tokens", interaction=True),
    ],
)
def test_what_is_decided_or_known_to_be_above_the_margin_stays(verdict):
    assert within_progress(verdict, gain(0.0, 1e-4), STEADY) == verdict


@pytest.mark.parametrize(("low", "colour"), [(0.014, "yellow"), (0.016, "red")])
def test_a_red_stays_unless_training_may_make_up_for_it_in_a_quarter_of_the_window(low, colour):
    assert unless_soon(RED, gain(low, 0.2), STEADY).colour == colour
