"""What a series of numbers over training says: medians, trends, changes of level, the slope of the loss. No torch.

A block's own history is the strongest evidence there is about it: blocks differ by factors of ten from each other,
and much less from what they were a while ago. All functions are pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from peelwise.records.base import Interval

WINDOW = 20  # earlier values that make a running median or trend
_FEWEST_FOR_MEDIAN, _FEWEST_FOR_TREND = 3, 5
_GROUPS, _FEWEST_LOSSES = 16, 32
_FEWEST_LOOKS = 5  # in the same span of steps; their text is always the same
_SHORTEST_LOSS_WINDOW, _LONGEST_LOSS_WINDOW, _LOSS_SHARE = 100, 2000, 0.2
_LONGER, _AS_STEEP = 3, 0.75  # times that window, where it does not show a slope; of the slope of the longer one
_LOSSES_APART, _LEAST_APART = 0.2, 0.3  # part of the probe's loss; nats per token
_ROBUST = 1.4826  # median absolute deviation of normal numbers -> standard deviation

_Array = NDArray[np.float64]


def against_own(
    steps: Sequence[float], values: Sequence[float], *, quotient: bool
) -> tuple[float | None, float | None]:
    """Return the last value against the running median, and against the trend, of the values before it.

    The trend is Theil and Sen's line through the last ``WINDOW`` values, continued to the last step.

    Args:
        steps: when the values were seen, increasing.
        values: in time order; the last one is compared.
        quotient: whether to divide (positive values: the line goes through their logarithms) or to subtract.

    Returns:
        ``(to_median, to_trend)``; ``None`` where there are too few values before, or a quotient of none above zero.
    """
    if quotient and min(values) <= 0:
        return None, None
    y = np.log(values) if quotient else np.asarray(values, dtype=np.float64)
    x, past = np.asarray(steps, dtype=np.float64)[-WINDOW - 1 :], y[-WINDOW - 1 : -1]
    to_median = y[-1] - np.median(past) if len(past) >= _FEWEST_FOR_MEDIAN else None
    to_trend = y[-1] - _continued(x[:-1], past, x[-1]) if len(past) >= _FEWEST_FOR_TREND else None
    return _back(to_median, quotient), _back(to_trend, quotient)


def _back(difference: float | None, quotient: bool) -> float | None:
    return None if difference is None else float(np.exp(difference) if quotient else difference)


def _continued(x: _Array, y: _Array, at: float) -> float:
    """Return Theil and Sen's line through ``(x, y)`` at another place."""
    first, second = np.triu_indices(len(x), k=1)
    apart = x[second] > x[first]
    slope = float(np.median((y[second] - y[first])[apart] / (x[second] - x[first])[apart])) if apart.any() else 0.0
    return float(np.median(y - slope * x) + slope * at)


@dataclass(frozen=True)
class ChangePoint:
    """A lasting change of level of one series: the first value behind it, and by how much.

    ``size`` is in the units of the series, ``deviations`` in robust standard deviations of such differences.
    """

    series: int
    index: int
    size: float
    deviations: float


def own_parts(values: ArrayLike) -> _Array:
    """Return the logarithms of positive ``values [series, n]`` without what all series do together (their median)."""
    logs = np.log(np.asarray(values, dtype=np.float64))
    parts: _Array = logs - np.median(logs, axis=0)
    return parts


def change_points(
    values: ArrayLike, *, window: int = 3, deviations: float = 6.0, smallest: float = 0.0
) -> list[ChangePoint]:
    """Return lasting changes of level in ``values [series, n]``, dated, largest first within each series.

    The median of ``window`` values from a moment on is compared with that of the ``window`` values before it. The
    difference must exceed ``deviations`` times what is usual: the noise between neighbouring values of the series
    itself, or the robust deviation of these differences over all series and moments, whichever is larger. A single
    outlier is no change, and neither is a drift that all series show.

    Args:
        values: one row per series; for positive numbers of blocks, `own_parts`.
        window: values on each side; a change is found when most of ``window`` values lie behind it.
        deviations: how unusual a change must be.
        smallest: how large it must be, in the units of the series.
    """
    x = np.atleast_2d(np.asarray(values, dtype=np.float64))
    count = x.shape[1]
    if count < 2 * window + 2:
        return []
    medians = np.median(np.lib.stride_tricks.sliding_window_view(x, window, axis=1), axis=2)
    jumps = medians[:, window:] - medians[:, :-window]  # [series, n - 2 window + 1]
    noise = _deviation(np.diff(x, axis=1), axis=1) / 2**0.5  # [series]
    usual = np.maximum(noise, float(_deviation(jumps.ravel(), axis=0)))
    found = []
    for series, row in enumerate(np.abs(jumps)):
        left = row.copy()
        while (place := int(left.argmax()), float(left.max()))[1] > max(deviations * usual[series], smallest, 0.0):
            unit = max(float(usual[series]), np.finfo(float).tiny)
            size = float(jumps[series, place])
            # A median moves when most of its values have: the first value beyond half way dates the change.
            first = place + window - window // 2
            behind = np.sign(size) * (x[series, first:] - medians[series, place]) > abs(size) / 2
            found.append(ChangePoint(series, first + int(behind.argmax()), size, abs(size) / unit))
            left[max(place - 2 * window + 1, 0) : place + 2 * window] = 0.0  # neighbours see the same change
    return found


def _deviation(values: _Array, axis: int) -> _Array:
    centred = values - np.median(values, axis=axis, keepdims=True)
    deviation: _Array = _ROBUST * np.median(np.abs(centred), axis=axis)
    return deviation


