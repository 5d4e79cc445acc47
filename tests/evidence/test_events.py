"""What a monitor says: no more than was seen."""

import pytest

from peelwise.evidence.events import Change, Seen, changed, no_longer_red, red_advice, turned_red
from peelwise.evidence.intervals import Paired
from peelwise.evidence.trends import EquivalentSteps

GAIN = Paired(0.031, 0.002, 20).interval()


def red(worth=None, *, since=100, measured=500, seen=None):
    return turned_red(500, 7, GAIN, worth, since=since, measured=measured, seen=seen or Seen())


def test_how_long_how_much_and_what_it_is_worth():
    event = red(EquivalentSteps(912.0, 700.0, 1100.0))
    assert event.text == "block 7 red for 400 steps: 0.031 +- 0.004 nats recoverable, worth 910 steps."
    assert (event.level, event.kind, event.block, event.since_step) == ("alert", "red", 7, 100)
    assert str(event).startswith("step 500: block 7 red for 400 steps")


@pytest.mark.parametrize(
    ("worth", "words"),
    [
        (None, "with a loss that is not moving."),
        (EquivalentSteps(None, None, None), "with a loss that is not moving."),
        (EquivalentSteps(None, 1234.0, None), "worth 1,200 steps or more."),
        (EquivalentSteps(3.21, 2.0, 5.0), "worth 3.2 steps."),
    ],
)
def test_worth_is_never_more_than_the_slope_says(worth, words):
    assert red(worth).text.endswith(words)


def test_when_it_was_measured_is_said_where_it_is_not_now():
    assert red(since=500).text.startswith("block 7 turned red: ")
    assert red(measured=350).text.endswith("(measured at step 350).")


RISE = Change("energy", 2.34, 380, 400)


@pytest.mark.parametrize(
    ("seen", "words"),
    [
        (Seen("has frozen parameters", 0.1, RISE), "It has frozen parameters; see whether that is meant."),
        (Seen("", 0.1, RISE), "Its learning rate is 0.1 of the other blocks'; raise it."),
        (Seen("", 1.0, RISE), "Its input-whitened score rose 2.3 times around step 400: look at"),
        (Seen("", 1.0, Change("energy", 0.4, 380, 400)), "No cause was seen."),
        (
            Seen("", 1.0, RISE, "3 of 16 outputs of out got no gradient"),
            "3 of 16 outputs of out got no gradient; re-init",
        ),
        (Seen("", 1.0, None, "", 0.9999), "The norm of all gradients was 1 at every check of late, as clipping"),
        (Seen("", 1.0, RISE, "", 1.0), "rose 2.3 times around step 400"),
        (Seen("", None), "which of them does was not measured."),
    ],
)
def test_advice_fits_what_was_seen(seen, words):
    assert words in red_advice(seen)
    assert red(seen=seen).suggestion == red_advice(seen)


def test_changes_are_dated():
    up, down = changed(420, 3, RISE), changed(420, 3, Change("gradient_norm", 0.5, 380, 400))
    assert up.text == (
        "block 3: its input-whitened score rose 2.3 times between steps 380 and 400, against what all blocks did, "
        "and stays there."
    )
    assert "gradient norm fell 2.0 times" in down.text
    assert (up.level, up.kind, up.since_step) == ("warning", "change", 400)


@pytest.mark.parametrize(
    ("colour", "words"), [("green", "nothing above"), ("yellow", "falling again"), ("grey", "undecided")]
)
def test_no_longer_red(colour, words):
    event = no_longer_red(600, 7, colour, 100)
    assert words in event.text
    assert (event.level, event.since_step) == ("info", 100)
