"""The conclusion of an allocation compares with the format that is hardest to beat, not with one that is easy to."""

from __future__ import annotations

import pytest

from peelwise.evidence.intervals import Paired
from peelwise.records.allocation import AllocationRecord
from peelwise.show.allocate.words import conclusion


def record(chosen="predicted", **better):
    return AllocationRecord.model_construct(
        chosen=chosen,
        bits_per_weight=3.49,
        budget_bits=3.5,
        damage=Paired(0.17, 0.01, 20).interval(),
        better_than={name: Paired(mean, error, 20).interval() for name, (mean, error) in better.items()},
    )


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (record(int2=(0.85, 0.05), int3=(0.009, 0.01)), "It is not shown to be better than the best single format "
         "within the budget: 0.0090 less than int3 for all layers (95 % interval -0.01"),
        (record(int2=(0.85, 0.05), int3=(0.05, 0.01)), "That is 0.0500 less than int3 for all layers (95 % interval "
         "0.02"),
    ],
    ids=["not shown", "shown"],
)  # fmt: skip
def test_the_rival_is_the_best_single_format(found, said):
    assert said in conclusion(found)
    assert "int2" not in conclusion(found)


def test_without_a_rival_nothing_is_compared():
    assert conclusion(record()).endswith("chosen on select: from predictions alone.")
    assert "shown" not in conclusion(record(chosen="uniform int3", int2=(0.5, 0.01)))
