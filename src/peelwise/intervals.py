"""Intervals of paired differences between sequences, and tests of them against a margin. No torch.

Sequence ``i`` has the summed difference ``s_i`` (nats) over ``t_i`` tokens. The mean per token is the ratio
``m = sum s / sum t`` and its standard error follows from the residuals ``s_i - m t_i``. From 30 sequences on the
interval is Student's t; below, the studentised bootstrap, which allows for skewed differences; below 8 there is
too little to resample and Student's t is used again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from peelwise.errors import TooFewSamplesError
from peelwise.records import Interval

_FEW, _FEWEST = 30, 8
_RESAMPLES = 9_999
_LEAST_SPREAD = 0.01
_Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Paired:
    """The mean of paired differences and what is known of its distribution.

    ``draws`` are the sorted studentised bootstrap means, or ``None`` for Student's t.
    """

    mean: float
    standard_error: float
    sequences: int
    draws: _Array | None = None

    def interval(self, level: float = 0.95) -> Interval:
        """Return the two-sided interval at ``level``, in the units of the differences per token."""
        low_t, high_t = self._quantile((1 - level) / 2), self._quantile((1 + level) / 2)
        return Interval(
            mean=self.mean,
            low=self.mean - high_t * self.standard_error,
            high=self.mean - low_t * self.standard_error,
            standard_error=self.standard_error,
            sequences=self.sequences,
            method="student-t" if self.draws is None else "bootstrap-t",
        )

    def p_at_most(self, margin: float) -> float:
        """Return the one-sided p-value of "the true mean is at most ``margin``"."""
        return 1.0 - self._distribution(self._studentised(margin))

    def p_at_least(self, margin: float) -> float:
        """Return the one-sided p-value of "the true mean is at least ``margin``"."""
        return self._distribution(self._studentised(margin))

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

    def _quantile(self, p: float) -> float:
        from scipy.special import stdtrit

        if self.draws is None:
            return float(stdtrit(self.sequences - 1, p))
        return float(np.quantile(self.draws, p))

    def _distribution(self, t: float) -> float:
        from scipy.special import stdtr

        if self.draws is None:
            return float(stdtr(self.sequences - 1, t))
        # The +1 keeps a p-value above zero: so many resamples cannot exclude less.
        below = np.searchsorted(self.draws, t, side="right")
        return float(np.clip((below + 0.5) / (len(self.draws) + 1), 0, 1 - 0.5 / len(self.draws)))


def paired(sums: ArrayLike, tokens: ArrayLike, *, seed: int = 0) -> Paired:
    """Return the mean difference per token with its uncertainty over sequences.

    Args:
        sums: per sequence, the difference summed over its tokens, nats.
        tokens: per sequence, the number of tokens.
        seed: of the bootstrap.

    Raises:
        TooFewSamplesError: With fewer than two sequences.
    """
    s, t = np.asarray(sums, dtype=np.float64), np.asarray(tokens, dtype=np.float64)
    if len(s) < 2:
        raise TooFewSamplesError(f"An interval needs at least 2 report sequences, got {len(s)}. Use more text.")
    mean, error = _ratio(s, t)
    draws = _bootstrap(s, t, mean, error, seed) if _FEWEST <= len(s) < _FEW and error > 0 else None
    return Paired(float(mean), float(error), len(s), draws)


def holm_rejections(p_values: Sequence[float], level: float) -> list[bool]:
    """Return which hypotheses Holm's step-down procedure rejects at family-wise ``level``."""
    rejected = [False] * len(p_values)
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        if p_values[index] > level / (len(p_values) - rank):
            break
        rejected[index] = True
    return rejected


def _ratio(s: _Array, t: _Array) -> tuple[_Array, _Array]:
    """Mean per token and its standard error along the last axis."""
    n = s.shape[-1]
    total = t.sum(axis=-1)
    mean = s.sum(axis=-1) / total
    residual = s - mean[..., None] * t
    error = np.sqrt(n / (n - 1) * np.square(residual).sum(axis=-1)) / total
    return mean, error


def _bootstrap(s: _Array, t: _Array, mean: _Array, error: _Array, seed: int) -> _Array:
    rows = np.random.default_rng(seed).integers(0, len(s), size=(_RESAMPLES, len(s)))
    means, errors = _ratio(s[rows], t[rows])
    # A resample of equal differences has no spread of its own; without a floor it would end in intervals of 1e298.
    return np.sort((means - mean) / np.maximum(errors, _LEAST_SPREAD * error))
