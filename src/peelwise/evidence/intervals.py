"""Intervals of paired differences between sequences, and tests of them against a margin. No torch.

Sequence ``i`` has the summed difference ``s_i`` (nats) over ``t_i`` tokens. The mean per token is the ratio
``m = sum s / sum t`` and its standard error follows from the residuals ``s_i - m t_i``.

Student's t is the distribution of ``T = (m - truth) / error`` for normal residuals. Skewed ones bias it: a few
long tails are missing from most samples, which then look too certain. Hall's cubic transform takes the skewness
out, with ``g = skewness / sqrt(n)``:

    T' = T + g T^2 / 3 + g^2 T^3 / 27 + g / 6        (monotone, so it can be inverted)

But skewness that is estimated from heavy tails may be noise, and then the correction narrows the wrong end. So
each end of an interval is the wider one of the two, and each p-value the larger one. What they cover is in
docs/method.md. (P. Hall, "On the removal of skewness by transformation", J. R. Statist. Soc. B 54, 1992.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from peelwise.errors import TooFewSamplesError
from peelwise.records.base import Interval

# Below this the transform is the identity to six digits, and its inverse would divide by it.
_NO_SKEWNESS = 1e-6
_Array = NDArray[np.float64]


@dataclass(frozen=True)
class Paired:
    """The mean of paired differences and what is known of its distribution.

    ``skewness`` is that of the residuals, adjusted for few sequences; 0 gives Student's t.
    """

    mean: float
    standard_error: float
    sequences: int
    skewness: float = 0.0

    @classmethod
    def of(cls, interval: Interval) -> Paired:
        """Return what a recorded interval was made of."""
        return cls(interval.mean, interval.standard_error, interval.sequences, interval.skewness)

    def interval(self, level: float = 0.95) -> Interval:
        """Return the two-sided interval at ``level``, in the units of the differences per token."""
        from scipy.special import stdtrit

        t = float(stdtrit(self.sequences - 1, (1 + level) / 2))
        return Interval(
            mean=self.mean,
            low=self.mean - max(t, self._with_skewness(t)) * self.standard_error,
            high=self.mean - min(-t, self._with_skewness(-t)) * self.standard_error,
            standard_error=self.standard_error,
            sequences=self.sequences,
            skewness=self.skewness,
            method="student-t" if self.skewness == 0 else "skewness-corrected-t",
        )

    def p_at_most(self, margin: float) -> float:
        """Return the one-sided p-value of "the true mean is at most ``margin``"."""
        t = self._studentised(margin)
        return 1.0 - self._student(min(t, self._without_skewness(t)))

    def p_at_least(self, margin: float) -> float:
        """Return the one-sided p-value of "the true mean is at least ``margin``"."""
        t = self._studentised(margin)
        return self._student(max(t, self._without_skewness(t)))

    def sequences_needed(self, margin: float) -> int:
        """Return about how many report sequences would separate the mean from ``margin``, if it stays."""
        distance = abs(self.mean - margin)
        if distance == 0:
            return 100 * self.sequences
        needed = self.sequences * (2.5 * self.standard_error / distance) ** 2
        return int(min(max(np.ceil(needed), self.sequences + 1), 100 * self.sequences))

    def _studentised(self, margin: float) -> float:
        if self.standard_error == 0:
            return float(np.inf * np.sign(self.mean - margin)) if self.mean != margin else 0.0
        return (self.mean - margin) / self.standard_error

    def _student(self, t: float) -> float:
        from scipy.special import stdtr

        return float(stdtr(self.sequences - 1, t))

    def _without_skewness(self, t: float) -> float:
        """Return Hall's ``T'`` of a studentised mean ``t``."""
        g = self.skewness / self.sequences**0.5
        if abs(g) < _NO_SKEWNESS or not np.isfinite(t):
            return t
        return float(t + g * t**2 / 3 + g**2 * t**3 / 27 + g / 6)

    def _with_skewness(self, t: float) -> float:
        """Return the studentised mean whose ``T'`` is ``t``."""
        g = self.skewness / self.sequences**0.5
        if abs(g) < _NO_SKEWNESS:
            return t
        return float(3 / g * (np.cbrt(1 + g * (t - g / 6)) - 1))


def paired(sums: ArrayLike, tokens: ArrayLike) -> Paired:
    """Return the mean difference per token with its uncertainty over sequences.

    Args:
        sums: per sequence, the difference summed over its tokens, nats.
        tokens: per sequence, the number of tokens.

    Raises:
        TooFewSamplesError: With fewer than two sequences.
    """
    s, t = np.asarray(sums, dtype=np.float64), np.asarray(tokens, dtype=np.float64)
    n = len(s)
    if n < 2:
        raise TooFewSamplesError(f"An interval needs at least 2 report sequences, got {n}. Use more text.")
    mean = s.sum() / t.sum()
    residual = s - mean * t
    error = np.sqrt(n / (n - 1) * np.square(residual).sum()) / t.sum()
    return Paired(float(mean), float(error), n, _skewness(residual))


@dataclass(frozen=True)
class Share:
    """A quotient of two means with its interval."""

    mean: float
    low: float
    high: float


def ratio(part: ArrayLike, whole: ArrayLike, tokens: ArrayLike, level: float = 0.95) -> Share | None:
    """Return ``r = mean(part) / mean(whole)`` with Fieller's interval: all ``r`` that ``part - r whole`` agrees with.

        (a - r b)^2 <= t^2 Var(a - r b)        a, b the means per token; residuals over sequences give the variances

    Args:
        part, whole: sums per sequence, nats.
        tokens: per sequence.
        level: of the interval.

    Returns:
        ``None`` where ``whole`` is not distinguishable from 0, so that nothing bounds the quotient.

    Source: E. C. Fieller, "Some problems in interval estimation", J. R. Statist. Soc. B 16, 1954.
    """
    from scipy.special import stdtrit

    t = np.asarray(tokens, dtype=np.float64)
    both = np.stack([np.asarray(part, dtype=np.float64), np.asarray(whole, dtype=np.float64)])
    n, (a, b) = len(t), both.sum(1) / t.sum()
    residual = both - np.array([[a], [b]]) * t
    (s_aa, s_ab), (_, s_bb) = n / (n - 1) * residual @ residual.T / t.sum() ** 2
    q = float(stdtrit(n - 1, (1 + level) / 2)) ** 2
    square, middle, rest = b**2 - q * s_bb, a * b - q * s_ab, a**2 - q * s_aa
    if square <= 0:
        return None
    half = np.sqrt(max(middle**2 - square * rest, 0.0))
    return Share(float(a / b), float((middle - half) / square), float((middle + half) / square))


def holm_rejections(p_values: Sequence[float], level: float) -> list[bool]:
    """Return which hypotheses Holm's step-down procedure rejects at family-wise ``level``."""
    rejected = [False] * len(p_values)
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        if p_values[index] > level / (len(p_values) - rank):
            break
        rejected[index] = True
    return rejected


def _skewness(residual: _Array) -> float:
    """Return the skewness of residuals that add up to zero, adjusted for few of them (Fisher and Pearson)."""
    n, scale = len(residual), float(np.abs(residual).max())
    if n < 3 or scale == 0:
        return 0.0
    unit = residual / scale  # cubes of very small numbers would vanish
    return float(np.sqrt(n * (n - 1)) / (n - 2) * np.power(unit, 3).mean() / np.square(unit).mean() ** 1.5)
