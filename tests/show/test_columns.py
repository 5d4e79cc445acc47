"""Numbers of a column with the same decimals, and formats without what all of them share."""

from __future__ import annotations

import pytest

from peelwise.show.columns import percents, short_formats


@pytest.mark.parametrize(
    ("shares", "written"),
    [
        ([0.0559, 0.019, 0.115], ["5.6", "1.9", "11.5"]),
        ([0.0374, 0.019, -0.00001, None], ["3.74", "1.90", "0.00", ""]),
        ([0.0000019, 0.000000004], ["0.00019", "0.00000"]),
        ([3.0, 0.01], ["300.0", "1.0"]),
        ([0.0, 0.0], ["0.0", "0.0"]),
        ([None], [""]),
    ],
)
def test_three_digits_of_the_largest_and_as_many_decimals_for_all(shares, written) -> None:
    write = percents(shares)
    assert [write(share) for share in shares] == written


def test_what_all_formats_share_is_said_once() -> None:
    assert short_formats(["int3:group=64,symmetric", "int8:group=64,symmetric", "dense"]) == (
        {"int3:group=64,symmetric": "int3", "int8:group=64,symmetric": "int8", "dense": "dense"},
        "group=64,symmetric",
    )


@pytest.mark.parametrize(
    "names", [["int3:group=64", "int4:channel"], ["int3:group=64"], ["dense", "dense:float16"], []]
)
def test_formats_that_share_nothing_stay_as_they_are(names: list[str]) -> None:
    assert short_formats([*names, *names]) == ({name: name for name in names}, None)
