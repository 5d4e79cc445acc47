"""Every code has words, and what is said follows from the numbers."""

from __future__ import annotations

from typing import get_args

import pytest

from peelwise.evidence.intervals import Paired
from peelwise.evidence.verdict import RULE
from peelwise.records import codes
from peelwise.records.audit import AuditConclusion, BlockRecord, LookFirst
from peelwise.records.base import Colour, Interval, Note, note
from peelwise.records.peel import PeelConclusion
from peelwise.show import words
from peelwise.show.audit.words import conclusion, reasons, two_gains
from peelwise.show.peel.words import conclusion as peel_conclusion
from show.peel_sample import peel_record, unmeasured_record
from show.sample import whole


@pytest.mark.parametrize(
    ("table", "every"),
    [(words.REASONS, codes.Reason), (words.STAGES, codes.Stage), (words.NOTES, codes.NoteCode)],
    ids=["reasons", "stages", "notes"],
)
def test_every_code_has_words_of_its_own(table, every):
    assert list(table) == list(get_args(every))
    assert len(set(table.values())) == len(table)


def test_words_of_older_records_are_shown_as_they_are():
    assert words.reason_words("undecided: more probe tokens needed") == "undecided: more probe tokens needed"
    assert words.stage_words("taking blocks out") == "taking blocks out"
    assert words.note_words("Stopped by the user.") == "Stopped by the user."


def test_an_interaction_is_said_behind_the_reason():
    plain, interacting = (words.reason_words(code) for code in ("more-tokens", "more-tokens+interacts"))
    assert interacting.startswith(f"{plain}; it interacts with its neighbours")


def test_notes_are_filled_with_their_values_and_survive_without_them():
    assert words.note_words(note("head-steps", steps=7)).startswith("Every head was given 7 steps")
    assert words.note_words(Note(code="from-the-future", values={"a": 1})) == "from-the-future: a = 1."
    assert words.note_words(Note(code="head-steps")) == "head-steps: no values."
    assert words.note_words(note("more-damping", layer="a", size=3, damping="x", used=1.0)).startswith("more-damping: ")


def interval(mean: float, half: float = 0.01) -> Interval:
    return Interval(
        mean=mean, low=mean - half, high=mean + half, standard_error=half / 2, sequences=9, method="student-t"
    )


def audit(
    found: AuditConclusion, blocks: int = 3, composed: Interval | None = None, colour: Colour = "grey", **losses: float
):
    record = whole(3)
    rows = tuple(
        BlockRecord(
            index=i,
            name=f"layers.{i}",
            verdict=colour,
            recoverable_nats=interval(0.3),
            unique_nats=interval(0.2),
            removal_nats=interval(-0.1 * i),
        )
        for i in range(blocks)
    )
    loss = record.loss.model_copy(update={"composed_gain": composed, **losses})
    return record.model_copy(update={"blocks": rows, "loss": loss, "conclusion": found, "margin_nats": 0.01})


def foreign(record):
    probe = record.probe.model_copy(update={"in_distribution": False})
    return record.model_copy(update={"probe": probe, "rule": RULE})


