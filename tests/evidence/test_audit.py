"""Codes and flags follow from numbers; that forged records are found is in test_certificate.py."""

import pytest

from peelwise.evidence.audit import conclusion, contradictions, informative, tokens_needed
from peelwise.evidence.verdict import Verdict
from peelwise.records.audit import AuditConclusion, BlockRecord, LookFirst, LossRecord
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
        BlockRecord(index=i, name=f"layers.{i}", verdict=colour, recoverable_nats=alone)
        for i, colour in enumerate(colours)
    )


CASES = {
    "one red": (blocks(["grey", "red", "yellow"]), "certified", (1,)),
    "many red": (blocks(["red"] * 8), "certified", tuple(range(8))),
    "yellow": (blocks(["yellow", "grey"]), "recoverable", (0,)),
    "none": (blocks(["grey", "green"]), "none-found", (0, 1)),
    "unmeasured": (blocks(["grey"], measured=False), "not-measured", ()),
}


@pytest.mark.parametrize(("found", "case", "indices"), CASES.values(), ids=CASES)
def test_the_conclusion_holds_what_was_found_and_no_more(found, case, indices):
    assert conclusion(found, MARGIN) == AuditConclusion(case=case, blocks=indices)


def test_the_conclusion_holds_the_blocks_without_which_the_model_is_better():
    removals = [interval(x) for x in (0.4, -0.2, 0.0, -0.3, -0.005)]
    found = tuple(b.model_copy(update={"removal_nats": r}) for b, r in zip(blocks(["grey"] * 5), removals, strict=True))
    assert conclusion(found, MARGIN).harmful == (3, 1)


@pytest.mark.parametrize(
    ("current", "unigram", "without", "above"),
    [
        (1.7, 5.0, 3.0, None),
        (4.6, 5.0, 3.0, "without-blocks"),
        (5.5, 5.0, 6.0, "unigram"),
        (5.5, 5.0, 3.0, "without-blocks"),
        (5.5, None, None, None),
        (5.5, None, 3.0, "without-blocks"),
    ],
)
def test_the_conclusion_says_which_cheap_baseline_does_better(current, unigram, without, above):
    losses = LossRecord(current=current, unigram=unigram, without_blocks=without)
    assert conclusion(blocks(["green"]), MARGIN, losses).above == above
    assert conclusion(blocks(["red"]), MARGIN, losses).above == above


def told(alone, unique, colour="red"):
    return tuple(
        BlockRecord(index=i, name="", verdict=colour, recoverable_nats=interval(a), unique_nats=interval(u))
        for i, (a, u) in enumerate(zip(alone, unique, strict=True))
    )


def test_the_conclusion_points_at_the_block_to_look_at_first():
    found = told([0.1, 0.3, 0.31, 0.1], [0.2, 0.0, 0.0, 0.0])
    assert conclusion(found, MARGIN, in_distribution=True).look_first == LookFirst(block=2, by="solo", tied=(1,))
    assert conclusion(found, MARGIN, in_distribution=False).look_first == LookFirst(block=0, by="marginal")


def test_of_blocks_with_the_same_solo_gain_the_marginal_gain_says_which():
    found = told([0.1, 0.3, 0.31, 0.1], [0.5, 0.2, 0.05, 0.0])
    assert conclusion(found, MARGIN).look_first == LookFirst(block=1, by="marginal-of-tied")
    assert conclusion(found, MARGIN, rule=2).look_first == LookFirst(block=2, by="solo", tied=(1,))
    many = told([0.3] * 5, [0.0, 0.2, 0.0, 0.2, 0.0])  # too many to name, but for that
    assert conclusion(many, MARGIN).look_first == LookFirst(block=1, by="marginal-of-tied", tied=(3,))
    assert conclusion(many, MARGIN, rule=2).look_first is None


@pytest.mark.parametrize(
    "found",
    [told([0.3] * 4, [0.3] * 4), told([0.3, 0.3], [0.3, 0.3]), told([0.9, 0, 0], [0.9, 0, 0], "grey")],
    ids=["many alike", "all alike", "no verdict"],
)
def test_where_nothing_sticks_out_it_points_nowhere(found):
    assert conclusion(found, MARGIN).look_first is None


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
    assert tokens_needed(Verdict("grey", "more-tokens", 50), 1000, 10) == 5000
    assert tokens_needed(Verdict("red", "above-margin"), 1000, 10) is None


def test_numbers_that_were_made_up_one_by_one_contradict_each_other():
    made_up = AuditConclusion(case="certified", blocks=(0,))
    found = list(contradictions(whole(3).model_copy(update={"conclusion": made_up}), 3e-4))
    assert len(found) > 5
    assert any(words.startswith("conclusion: ") for words in found)
    assert all(words.endswith(".") and "\n" not in words for words in found)


def test_a_sentence_in_a_record_of_old_is_no_contradiction():
    """Rewording it must not break a certificate; the control is above."""
    record = whole(3)
    said = list(contradictions(record.model_copy(update={"conclusion": "All is well, in other words."}), 3e-4))
    assert said == list(contradictions(record.model_copy(update={"conclusion": None}), 3e-4))
