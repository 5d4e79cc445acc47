import dataclasses
import functools

import numpy as np
import pytest
from scipy import stats

from peelwise.errors import TooFewSamplesError
from peelwise.evidence.intervals import Paired, holm_rejections, paired, ratio

TRUTH = 0.01  # nats per token
SIZES = (8, 12, 20, 29, 30, 60, 200)  # all of them nightly
QUICK = (8, 30)
SIMULATIONS = 3000
NOISES = {  # of mean zero
    "normal": lambda rng, n: rng.standard_normal(n),
    "heavy tails": lambda rng, n: rng.standard_t(4, n),
    "lognormal": lambda rng, n: rng.lognormal(0, 0.5, n) - np.exp(0.125),
    "exponential": lambda rng, n: rng.exponential(size=n) - 1,
    "exponential, to the left": lambda rng, n: 1 - rng.exponential(size=n),
}


def planted(rng, n, noise=NOISES["normal"]):
    """Summed differences of sequences of unequal length: the truth per token, and noise of each token."""
    tokens = rng.integers(64, 257, size=n)
    return tokens * TRUTH + 0.2 * np.sqrt(tokens) * noise(rng, n), tokens


@functools.cache  # the same draws are asked more than one question
def simulated(n, noise=NOISES["normal"], simulations=SIMULATIONS):
    rng = np.random.default_rng(n)
    return [paired(*planted(rng, n, noise)) for _ in range(simulations)]


def coverage(found, level=0.95):
    return np.mean([drawn.low <= TRUTH <= drawn.high for drawn in (one.interval(level) for one in found)])


def student(found):
    """The same without their skewness."""
    return [dataclasses.replace(one, skewness=0.0) for one in found]


def check_coverage(n, noise):
    """The binomial error of 3000 draws is 0.4 per cent."""
    found = simulated(n, noise)

    assert 0.93 < coverage(found) < 0.97
    assert not 0.93 < coverage(found, 0.89) < 0.97  # the control: a narrower interval is told apart


def check_verdicts(n, noise):
    """One-sided, at the level of a verdict: what skewness leaves at most, against Student's t."""
    found = simulated(n, noise)
    wrong = [np.mean([one.p_at_most(TRUTH) < 0.025 for one in these]) for these in (found, student(found))]
    missed = [np.mean([one.p_at_least(TRUTH) < 0.025 for one in these]) for these in (found, student(found))]

    assert max(wrong[0], missed[0]) < 0.062
    assert wrong[0] <= wrong[1]
    assert missed[0] <= missed[1]
    assert wrong[0] + missed[0] == pytest.approx(1 - coverage(found), abs=1e-9)


@pytest.mark.parametrize("n", QUICK)
@pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)
@pytest.mark.slow
def test_intervals_cover_what_they_claim(n, noise):
    check_coverage(n, noise)


@pytest.mark.parametrize("n", QUICK)
@pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)
@pytest.mark.slow
def test_no_verdict_is_wrong_more_often_than_it_claims(n, noise):
    check_verdicts(n, noise)


def test_student_alone_would_not_do_for_skewed_differences():
    found = simulated(12, NOISES["exponential"])

    assert coverage(student(found)) < 0.92
    assert coverage(student(simulated(12))) > 0.935  # the control: normal ones are what it is for


@pytest.mark.parametrize(("n", "least"), [(8, 0.895), (12, 0.91), (20, 0.92), (30, 0.93), (200, 0.94)])
@pytest.mark.slow
def test_very_skewed_differences_are_covered_as_the_docs_say(n, least):
    found = simulated(n, lambda rng, n: rng.lognormal(0, 1, n) - np.exp(0.5))

    assert least < coverage(found) < 0.97
    assert coverage(student(found)) < coverage(found) - 0.02
    assert np.mean([one.p_at_most(TRUTH) < 0.025 for one in found]) < 0.015  # no verdict of too much


def test_p_values_of_normal_differences_are_nearly_uniform():
    p_values = np.array([one.p_at_most(TRUTH) for one in simulated(40)])
    shifted = np.array([one.p_at_most(TRUTH - 0.002) for one in simulated(40)])

    for level in (0.025, 0.25, 0.5, 0.75):
        assert np.mean(p_values < level) == pytest.approx(level, abs=0.025)
        assert np.mean(shifted < level) > level + 0.025  # the control