@dataclass(frozen=True)
class Slope:
    """Change of the loss per step with its 95 % interval; ``steps`` is the length of the window."""

    mean: float
    low: float
    high: float
    steps: float

    @property
    def falling(self) -> bool:
        """Whether the loss is shown to be falling."""
        return self.high < 0

    def gains(self, nats: float) -> bool:
        """Whether the loss is shown to be falling, by more than ``nats`` in the window."""
        return self.falling and -self.mean * self.steps > nats


def loss_slope(steps: Sequence[float], losses: Sequence[float]) -> Slope | None:
    """Return the slope of the loss over the recent past: the last fifth of the run, but 100 to 2,000 losses.

    Least squares through the means of 16 groups of neighbouring losses, so that noise that lasts over some
    steps does not make the interval too narrow; Student's t with 14 degrees of freedom.

    Args:
        steps: training steps, increasing.
        losses: as many; those that are not finite are left out.

    Returns:
        The slope, or ``None`` with fewer than 32 losses.
    """
    return _slope_of_last(steps, losses, _window(len(losses)))


def progress_slope(steps: Sequence[float], losses: Sequence[float]) -> Slope | None:
    """Return the slope that says how fast training goes on: of the recent past, or where noise hides it, of longer.

    In the first minutes a hundred losses of small batches are too few to show a slope that three hundred show. These
    count where the recent past goes on at three quarters of their slope, as far as can be told, and then with half of
    it: a loss that gets flat falls by less than it did.

    Args:
        steps: training steps, increasing.
        losses: as many; those that are not finite are left out.
    """
    recent = loss_slope(steps, losses)
    if recent is None or recent.falling:
        return recent
    longer = _slope_of_last(steps, losses, _LONGER * _window(len(losses)))
    if longer is None or not longer.falling or recent.mean > _AS_STEEP * longer.mean:
        return recent
    return Slope(longer.mean / 2, longer.low / 2, longer.high / 2, recent.steps)


def _window(losses: int) -> int:
    return int(min(max(_SHORTEST_LOSS_WINDOW, _LOSS_SHARE * losses), _LONGEST_LOSS_WINDOW))


def _slope_of_last(steps: Sequence[float], losses: Sequence[float], wanted: int) -> Slope | None:
    x, y = np.asarray(steps[-wanted:], dtype=np.float64), np.asarray(losses[-wanted:], dtype=np.float64)
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    if len(y) < _FEWEST_LOSSES:
        return None
    groups = np.array_split(np.arange(len(y)), _GROUPS)
    gx, gy = (np.array([v[g].mean() for g in groups]) for v in (x, y))
    return _line(gx, gy, float(x[-1] - x[0]))


def probe_slope(steps: Sequence[float], losses: Sequence[float], window: float) -> Slope | None:
    """Return the slope of the probe's own loss over the last ``window`` steps: few values, but all of the same text.

    Least squares; Student's t with ``n - 2`` degrees of freedom.

    Args:
        steps: of the measurements, increasing.
        losses: as many, finite.
        window: how far to look back from the last of them, in steps.

    Returns:
        The slope, or ``None`` with fewer than five measurements in the window.
    """
    x, y = np.asarray(steps, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    recent = x >= x[-1] - window if len(x) else np.zeros(0, dtype=bool)
    x, y = x[recent], y[recent]
    return None if len(y) < _FEWEST_LOOKS else _line(x, y, float(x[-1] - x[0]))


def loss_gap(training: Sequence[float], probe: Sequence[float]) -> float | None:
    """Return how far training's loss is above the probe's (below: negative), or ``None`` where that is not by far.

    By far is more than a fifth of the probe's loss and more than 0.3: dropout and noise make less.

    Args:
        training: recent losses; their median counts.
        probe: losses of the probe around the same time; between the lowest and the highest nothing is apart.
    """
    known = [value for value in training if np.isfinite(value)]
    if not known or not probe:
        return None
    middle, low, high = float(np.median(known)), min(probe), max(probe)
    gap = middle - high if middle > high else min(middle - low, 0.0)
    return gap if abs(gap) > max(_LOSSES_APART * high, _LEAST_APART) else None


def _line(x: _Array, y: _Array, steps: float) -> Slope | None:
    from scipy.special import stdtrit

    centred, free = x - x.mean(), len(x) - 2
    spread = float(centred @ centred)
    if spread == 0:
        return None
    mean = float(centred @ y) / spread
    residual = y - y.mean() - mean * centred
    half = float(stdtrit(free, 0.975)) * float(residual @ residual / free / spread) ** 0.5
    return Slope(mean, mean - half, mean + half, steps)


@dataclass(frozen=True)
class EquivalentSteps:
    """How many steps of training at the present slope a recoverable loss is worth.

    ``mean`` and ``high`` are ``None`` where the loss is not shown to be falling: no number of steps is then known to
    be enough. ``low`` uses the smallest gain and the steepest slope that the intervals allow; ``None`` where
    that slope does not fall either.
    """

    mean: float | None
    low: float | None
    high: float | None


def equivalent_steps(recoverable: Interval, slope: Slope) -> EquivalentSteps:
    """Return ``recoverable / decrease per step`` with the ends of both intervals; amounts below zero count as zero."""
    nats = [max(value, 0.0) for value in (recoverable.mean, recoverable.low, recoverable.high)]
    return EquivalentSteps(
        nats[0] / -slope.mean if slope.falling else None,
        nats[1] / -slope.low if slope.low < 0 else None,
        nats[2] / -slope.high if slope.falling else None,
    )
