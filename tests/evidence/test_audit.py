"""Words and flags follow from numbers; that forged records are found is in test_certificate.py."""

import pytest

from peelwise.evidence.audit import conclusion, contradictions, informative, tokens_needed
from peelwise.evidence.verdict import Verdict
from peelwise.records.audit import BlockRecord, LossRecord
from peelwise.records.base import Interval
from show.sample import whole

MARGIN = 0.01


def interval(mean, half=0.01):
    return Interval(
        mean=mean, low=mean - half, high=mean + half, standard_error=half / 2, sequences=9, method="student-t"
    )


def blocks(colours, measured=True):
    alone = interval(0.02) if measured else None
    return tuple(
        BlockRecord(index=i, name=f"layers.{i}", verdict=colour, reason="", recoverable_nats=alone)
        for i, colour in enumerate(colours)
    )


SENTENCES = {
    "one red": (blocks(["grey", "red", "yellow"]), "1 of 3 blocks certified under-optimised (block 1)."),
    "two red": (blocks(["red", "red"]), "2 of 2 blocks certified under-optimised (blocks 0, 1)."),
    "many red": (blocks(["red"] * 8), "8 of 8 blocks certified under-optimised (blocks 0, 1, 2, 3, 4, 5, ...)."),
    "yellow": (
        blocks(["yellow", "grey"]),
        "No block is certified under-optimised; 1 of 2 have recoverable loss on this text.",
    ),
    "none": (
        blocks(["grey", "green"]),
        "None found: of 2 blocks refined alone (of 2), none is shown to have more than 0.010 nats per token "
        "to recover.",
    ),
    "unmeasured": (blocks(["grey"], measured=False), "No verdict yet: no block was refined alone within the budget."),
}


@pytest.mark.parametrize(("found", "sentence"), SENTENCES.values(), ids=SENTENCES)
def test_the_conclusion_says_what_was_found_and_no_more(found, sentence):
    assert conclusion(found, None, MARGIN) == sentence
    together = conclusion(found, interval(0.25), MARGIN)
    assert together == (
        f"{sentence} Refined together, the blocks win back 0.250 nats per token (95 % interval 0.240 to 0.260)."
    )


def test_the_conclusion_names_the_blocks_without_which_the_model_is_better():
    removals = [interval(x) for x in (0.4, -0.2, 0.0, -0.3, -0.005)]
    found = tuple(b.model_copy(update={"removal_nats": r}) for b, r in zip(blocks(["grey"] * 5), removals, strict=True))
    harm = " The model is better without block 3 (0.300 nats per token), without block 1 (0.200 nats per token)."
    assert conclusion(found, None, MARGIN) == conclusion(blocks(["grey"] * 5), None, MARGIN) + harm


def told(alone, unique, colour="red"):
    return tuple(
        BlockRecord(index=i, name="", verdict=colour, reason="", recoverable_nats=interval(a), unique_nats=interval(u))
        for i, (a, u) in enumerate(zip(alone, unique, strict=True))
    )


def test_the_conclusion_points_at_the_block_to_look_at_first():
    found = told([0.1, 0.3, 0.31, 0.1], [0.2, 0.0, 0.0, 0.0])
    on_training_text = conclusion(found, None, MARGIN, in_distribution=True)
    assert on_training_text.endswith(" Look first at block 2 (what it gains alone: 0.310; not told apart: 1).")
    elsewhere = conclusion(found, None, MARGIN, in_distribution=False)
    assert elsewhere.endswith(" Look first at block 0 (what only it can give: 0.200).")


@pytest.mark.parametrize(
    "found",
    [told([0.3] * 4, [0.3] * 4), told([0.3, 0.3], [0.3, 0.3]), told([0.9, 0, 0], [0.9, 0, 0], "grey")],
    ids=["many alike", "all alike", "no verdict"],
)
def test_where_nothing_sticks_out_it_points_nowhere(found):
    assert "Look first" not in conclusion(found, None, MARGIN)


@pytest.mark.parametrize(
    ("gain", "shuffled", "untrained", "expected"),
    [
        (0.10, 0.00, 5.0, True),
        (0.10, 0.00, None, True),
        (0.10, 0.00, 1.0, False),  # an untrained network ends lower
        (0.10, 0.095, 5.0, False),  # the intervals overlap
        (0.005, -0.50, 5.0, False),  # below shuffled's, but not above zero
        (0.10, None, 5.0, None),
        (None, 0.00, 5.0, None),
    ],
)
def test_a_bound_is_informative_if_it_beats_its_controls(gain, shuffled, untrained, expected):
    losses = LossRecord(
        current=2.0,
        composed=None if gain is None else 2.0 - gain,
        composed_gain=None if gain is None else interval(gain),
        untrained=untrained,
        shuffled_gain=None if shuffled is None else interval(shuffled),
    )
    assert informative(losses) is expected


def test_tokens_needed_are_sequences_of_the_probe_s_length():
    assert tokens_needed(Verdict("grey", "", 50), 1000, 10) == 5000
    assert tokens_needed(Verdict("red", ""), 1000, 10) is None


def test_numbers_that_were_made_up_one_by_one_contradict_each_other():
    found = list(contradictions(whole(3), 3e-4))
    assert len(found) > 5
    assert any(words.startswith("conclusion: ") for words in found)
    assert all(words.endswith(".") and "\n" not in words for words in found)