def test_normal_quantiles_would_not_do_for_eight_sequences():
    covered = [abs(one.mean - TRUTH) < 1.96 * one.standard_error for one in simulated(8)]

    assert np.mean(covered) < 0.93


def test_pairing_and_weighting_by_tokens_matter():
    """Long sequences weigh more: the mean is per token, not per sequence."""
    sums, tokens = [3.0, 2.0, 10.0, 1.0], [10, 10, 100, 10]
    one = paired(sums, tokens)
    residuals = np.array(sums) - one.mean * np.array(tokens)

    assert one.mean == 16 / 130
    assert one.mean != pytest.approx(np.mean(np.array(sums) / np.array(tokens)), rel=0.01)
    assert one.standard_error == pytest.approx(np.sqrt(4 / 3 * np.square(residuals).sum()) / 130)


def test_equal_lengths_give_the_textbook_interval_where_nothing_is_skewed():
    half = np.random.default_rng(0).standard_normal(20)
    values = 0.1 + np.concatenate([half, -half])
    one = paired(10 * values, [10] * 40)
    low, high = stats.t.interval(0.95, 39, values.mean(), stats.sem(values))

    assert (one.interval().low, one.interval().high) == pytest.approx((low, high))
    assert one.p_at_most(0.1) == pytest.approx(stats.ttest_1samp(values, 0.1, alternative="greater").pvalue)
    assert one.p_at_least(0.1) == pytest.approx(stats.ttest_1samp(values, 0.1, alternative="less").pvalue)


@pytest.mark.parametrize(("n", "method"), [(2, "student-t"), (3, "skewness-corrected-t"), (40, "skewness-corrected-t")])
def test_two_sequences_have_no_skewness(n, method):
    one = paired(*planted(np.random.default_rng(1), n))
    interval = one.interval()

    assert interval.method == method
    assert interval.sequences == n
    assert interval.low < interval.mean < interval.high
    assert Paired.of(interval) == one
    assert Paired.of(interval).interval() == interval


@pytest.mark.parametrize("n", [2, 7, 12, 40])
@pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)
def test_interval_and_p_value_agree(n, noise):
    """A margin at the edge of the 95 % interval has a one-sided p-value of 2.5 %."""
    one = paired(*planted(np.random.default_rng(2), n, noise))
    interval = one.interval()

    assert one.p_at_most(interval.low) == pytest.approx(0.025, abs=1e-9)
    assert one.p_at_least(interval.high) == pytest.approx(0.025, abs=1e-9)
    assert 1 <= one.p_at_most(one.mean) + one.p_at_least(one.mean) < 1.2
    assert one.p_at_most(-1e9) < 1e-3 < 0.999 < one.p_at_most(1e9)


def test_skewed_differences_widen_the_end_of_the_tail_and_narrow_none():
    skewed = paired(np.random.default_rng(4).exponential(size=20) ** 2, [1] * 20)
    found, plain = skewed.interval(), student([skewed])[0].interval()

    assert found.high - found.mean > 1.3 * (found.mean - found.low)
    assert found.low == plain.low
    mirrored = dataclasses.replace(skewed, skewness=-skewed.skewness).interval()
    assert (mirrored.high, mirrored.low) == pytest.approx((plain.high, 2 * found.mean - found.high))


def test_skewness_is_the_textbook_one():
    values = np.random.default_rng(0).exponential(size=25)

    assert paired(10 * values, [10] * 25).skewness == pytest.approx(stats.skew(values, bias=False))
    assert paired(1e-200 * values, [10] * 25).skewness == pytest.approx(stats.skew(values, bias=False))