ONE_RED = "1 of 3 blocks certified under-optimised (block 0)."
NOTHING_MEASURED = "No verdict yet: no block was refined by itself within the budget."
NONE_FOUND = (
    "None found: of 2 blocks refined by themselves (of 3), none is shown to have a solo gain above 0.010 nats per "
    "token."
)
OUTSIDE = (
    "look first outside of the linear layers (tokenizer, positions, norms, order of the blocks), or the text is not "
    "what the model is for."
)
AUDITS = {
    "one red": (audit(AuditConclusion(case="certified", blocks=(0,))), ONE_RED),
    "many red": (
        audit(AuditConclusion(case="certified", blocks=tuple(range(8))), 8),
        "8 of 8 blocks certified under-optimised (blocks 0, 1, 2, 3, 4, 5, ...).",
    ),
    "yellow": (
        audit(AuditConclusion(case="recoverable", blocks=(0,))),
        "No block is certified under-optimised; 1 of 3 have recoverable loss on this text.",
    ),
    "none": (
        audit(AuditConclusion(case="none-found", blocks=(0, 1))),
        f"{NONE_FOUND} None found does not mean undamaged: only other weights of linear layers were tried.",
    ),
    "none, below the baseline": (
        audit(AuditConclusion(case="none-found", blocks=(0, 1)), current=1.7, without_blocks=3.25, unigram=5.0),
        f"{NONE_FOUND} None found does not mean undamaged: only other weights of linear layers were tried. This text "
        "costs a new head on the embedding without any block 3.250 nats per token and this model 1.700; a damaged one "
        "may lie between.",
    ),
    "green, worse than counting": (
        audit(
            AuditConclusion(case="none-found", blocks=(0, 1), above="unigram"), colour="green", current=5.5, unigram=5.0
        ),
        f"{NONE_FOUND} The loss of 5.500 is above what this text costs one who only counts tokens, 5.000: "
        f"{OUTSIDE} Green does not mean undamaged: only other weights of linear layers were tried.",
    ),
    "red, worse than no block": (
        audit(AuditConclusion(case="certified", blocks=(0,), above="without-blocks"), current=4.6, without_blocks=3.25),
        f"{ONE_RED} The loss of 4.600 is above what this text costs a new head on the embedding without any block, "
        f"3.250: {OUTSIDE}",
    ),
    "red, below the baseline": (
        audit(AuditConclusion(case="certified", blocks=(0,)), current=1.7, unigram=5.0),
        f"{ONE_RED} This text costs one who only counts tokens 5.000 nats per token and this model 1.700.",
    ),
    "most red": (
        audit(
            AuditConclusion(case="certified", blocks=(0, 1, 2), look_first=LookFirst(block=0, by="solo")), colour="red"
        ),
        "3 of 3 blocks certified under-optimised (blocks 0, 1, 2). Most blocks are red, so first rule out what they "
        "share: training itself (learning rate, optimiser, not finished) or what lies outside of the linear layers "
        "(rotary base, tokenizer, positions, norms, order of the blocks). Of single blocks, look first at block 0, "
        "which has the largest solo gain: 0.300 nats per token.",
    ),
    "unmeasured": (audit(AuditConclusion(case="not-measured")), NOTHING_MEASURED),
    "together": (
        audit(AuditConclusion(case="not-measured"), composed=interval(0.25)),
        f"{NOTHING_MEASURED} Refined together, the blocks lower the loss by 0.250 nats per token (95 % interval "
        "0.240 to 0.260).",
    ),
    "foreign, nothing of their own": (
        foreign(audit(AuditConclusion(case="none-found", blocks=(0, 1, 2)), composed=interval(0.25))),
        "None found: of 3 blocks measured (of 3), none is shown to have more than 0.010 nats per token to gain of its "
        "own. All blocks together could adapt to this text by 0.250 nats per token (95 % interval 0.240 to 0.260); of "
        "its own, block 0 has most to gain: 0.200. None found does not mean undamaged: only other weights of linear "
        "layers were tried.",
    ),
    "look first": (
        audit(AuditConclusion(case="certified", blocks=(0,), look_first=LookFirst(block=0, by="solo", tied=(2,)))),
        f"{ONE_RED} Look first at block 0, which has the largest solo gain: 0.300 nats per token. Block 2 is not "
        "distinguishable from it.",
    ),
    "of several": (
        audit(AuditConclusion(case="certified", blocks=(0,), look_first=LookFirst(block=1, by="marginal-of-tied"))),
        f"{ONE_RED} Look first at block 1, which has the largest marginal gain (leave-one-out) of those with the "
        "largest solo gain: 0.200 nats per token.",
    ),
    "elsewhere": (
        audit(AuditConclusion(case="certified", blocks=(0,), look_first=LookFirst(block=1, by="marginal"))),
        f"{ONE_RED} Look first at block 1, which has the largest marginal gain (leave-one-out): 0.200 nats per token.",
    ),
    "harmful": (
        audit(AuditConclusion(case="certified", blocks=(0,), harmful=(2, 1))),
        f"{ONE_RED} The model is better without block 2 (0.200 nats per token), "
        "without block 1 (0.100 nats per token).",
    ),
}


def test_a_block_that_does_no_work_is_said():
    record = whole(6)
    cost = [0.4, 0.5, -0.0075, 0.4, 0.6, 0.8]
    blocks = tuple(
        block.model_copy(update={"removal_nats": Paired(mean, 0.001, 40).interval()})
        for block, mean in zip(record.blocks, cost, strict=True)
    )
    assert "does no work" not in conclusion(record)
    assert (
        "Block 2 (-0.007, 95 % interval -0.010 to -0.005) does no work: the loss without it is the same within the "
        "margin, where leaving out the median block costs 0.450 nats per token."
    ) in conclusion(record.model_copy(update={"blocks": blocks}))


@pytest.mark.parametrize(("record", "sentence"), AUDITS.values(), ids=AUDITS)
def test_the_conclusion_of_an_audit_in_words(record, sentence):
    assert conclusion(record) == sentence


def test_reasons_of_a_record_without_codes_follow_from_its_numbers():
    record = whole(30)
    bare = tuple(block.model_copy(update={"reason_code": None}) for block in record.blocks)
    found = reasons(record.model_copy(update={"blocks": bare}))
    assert found[15] == "certified under-optimised"
    assert found[1] == "nothing above the margin found"
    assert len(found) == 30


def test_the_conclusion_of_a_peel_in_words():
    record = peel_record()
    said = peel_conclusion(record)
    assert said.startswith("The stack of blocks is certified under-optimised: map 1 2 5 5 5 6 (")
    assert "by 0.150 nats per token (95 % interval 0.130 to 0.170)." in said
    assert said.endswith(" Block 1: redundant as a target. Block 2: better left out.")
    for case, start in (("none-found", "None found: of 3 maps"), ("uninformative", "The best map (")):
        assert peel_conclusion(record.model_copy(update={"conclusion": PeelConclusion(case=case)})).startswith(start)
    assert peel_conclusion(unmeasured_record()) == "No verdict yet: no map was visited within the budget."


def test_two_gains_stand_beside_the_strip_on_text_that_all_blocks_can_adapt_to():
    case = AuditConclusion(case="none-found", blocks=(0, 1, 2))
    gains = audit(case, composed=interval(0.25))
    assert two_gains(foreign(gains)) == "could adapt together +0.250, of its own at most +0.200 (block 0)"
    assert two_gains(gains) == ""  # on training text solo gains decide
    assert two_gains(foreign(audit(case, composed=interval(-0.02)))) == ""  # nothing was gained
    assert two_gains(foreign(audit(case))) == ""
