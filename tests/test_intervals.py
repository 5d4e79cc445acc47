import numpy as np
import pytest
from scipy import stats

from peelwise import intervals
from peelwise.errors import TooFewSamplesError
from peelwise.intervals import Paired, holm_rejections, paired

TRUTH = 0.01  # nats per token
SIZES = (8, 16, 29, 30, 100)  # bootstrap below 30, Student's t from there on
SIMULATIONS = 2000


@pytest.fixture
def few_resamples(monkeypatch):
    """Enough for a coverage, and 25 times faster."""
    monkeypatch.setattr(intervals, "_RESAMPLES", 399)


def planted(rng, n):
    """Summed differences of sequences of unequal length: the truth per token, and normal noise of each token."""
    tokens = rng.integers(64, 257, size=n)
    return tokens * TRUTH + 0.2 * np.sqrt(tokens) * rng.standard_normal(n), tokens


def simulated(n, simulations=SIMULATIONS):
    rng = np.random.default_rng(n)
    return [paired(*planted(rng, n), seed=seed) for seed in range(simulations)]


def coverage(found, level):
    return np.mean([drawn.low <= TRUTH <= drawn.high for drawn in (one.interval(level) for one in found)])


@pytest.mark.usefixtures("few_resamples")
@pytest.mark.parametrize("n", SIZES)
def test_coverage_and_p_values_are_what_they_claim(n):
    found = simulated(n)
    p_values = np.array([one.p_at_most(TRUTH) for one in found])

    # The binomial error of 2000 draws is half a per cent.
    assert 0.93 < coverage(found, 0.95) < 0.97
    assert not 0.93 < coverage(found, 0.90) < 0.97  # the control: a narrower interval is told apart
    assert stats.kstest(p_values, "uniform").pvalue > 1e-3
    assert np.mean(p_values < 0.025) == pytest.approx(0.025, abs=0.0125)
    assert np.mean(p_values > 0.975) == pytest.approx(0.025, abs=0.0125)
    assert stats.kstest([one.p_at_most(TRUTH - 0.002) for one in found], "uniform").pvalue < 1e-3  # control


@pytest.mark.usefixtures("few_resamples")
def test_normal_quantiles_would_not_do_for_eight_sequences():
    found = simulated(8, 1000)
    covered = [abs(one.mean - TRUTH) < 1.96 * one.standard_error for one in found]

    assert np.mean(covered) < 0.93


def test_pairing_and_weighting_by_tokens_matter():
    """Long sequences weigh more: the mean is per token, not per sequence."""
    sums, tokens = [3.0, 2.0, 10.0, 1.0], [10, 10, 100, 10]
    one = paired(sums, tokens)
    residuals = np.array(sums) - one.mean * np.array(tokens)

    assert one.mean == 16 / 130
    assert one.mean != pytest.approx(np.mean(np.array(sums) / np.array(tokens)), rel=0.01)
    assert one.standard_error == pytest.approx(np.sqrt(4 / 3 * np.square(residuals).sum()) / 130)


def test_equal_lengths_give_the_textbook_interval():
    values = np.random.default_rng(0).standard_normal(40)
    one = paired(10 * values, [10] * 40)
    low, high = stats.t.interval(0.95, 39, values.mean(), stats.sem(values))

    assert (one.interval().low, one.interval().high) == pytest.approx((low, high))
    assert one.p_at_most(0.1) == pytest.approx(stats.ttest_1samp(values, 0.1, alternative="greater").pvalue)
    assert one.p_at_least(0.1) == pytest.approx(stats.ttest_1samp(values, 0.1, alternative="less").pvalue)


@pytest.mark.parametrize(
    ("n", "method"), [(2, "student-t"), (7, "student-t"), (8, "bootstrap-t"), (29, "bootstrap-t"), (30, "student-t")]
)
def test_the_method_follows_the_number_of_sequences(n, method):
    interval = paired(*planted(np.random.default_rng(1), n)).interval()

    assert interval.method == method
    assert interval.sequences == n
    assert interval.low < interval.mean < interval.high


@pytest.mark.parametrize("n", [7, 12, 40])
def test_interval_and_p_value_agree(n):
    """A margin at the edge of the 95 % interval has a one-sided p-value of 2.5 %."""
    one = paired(*planted(np.random.default_rng(2), n))
    interval = one.interval()

    assert one.p_at_most(interval.low) == pytest.approx(0.025, abs=1e-3)
    assert one.p_at_least(interval.high) == pytest.approx(0.025, abs=1e-3)
    assert one.p_at_most(one.mean) + one.p_at_least(one.mean) == pytest.approx(1)
    assert one.p_at_most(-1e9) < 1e-3 < 0.999 < one.p_at_most(1e9)


def test_skewed_differences_give_a_skewed_bootstrap_interval():
    skewed = paired(np.random.default_rng(4).exponential(size=20) ** 2, [1] * 20).interval()

    assert skewed.high - skewed.mean > 1.3 * (skewed.mean - skewed.low)


def test_the_bootstrap_is_the_same_for_the_same_seed_only():
    data = planted(np.random.default_rng(3), 12)

    assert paired(*data, seed=5).interval() == paired(*data, seed=5).interval()
    assert paired(*data, seed=5).interval() != paired(*data, seed=6).interval()


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
