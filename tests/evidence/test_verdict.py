import pytest

from peelwise.evidence.intervals import Paired
from peelwise.evidence.verdict import (
    Evidence,
    cloud_colour,
    default_margin,
    idle,
    judge,
    leaders,
    stands_out,
)

MARGIN = 0.01
ERROR = 0.001  # of every measurement below: the margin is ten of them
SURELY, HARDLY, BARELY = 0.030, 0.001, 0.0105  # well above, well below, at the margin


def measured(mean):
    return None if mean is None else Paired(mean, ERROR, sequences=64)


def verdicts(alone, unique=None, **options):
    """Verdicts of blocks from their mean values; ``None`` is not measured."""
    unique = unique or [None] * len(alone)
    evidence = [Evidence(measured(a), measured(u)) for a, u in zip(alone, unique, strict=True)]
    return judge(evidence, MARGIN, **{"in_distribution": True, **options})


def colours(*args, **options):
    return [verdict.colour for verdict in verdicts(*args, **options)]


TABLE = {  # alone, unique, options -> colour, reason
    "certified": (SURELY, None, {}, "red", "above-margin"),
    "certified, unique too": (SURELY, SURELY, {}, "red", "above-margin"),
    "certified, neighbours could do it": (SURELY, HARDLY, {}, "red", "above-margin"),
    "still falling": (SURELY, None, {"still_falling": True}, "yellow", "still-falling"),
    "still falling on foreign text": (
        SURELY,
        None,
        {"still_falling": True, "in_distribution": False},
        "yellow",
        "still-falling",
    ),
    "foreign text": (SURELY, None, {"in_distribution": False}, "yellow", "foreign-text"),
    "foreign text, unique not above": (SURELY, BARELY, {"in_distribution": False}, "yellow", "foreign-text"),
    "foreign text, unique above": (SURELY, SURELY, {"in_distribution": False}, "red", "above-margin"),
    "foreign text, unique below": (SURELY, HARDLY, {"in_distribution": False}, "green", "nothing-of-its-own"),
    "foreign text, unique below, falling": (
        SURELY,
        HARDLY,
        {"in_distribution": False, "still_falling": True},
        "green",
        "nothing-of-its-own",
    ),
    "foreign text, unique alone above": (None, SURELY, {"in_distribution": False}, "red", "own-above-margin"),
    "foreign text, undecided alone, unique above": (
        BARELY,
        SURELY,
        {"in_distribution": False},
        "red",
        "own-above-margin",
    ),
    "foreign text, unique alone above, falling": (
        None,
        SURELY,
        {"in_distribution": False, "still_falling": True},
        "yellow",
        "still-falling",
    ),
    "foreign text, unique alone below": (None, HARDLY, {"in_distribution": False}, "green", "nothing-of-its-own"),
    "foreign text, undecided both": (BARELY, BARELY, {"in_distribution": False}, "grey", "more-tokens"),
    "foreign text, undecided unique alone": (None, BARELY, {"in_distribution": False}, "grey", "more-tokens"),
    "by the rule of old, unique below": (
        SURELY,
        HARDLY,
        {"in_distribution": False, "rule": 1},
        "yellow",
        "foreign-text",
    ),
    "by the rule of old, unique alone above": (
        None,
        SURELY,
        {"in_distribution": False, "rule": 1},
        "grey",
        "marginal-only",
    ),
    "nothing there": (HARDLY, None, {}, "green", "nothing-above-margin"),
    "worse than nothing": (-SURELY, None, {}, "green", "nothing-above-margin"),
    "nothing there, still falling": (HARDLY, None, {"still_falling": True}, "green", "nothing-above-margin"),
    "nothing there on foreign text": (HARDLY, None, {"in_distribution": False}, "green", "nothing-above-margin"),
    "undecided": (BARELY, None, {}, "grey", "more-tokens"),
    "undecided, unique above": (BARELY, SURELY, {}, "grey", "more-tokens"),
    "undecided, still falling": (BARELY, None, {"still_falling": True}, "grey", "more-tokens"),
    "unmeasured": (None, None, {}, "grey", "not-refined"),
    "unmeasured, unique above": (None, SURELY, {}, "grey", "marginal-only"),
    "unmeasured, unique not above": (None, BARELY, {}, "grey", "not-refined"),
}


