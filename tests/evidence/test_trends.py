"""Medians, trends, changes of level and slopes, against slow ones and with controls."""

import itertools
import math
import statistics

import numpy as np
import pytest

from peelwise.evidence.intervals import Paired
from peelwise.evidence.trends import (
    WINDOW,
    Slope,
    against_own,
    change_points,
    equivalent_steps,
    loss_gap,
    loss_slope,
    own_parts,
    probe_slope,
    progress_slope,
)

RNG = np.random.default_rng


# -- against its own past ------------------------------------------------------------------------------------------


def slow_against_own(steps, values):
    past = list(zip(steps, values, strict=True))[-WINDOW - 1 : -1]
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.combinations(past, 2)]
    slope = statistics.median(slopes)
    line = statistics.median([y - slope * x for x, y in past]) + slope * steps[-1]
    return values[-1] - statistics.median([y for _, y in past]), values[-1] - line


@pytest.mark.parametrize("count", [6, 15, 60])
def test_against_own_is_the_slow_one(count):
    steps = np.cumsum(RNG(0).integers(1, 9, count)).tolist()
    values = (RNG(1).normal(size=count) + 0.1 * np.arange(count)).tolist()
    assert against_own(steps, values, quotient=False) == pytest.approx(slow_against_own(steps, values))
    found = against_own(steps, np.exp(values).tolist(), quotient=True)
    assert found == pytest.approx([math.exp(v) for v in slow_against_own(steps, values)])


def test_a_value_on_its_trend_is_no_news():
    steps = list(range(0, 100, 10))
    falling = [2.0 * 0.9**s for s in steps]
    to_median, to_trend = against_own(steps, falling, quotient=True)
    assert to_median < 0.1
    assert to_trend == pytest.approx(1.0)


def test_too_little_past():
    assert against_own([1], [1.0], quotient=True) == (None, None)
    assert against_own([1, 2, 3, 4], [1.0, 1.0, 1.0, 2.0], quotient=True) == (2.0, None)
    assert against_own([1, 2, 3, 4], [1.0, 0.0, 1.0, 2.0], quotient=True) == (None, None)
    assert against_own([1] * 9, [1.0] * 8 + [3.0], quotient=False) == (2.0, 2.0)  # a step that comes again


# -- changes of level ----------------------------------------------------------------------------------------------


def series(kind, blocks, count, rng):
    noise = rng.normal(size=(blocks, count))
    if kind == "normal":
        return 0.1 * noise
    if kind == "heavy tails":
        return 0.1 * rng.standard_t(4, size=(blocks, count))
    if kind == "drifting":
        return np.cumsum(0.05 * noise, axis=1) + 0.05 * rng.normal(size=(blocks, count))
    return -np.log(np.arange(1, count + 1)) * (1 + 0.2 * rng.random((blocks, 1))) + 0.05 * noise  # settling


KINDS = ("normal", "heavy tails", "drifting", "settling")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("blocks", "count"), [(6, 20), (6, 100), (30, 60)])
def test_healthy_series_rarely_change(kind, blocks, count):
    """At most one run in twenty, all blocks together, says that something changed by a quarter or more."""
    runs = 100
    healthy = [own_parts(np.exp(series(kind, blocks, count, RNG(seed)))) for seed in range(runs)]
    false = sum(bool(change_points(values, smallest=math.log(1.25))) for values in healthy)
    assert false <= 0.05 * runs


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_whose_level_doubles_is_found_and_dated(kind):
    """The control of the test above."""
    found = 0
    for seed in range(40):
        values = series(kind, 6, 60, RNG(seed))
        values[2, 35:] += math.log(4)
        changes = change_points(own_parts(np.exp(values)), smallest=math.log(1.25))
        hits = [c for c in changes if c.series == 2 and abs(c.index - 35) <= 1 and 0.7 < c.size < 2.1]
        found += bool(hits)
    assert found >= 36


def test_a_change_is_known_two_values_later_and_an_outlier_is_none():
    values = 0.05 * RNG(0).normal(size=(6, 40))
    values[4, 30:] += 1.0
    assert change_points(values[:, :31]) == []
    for seen in (32, 33, 40):
        (change,) = change_points(values[:, :seen])
        assert (change.series, change.index) == (4, 30)
    outlier = 0.05 * RNG(0).normal(size=(6, 40))
    outlier[4, 30] += 5.0
    assert change_points(outlier) == []


def test_what_all_blocks_do_is_nobodys_own():
    values = np.exp(0.05 * RNG(0).normal(size=(6, 40)))
    values[:, 20:] *= 5.0
    assert change_points(own_parts(values)) == []
    assert {c.series for c in change_points(np.log(values))} == set(range(6))


@pytest.mark.parametrize("values", [np.zeros((3, 40)), np.ones((2, 3)), np.zeros((1, 0))])
def test_nothing_to_see(values):
    assert change_points(values) == []


# -- the slope of the loss -----------------------------------------------------------------------------------------


def losses(slope, count=200, noise=0.1, lasting=0.0, seed=0):
    rng = RNG(seed)
    own = rng.normal(size=count)
    for i in range(1, count):
        own[i] += lasting * own[i - 1]
    return 3.0 + slope * np.arange(count) + noise * own