@pytest.mark.parametrize("n", [2, 10, 50])
def test_equal_differences_leave_no_doubt(n):
    one = paired([0.5] * n, [1] * n)
    interval = one.interval()

    assert (interval.low, interval.mean, interval.high) == (0.5, 0.5, 0.5)
    assert one.standard_error == 0
    assert (one.p_at_most(0.4), one.p_at_most(0.6), one.p_at_most(0.5)) == (0, 1, 0.5)
    assert one.sequences_needed(0.4) == n + 1


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e9])
def test_one_sequence_that_differs_among_equal_ones_gives_a_usable_interval(scale):
    interval = paired([0.0] * 9 + [scale], [1] * 10).interval()

    assert interval.low < interval.mean < interval.high < 20 * scale


@pytest.mark.parametrize("n", [0, 1])
def test_fewer_than_two_sequences_are_refused(n):
    with pytest.raises(TooFewSamplesError, match=f"at least 2 report sequences, got {n}"):
        paired([0.1] * n, [10] * n)


def test_holm_by_hand():
    # Sorted: 0.005 <= 0.05/4, 0.015 <= 0.05/3, 0.03 > 0.05/2: stop, though 0.04 <= 0.05/1.
    assert holm_rejections([0.015, 0.04, 0.03, 0.005], 0.05) == [True, False, False, True]
    assert holm_rejections([0.04], 0.05) == [True]
    assert holm_rejections([0.02, 0.02], 0.05) == [True, True]
    assert holm_rejections([0.03, 0.03], 0.05) == [False, False]
    assert holm_rejections([], 0.05) == []


def test_holm_keeps_the_family_wise_error_and_finds_what_is_there():
    rng = np.random.default_rng(0)
    null = rng.random((4000, 30))  # thirty questions, the answer to all of them is no
    any_rejected = np.mean([any(holm_rejections(row, 0.05)) for row in null])
    null[:, :3] = 1e-6
    with_effects = [holm_rejections(row, 0.05) for row in null]

    assert 0.035 < any_rejected < 0.06
    assert np.mean((null[:, 3:] < 0.05).any(axis=1)) > 0.7  # the control: without Holm
    assert all(all(rejected[:3]) for rejected in with_effects)
    assert np.mean([any(rejected[3:]) for rejected in with_effects]) < 0.06


@pytest.mark.parametrize(
    ("mean", "error", "needed"),
    [
        (0.010, 0.0020, 50),  # distance 0.005, 2.5 standard errors: just enough, so one more
        (0.010, 0.0040, 200),  # twice the error needs four times as many
        (0.006, 0.0020, 1250),
        (0.000, 0.0020, 50),  # below the margin counts alike
        (0.005, 0.0020, 5000),  # at the margin: never, capped
        (0.0050001, 0.0020, 5000),
        (1.000, 0.0001, 51),  # already decided
    ],
)
def test_sequences_needed(mean, error, needed):
    one = Paired(mean, error, sequences=50)

    assert one.sequences_needed(0.005) == pytest.approx(needed, abs=1)


def test_the_sequences_needed_mostly_decide():
    rng = np.random.default_rng(7)
    margin = TRUTH - 0.003

    def decided(n):
        return np.mean([paired(*planted(rng, n)).p_at_most(margin) < 0.025 for _ in range(300)])

    needed = np.median([paired(*planted(rng, 40)).sequences_needed(margin) for _ in range(300)])
    assert 40 < needed < 400
    assert decided(int(needed)) > 0.6 > 2 * decided(40)


def test_a_share_of_two_means_is_covered_as_often_as_it_says() -> None:
    """Gains of 200 drawn experiments, correlated as losses of the same sequences are; the true share is 0.6."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(400):
        tokens = rng.integers(50, 100, 20).astype(float)
        whole = tokens * (0.1 + 0.08 * rng.normal(size=20))
        part = 0.6 * whole + tokens * 0.03 * rng.normal(size=20)
        found = ratio(part, whole, tokens)
        assert found.low < found.mean < found.high
        assert found.mean == pytest.approx(part.sum() / whole.sum())
        hits += found.low <= 0.6 <= found.high
    assert 0.92 < hits / 400 < 0.98
    assert ratio(part, rng.normal(size=20), tokens) is None  # nothing bounds a share of nothing
    exact = ratio(0.25 * whole, whole, tokens)
    assert exact.low == pytest.approx(0.25)
    assert exact.high == pytest.approx(0.25)