@pytest.mark.parametrize(("alone", "unique", "options", "colour", "reason"), TABLE.values(), ids=TABLE)
def test_every_row_of_the_table(alone, unique, options, colour, reason):
    (verdict,) = verdicts([alone], [unique], **options)

    assert verdict.colour == colour
    assert verdict.reason == verdict.code == reason
    assert not verdict.interaction


@pytest.mark.parametrize(
    ("alone", "colour", "reason"),
    [
        (SURELY, "red", "above-margin"),
        (HARDLY, "grey", "nothing-above-margin"),
        (BARELY, "grey", "more-tokens"),
        (None, "grey", "not-refined"),
    ],
)
def test_a_block_whose_neighbours_interact_is_marked_and_never_green(alone, colour, reason):
    (verdict,) = verdicts([alone], [-SURELY])

    assert verdict.interaction
    assert verdict.colour == colour
    assert verdict.reason == reason
    assert verdict.code == f"{reason}+interacts"


def test_a_slightly_negative_unique_is_no_interaction():
    (verdict,) = verdicts([HARDLY], [-1.5 * ERROR])

    assert (verdict.colour, verdict.interaction) == ("green", False)


def test_only_an_undecided_block_says_how_many_sequences_would_decide():
    decided, open_, nothing, unmeasured = verdicts([SURELY, BARELY, HARDLY, None])

    assert open_.sequences_needed == measured(BARELY).sequences_needed(MARGIN) > 64
    assert decided.sequences_needed is nothing.sequences_needed is unmeasured.sequences_needed is None


def test_an_undecided_block_that_interacts_keeps_its_number():
    (verdict,) = verdicts([BARELY], [-SURELY])

    assert verdict.sequences_needed == measured(BARELY).sequences_needed(MARGIN)


@pytest.mark.parametrize(("deviations", "above", "below"), [(1.9, "grey", "grey"), (2.1, "red", "green")])
def test_one_block_is_decided_at_95_per_cent_on_both_sides(deviations, above, below):
    assert colours([MARGIN + deviations * ERROR]) == [above]
    assert colours([MARGIN - deviations * ERROR]) == [below]


def test_thirty_blocks_are_thirty_questions():
    suspicious = MARGIN + 2.5 * ERROR  # significant for one block, not as the best of thirty

    assert colours([suspicious]) == ["red"]
    assert colours([suspicious] + [MARGIN] * 29)[0] == "grey"
    assert colours([suspicious] + [None] * 29)[0] == "red"  # what was not measured was not asked
    assert colours([MARGIN - 2.5 * ERROR] + [MARGIN] * 29)[0] == "grey"
    assert colours([SURELY] * 30) == ["red"] * 30


def test_holm_guards_the_unique_values_too():
    unique = [-2.5 * ERROR] + [0.0] * 29

    assert verdicts([HARDLY], unique[:1])[0].interaction
    assert not verdicts([HARDLY] * 30, unique)[0].interaction


def test_no_blocks_no_verdicts():
    assert verdicts([]) == []