def test_slope_of_a_line():
    found = loss_slope(range(0, 400, 2), 3.0 - 0.01 * np.arange(200))
    assert (found.mean, found.low, found.high) == pytest.approx((-0.005, -0.005, -0.005))
    assert found.falling
    assert found.steps == 198


@pytest.mark.parametrize("lasting", [0.0, 0.5])
def test_a_flat_loss_is_rarely_said_to_fall_and_a_falling_one_often(lasting):
    flat = [loss_slope(range(200), losses(0.0, lasting=lasting, seed=s)) for s in range(400)]
    assert sum(s.falling for s in flat) <= 0.05 * len(flat)  # 2.5 % wanted
    assert sum(not s.low <= 0 <= s.high for s in flat) <= 0.08 * len(flat)
    falling = [loss_slope(range(200), losses(-3e-3, lasting=lasting, seed=s)) for s in range(100)]
    assert sum(s.falling for s in falling) >= 90


def test_only_the_recent_past_counts():
    early = list(np.linspace(10, 3, 500))
    assert loss_slope(range(1000), early + list(losses(0.0, 500))).falling is False
    assert loss_slope(range(500), early).falling


def test_too_few_losses_and_losses_that_are_no_numbers():
    assert loss_slope(range(31), [1.0] * 31) is None
    assert loss_slope([5] * 50, [1.0] * 50) is None
    values = losses(-0.01, 100)
    values[50] = math.nan
    values[60] = math.inf
    assert loss_slope(range(100), values).falling


# -- equivalent steps ----------------------------------------------------------------------------------------------


def test_equivalent_steps():
    gain = Paired(0.03, 0.002, 20).interval()
    found = equivalent_steps(gain, Slope(-1e-4, -2e-4, -0.5e-4, 100))
    assert (found.mean, found.low, found.high) == pytest.approx((300, gain.low / 2e-4, gain.high / 0.5e-4))
    flat = equivalent_steps(gain, Slope(-1e-4, -3e-4, 1e-4, 100))
    assert (flat.mean, flat.low, flat.high) == (None, pytest.approx(gain.low / 3e-4), None)
    rising = equivalent_steps(gain, Slope(2e-4, 1e-4, 3e-4, 100))
    assert (rising.mean, rising.low, rising.high) == (None, None, None)
    none = equivalent_steps(Paired(-0.01, 0.002, 20).interval(), Slope(-1e-4, -2e-4, -0.5e-4, 100))
    assert (none.mean, none.low, none.high) == (0.0, 0.0, 0.0)


def test_slope_of_the_probe_over_a_window_of_steps():
    steps = np.arange(0, 1000, 20)
    losses = np.where(steps < 500, 3.0 - 0.002 * steps, 2.0)
    wiggle = np.random.default_rng(0).normal(scale=1e-3, size=len(steps))
    flat, whole = probe_slope(steps, losses + wiggle, 300), probe_slope(steps, losses, 1000)
    assert (flat.steps, flat.falling, flat.gains(0.0)) == (300, False, False)
    assert whole.falling
    plain = probe_slope(steps, 3.0 - 0.002 * steps, 200)
    assert plain.mean == pytest.approx(-0.002)
    assert plain.gains(0.399)
    assert not plain.gains(0.401)
    noise = np.random.default_rng(1).normal(size=(2000, 6))
    assert 0.015 < np.mean([probe_slope(range(6), row, 10).falling for row in noise]) < 0.035


def test_slope_of_too_few_looks():
    assert probe_slope([], [], 10) is None
    assert probe_slope(range(4), [1.0] * 4, 10) is None
    assert probe_slope(range(40), [1.0] * 40, 3) is None


# -- training's loss and the probe's --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("training", "probe", "gap"),
    [
        ([2.86] * 20, [1.76, 1.76], 1.10),  # padding that counts
        ([0.4, 0.5, 0.6], [2.0, 2.1], -1.5),  # memorised
        ([1.9] * 20, [1.76, 1.75], None),  # dropout
        ([2.0] * 20, [2.6, 1.7], None),  # it fell between the two
        ([1.0, 9.0, 1.0], [1.0, 1.0], None),  # one bad batch
        ([0.2], [0.05, 0.05], None),  # little of little
        ([math.nan], [1.0, 1.0], None),
        ([], [1.0, 1.0], None),
    ],
)
def test_losses_that_are_far_apart(training, probe, gap):
    assert loss_gap(training, probe) == (None if gap is None else pytest.approx(gap))


def test_progress_that_noise_hides_in_the_recent_past_is_that_of_longer_at_half_its_slope():
    noise = np.random.default_rng(0).normal(scale=0.25, size=320)
    losses = list(3.0 - 0.0015 * np.arange(320) + noise)
    recent, found = loss_slope(range(320), losses), progress_slope(range(320), losses)
    assert not recent.falling
    assert recent.mean < 0
    assert found.falling
    assert -0.0015 < found.mean < -0.0004
    assert found.steps == recent.steps


def test_a_loss_that_has_got_flat_makes_no_progress():
    noise = np.random.default_rng(0).normal(scale=0.05, size=400)
    losses = list(3.0 - 0.002 * np.minimum(np.arange(400), 290) + noise)
    assert loss_slope(range(400), losses) == progress_slope(range(400), losses)
    steady = list(3.0 - 0.002 * np.arange(400) + noise)
    assert loss_slope(range(400), steady) == progress_slope(range(400), steady)
    assert loss_slope(range(400), steady).falling
