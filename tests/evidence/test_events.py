"""What a monitor says: no more than was seen."""

from typing import get_args

import pytest

from peelwise.evidence.events import (
    Change,
    Complaint,
    Finding,
    Seen,
    changed,
    few_tokens,
    red_advice,
    wrong,
)
from peelwise.evidence.intervals import Paired
from peelwise.evidence.reds import RedBlock, no_longer_red, turned_red
from peelwise.evidence.trends import EquivalentSteps
from peelwise.records.base import note

GAIN = Paired(0.031, 0.002, 20).interval()


def red(worth=None, *, since=100, measured=500, seen=None):
    return turned_red(500, 7, RedBlock(GAIN, worth, measured, seen or Seen()), since=since)


def test_how_long_how_much_and_what_it_is_worth():
    event = red(EquivalentSteps(912.0, 700.0, 1100.0))
    assert event.text == "block 7 red for 400 steps: 0.0310 [0.0268, 0.0352] nats recoverable, worth 910 steps."
    assert (event.level, event.kind, event.block, event.since_step) == ("alert", "red", 7, 100)
    assert str(event).startswith("step 500: block 7 red for 400 steps")


@pytest.mark.parametrize(
    ("worth", "words"),
    [
        (None, "with a loss that is not shown to fall."),
        (EquivalentSteps(None, None, None), "with a loss that is not shown to fall."),
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
        (Seen("frozen", 0.1, RISE), "It has frozen parameters; check whether that is meant."),
        (Seen(None, 0.1, RISE), "Its learning rate is 0.1 of the other blocks'; check whether that is meant."),
        (Seen(None, 1.0, RISE), "Its input-whitened score rose 2.3 times around step 400: look at"),
        (Seen(None, 1.0, Change("energy", 0.4, 380, 400)), "No cause was seen."),
        (
            Seen(None, 1.0, RISE, Finding("dead-units", ("out",), (7,), 16, 3)),
            "3 of 16 outputs of out get no gradient. Usual causes:",
        ),
        (Seen(None, 1.0, None, None, 0.9999), "The norm of all gradients was 1 at every check of late, as clipping"),
        (Seen(None, 1.0, RISE, None, 1.0), "rose 2.3 times around step 400"),
        (Seen(None, None), "docs/actions.md#a-block-that-was-damaged"),
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


@pytest.mark.parametrize("kind", get_args(Complaint))
def test_every_complaint_has_a_sentence_and_a_suggestion(kind):
    event = wrong(5, Finding(kind, ("a", "b", "c", "d"), (0,), 9, 3))
    assert (event.kind, event.block, event.level == "alert") == (kind, 0, kind == "non-finite")
    assert event.text.endswith(".")
    assert "a, b, c, .." in event.text
    assert event.suggestion.endswith(".")


def test_few_tokens_are_told_with_their_numbers():
    values = {"layer": "up", "tokens": 21, "inputs": 48, "rank": 20}
    assert "21 fit tokens are few for the 48 inputs of up" in few_tokens(3, note("few-fit-tokens", **values)).text
    assert (
        "damping 0.1 instead of 0"
        in few_tokens(3, note("more-damping", layer="up", size=4, damping=0.0, used=0.1)).text
    )