SLOPING = [0.030 + 0.004 * depth for depth in range(12)]
WOBBLE = [0.001 * (-1) ** (depth // 2) for depth in range(12)]


def lifted(values, index, amount):
    return [value + amount * (place == index) for place, value in enumerate(values)]


HEALTHY = [a + b for a, b in zip(SLOPING, WOBBLE, strict=True)]
OUTLIERS = {
    "a slope is no outlier": (HEALTHY, []),
    "nor a falling one": (HEALTHY[::-1], []),
    "a block above the slope": (lifted(HEALTHY, 3, 0.02), [3]),
    "though others are higher": (lifted(HEALTHY, 0, 0.02), [0]),
    "a block below the slope": (lifted(HEALTHY, 3, -0.02), []),
    "two blocks": (lifted(lifted(HEALTHY, 3, 0.02), 8, 0.03), [3, 8]),
    "unmeasured ones leave gaps": ([None, *lifted(HEALTHY, 5, 0.02), None], [6]),
    "above the noise, not above the margin": (lifted(SLOPING, 3, 0.9 * MARGIN), []),
    "above the margin without noise": (lifted(SLOPING, 3, 1.1 * MARGIN), [3]),
    "above the margin, not above the noise": (lifted([20 * v for v in WOBBLE], 3, 0.05), []),
    "too few blocks for a trend": ([0.0, 0.0, 1.0, 0.0], []),
    "five are enough": ([0.0, 0.0, 1.0, 0.0, 0.0], [2]),
    "nothing measured": ([None] * 8, []),
    "no blocks": ([], []),
}


@pytest.mark.parametrize(("values", "expected"), OUTLIERS.values(), ids=OUTLIERS)
def test_what_stands_out_from_the_trend_over_depth(values, expected):
    flags = stands_out(values, MARGIN)

    assert len(flags) == len(values)
    assert [index for index, flag in enumerate(flags) if flag] == expected


def test_on_foreign_text_the_marginal_gain_says_how_much_text_would_decide():
    (verdict,) = verdicts([None], [BARELY], in_distribution=False)
    assert verdict.sequences_needed == measured(BARELY).sequences_needed(MARGIN) > 64


@pytest.mark.parametrize(
    ("alone", "colour", "reason"),
    [
        (HARDLY, "green", "nothing-of-its-own"),  # by itself neither
        (SURELY, "yellow", "foreign-text"),
        (BARELY, "grey", "more-tokens"),
        (None, "grey", "not-refined"),
    ],
)
def test_on_foreign_text_a_block_that_takes_from_its_neighbours_is_judged_by_itself_too(alone, colour, reason):
    (verdict,) = verdicts([alone], [-SURELY], in_distribution=False)

    assert (verdict.colour, verdict.reason, verdict.interaction) == (colour, reason, True)


def test_on_foreign_text_the_block_above_the_trend_is_red():
    values = [0.03 + 0.004 * depth for depth in range(8)]
    values[2] += 0.02

    assert colours(values, [HARDLY] * 8, in_distribution=False) == ["green"] * 2 + ["red"] + ["green"] * 5

    assert colours(values, in_distribution=False) == ["yellow"] * 2 + ["red"] + ["yellow"] * 5
    assert colours(values) == ["red"] * 8


@pytest.mark.parametrize(("loss", "margin"), [(10.0, 0.05), (2.0, 0.01), (0.6, 0.003), (0.1, 0.003), (0.0, 0.003)])
def test_the_default_margin_is_half_a_per_cent_and_at_least_three_thousandths(loss, margin):
    assert default_margin(loss) == pytest.approx(margin)


def test_leaders_are_the_largest_and_those_it_cannot_be_told_from():
    values = [measured(v) for v in (0.010, 0.0501, None, 0.0480, 0.0470)]
    assert leaders(values) == [1, 3]  # 0.0021 apart with errors of 0.001 each, and 0.0031
    assert leaders([None, measured(-0.02)]) == [1]
    assert leaders([None, None]) == []


def test_regions_of_the_cloud():
    edges = {"upper": 3.5, "lower": 2.9, "margin": 0.02}
    assert [cloud_colour(loss, **edges) for loss in (3.6, 3.5, 2.93, 2.92, 2.5)] == [
        "red",
        "yellow",
        "yellow",
        "green",
        "green",
    ]
    assert cloud_colour(3.0, 3.5, 3.0, 0.02) == "green"  # a witness that gains nothing
    assert cloud_colour(9.0, None, 2.9, 0.02) == "yellow"
    assert cloud_colour(4.0, 3.5, 4.0, 0.02) == "red"  # nothing found, and no better than no block at all


@pytest.mark.parametrize(
    ("means", "found"),
    [
        ([0.4, 0.5, -0.0075, 0.4, 0.6, 0.8], [2]),  # re-initialised: the others have learnt to do without it
        ([0.4, 0.5, 0.05, 0.4, 0.6, 0.8], []),  # it costs more than the margin
        ([0.4, 0.5, -0.05, 0.4, 0.6, 0.8], []),  # it does harm, which is said elsewhere
        ([0.03, 0.02, 0.0, 0.01, 0.03, 0.02], []),  # where all do little, none stands out
        ([0.4, 0.0, 0.4], []),  # too few
    ],
)
def test_a_block_does_no_work_where_the_others_do(means, found):
    removals = [Paired(mean, 0.001, 40, 0.0) for mean in means]
    assert idle(removals, 0.01) == found
    assert idle([*removals, None], 0.01) == found


def test_a_block_whose_removal_is_uncertain_is_not_said_to_do_no_work():
    assert idle([Paired(mean, 0.01, 40, 0.0) for mean in (0.4, 0.5, 0.0, 0.4, 0.6, 0.8)], 0.01) == []
