"""A check in sentences: each follows from numbers and claims no more than they do."""

from __future__ import annotations

import pytest

from peelwise.records.check import GainWitness, SignalReason
from peelwise.show.check.words import (
    NOT_EXCLUDED,
    ablation_words,
    conclusion,
    deviation_words,
    reason_words,
    score_words,
    share_of_bar,
    story,
    witness_words,
)
from show.check_sample import checked
from show.sample import interval


def reason(signal: str, part: str, value: float, typical: float | None) -> SignalReason:
    return SignalReason(signal=signal, part=part, value=value, typical=typical, deviation=7.0)


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        (
            reason("weight_rms", "mlp.down_proj", 0.0021, 0.07),
            "The weight RMS of mlp.down_proj is 0.03 of its neighbours' (0.0021 against 0.07).",
        ),
        (
            reason("update_ratio", "mlp", 3.2, 1.0),
            "The size of the update of the MLP is 3.2 times its neighbours' (3.2 against 1).",
        ),
        (
            reason("weight_rms", "q", 1e-9, 1.0),
            "The weight RMS of q is less than 0.001 of its neighbours' (1e-09 against 1).",
        ),
        (
            reason("weight_rms", "q", 5e4, 1.0),
            "The weight RMS of q is more than 1,000 times its neighbours' (5e+04 against 1).",
        ),
        (reason("weight_rms", "q", 0.0, 1.0), "The weight RMS of q is 0, its neighbours' 1."),
        (reason("linear_cka", "", 0.41, 0.93), "The linear CKA is 0.41, its neighbours' 0.93."),
        (reason("linear_cka", "", 0.41, None), "The linear CKA is 0.41."),
        (
            reason("gain_t", "attention", 12.3, -0.4),
            "The t-value of the gain slope of attention is 12.3: less of it would lower the loss.",
        ),
        (
            reason("gain_slope", "mlp", -0.2, 0.01),
            "The gain slope of the MLP is -0.2: more of it would lower the loss.",
        ),
        (
            reason("of_a_newer_version", "mlp.inner", 2.0, 1.0),
            "The of_a_newer_version of the MLP's inner channels is 2, its neighbours' 1.",
        ),
    ],
)
def test_a_reason_says_its_value_beside_that_of_the_neighbours(found: SignalReason, sentence: str) -> None:
    assert reason_words(found) == sentence


def witness(part: str, factor: float, gain: float, half: float, head: int | None = None) -> GainWitness:
    return GainWitness(
        block=1, part=part, layer=f"b.{part}", factor=factor, gain=interval(gain, half), select_gain=gain, head=head
    )


def test_a_factor_is_said_to_lower_the_loss_only_if_it_is_shown() -> None:
    assert witness_words(witness("mlp", -0.9, 1.3, 0.2)) == (
        "Multiplying what the MLP gives by -0.9 lowers the loss by 1.300 nats per token (1.100 to 1.500)."
    )
    assert witness_words(witness("self_attn.q_proj", 2, 0.01, 0.02)) == (
        "Multiplying self_attn.q_proj by 2 changes the loss by -0.0100 nats per token, which may be nothing."
    )
    assert witness_words(witness("self_attn.o_proj", 0, -0.3, 0.1, head=3)) == (
        "Multiplying head 3 of self_attn.o_proj by 0 raises the loss by 0.300 nats per token (0.200 to 0.400)."
    )


def test_ablation_in_three_cases() -> None:
    assert ablation_words(interval(0.31, 0.03)) == "Skipping the block raises the loss by 0.310 (0.280 to 0.340)."
    assert ablation_words(interval(-0.31, 0.03)) == "Skipping the block lowers the loss by 0.310 (0.280 to 0.340)."
    assert ablation_words(interval(0.001, 0.01)) == (
        "Skipping the block changes the loss by +0.001 (-0.009 to 0.011), not distinguishable from nothing."
    )


def test_the_conclusion_names_the_block_and_what_says_so() -> None:
    said = conclusion(checked())
    assert said.startswith(
        "Block 15 is unlike its neighbours (score 12; named from 6.0). The weight RMS of mlp.down_proj"
    )
    assert "Multiplying what the MLP gives by -0.9 lowers the loss by 1.300" in said
    assert "Skipping the block lowers the loss by 0.210" in said
    assert "best factors together lowers the loss by 1.300 nats per token (1.100 to 1.500)." in said


def test_several_blocks_are_listed_and_a_larger_gain_elsewhere_is_said() -> None:
    record = checked(named=(15, 3))
    assert conclusion(record).startswith(
        "2 of 30 blocks are unlike their neighbours: 15, 3. Block 15 first: The weight"
    )
    elsewhere = record.model_copy(
        update={"gain_witnesses": tuple(one.model_copy(update={"block": 3}) for one in record.gain_witnesses)}
    )
    assert "In block 3, multiplying what the MLP gives by -0.9 lowers" in conclusion(elsewhere)
    assert "No factor on a part of it is shown to lower the loss." in conclusion(elsewhere)
    assert "In block" not in conclusion(record)


def test_nothing_unlike_says_what_that_does_not_exclude() -> None:
    said = conclusion(checked(named=()))
    assert said.startswith("Nothing unlike its neighbours: the highest score is 2.4 (block 29)")
    assert said.endswith(NOT_EXCLUDED)
    assert not any("optimis" in conclusion(record) for record in (checked(), checked(named=()), checked(4, named=())))
    assert "Only weights were looked at" in conclusion(checked(named=(), text=False))
    assert "Only weights were looked at" not in said


def test_few_blocks_have_no_depth() -> None:
    assert conclusion(checked(4, named=())).startswith("4 blocks have no depth to compare with")


def test_what_was_not_measured_of_a_block_is_not_told() -> None:
    record = checked(text=False)
    assert record.unlike is not None
    assert len(story(record, record.unlike[0])) == 3  # the reasons alone


def test_numbers_fit_into_a_tile_and_a_bar() -> None:
    assert [score_words(s) for s in (None, 0.04, 9.94, 9.96, 998.0, 1e30)] == ["–", "0.0", "9.9", "10", "998", "1k+"]
    assert [share_of_bar(s, 6.0) for s in (None, -1.0, 6.0, 12.0, 1e9)] == [0.0, 0.0, 0.5, 1.0, 1.0]
    assert share_of_bar(1.0, 0.0) == 1.0
    assert [deviation_words(d) for d in (7.04, -41.0, 5.2e5)] == ["7.0", "41.0", "5e+05"]
