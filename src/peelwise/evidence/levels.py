"""The level that successive measurements show of a number that drifts: a local-level model of every block. No torch.

Measurement ``k`` at time ``u_k = log(1 + step)`` gives ``y_k`` with error ``e_k``, on report sequences of its own:

    y_k = level_k + noise_k              noise_k ~ (0, e_k^2), independent between measurements
    level_k = level_(k-1) + drift_k      drift_k ~ (0, q (u_k - u_(k-1)))

Changes of a training run are about as large from step 1,000 to 2,000 as from 100 to 200, hence the logarithm. For a
known ``q`` Kalman's filter gives each measurement its weight ``a_k``, which falls with its age, and the level now has

    mean  sum a_k y_k        variance  sum a_k^2 e_k^2 + what may have drifted between and since

``q`` is the same for all blocks. It is not known, so it is averaged over: a grid of values, weighed by how likely they
make all measurements. The smallest is 0.03 of an error's variance between two measurements, so that no more than about
the last six count in full, however still a run seems to stand. Degrees of freedom follow from those of the errors
(Satterthwaite), the skewness from the third moments. A value more than three deviations from what was expected begins
anew: a fault is no drift. (A. C. Harvey, "Forecasting, structural time series models and the Kalman filter", 1989.)

What intervals cover is tested with truths that stand still, walk, settle and jump (tests/evidence/test_levels.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from peelwise.evidence.intervals import Paired

_REMEMBERED = 24  # measurements of a block; older ones would weigh next to nothing
_JUMP = 3.0  # deviations
# Variance of the drift between two measurements, in units of the error's.
_DRIFTS = np.geomspace(0.03, 10.0, 11)  # [q]
_SHARED = 0.4  # of the logarithm of a likelihood: blocks are measured on the same sequences, so their noise is alike
_PRIOR_ROWS = 20.0  # degrees of freedom that the block's usual error counts for, beside a measurement's own
_Array = NDArray[np.float64]


@dataclass(frozen=True)
class Observed:
    """One measurement of a block's number; ``report`` are the places of the sequences it was made on."""

    step: int
    value: Paired
    report: range


@dataclass
class Levels:
    """Remembers the measurements of one number of every block, and gives its level."""

    _known: dict[int, list[Observed]] = field(default_factory=dict)

    def add(
        self,
        step: int,
        values: Mapping[int, Paired],
        report: range = range(0),
        *,
        repeats: Callable[[range], bool] = lambda earlier: False,
    ) -> None:
        """Take a measurement.

        Args:
            step: of the training.
            values: per block.
            report: places of the sequences it was made on.
            repeats: whether it was made on sequences of an earlier measurement, by their places; that one is forgotten,
                because their noise would count twice.
        """
        self._known = {b: kept for b, old in self._known.items() if (kept := [o for o in old if not repeats(o.report)])}
        expected = self.at(step)
        for block, value in values.items():
            before = expected.get(block)
            jumped = before is not None and abs(value.mean - before.mean) > _JUMP * math.hypot(
                before.standard_error, value.standard_error
            )
            history = [] if jumped else self._known.get(block, [])
            self._known[block] = [*history, Observed(step, value, report)][-_REMEMBERED:]

    def forget_from(self, step: int) -> None:
        """Forget what was measured from a step on."""
        self._known = {b: kept for b, old in self._known.items() if (kept := [o for o in old if o.step < step])}

    def drop(self, block: int) -> None:
        """Forget what was measured of a block."""
        self._known.pop(block, None)

    def count(self, block: int) -> int:
        """Return how many measurements a block's level is made of."""
        return len(self._known.get(block, ()))

    def at(self, step: int) -> dict[int, Paired]:
        """Return the level of every block measured at a step, which is not before the last measurement."""
        if not self._known:
            return {}
        tables = _tables(list(self._known.values()))
        return dict(zip(self._known, combined(*tables, now=math.log1p(step)), strict=True))


def _tables(histories: list[list[Observed]]) -> tuple[_Array, _Array, _Array, _Array, _Array]:
    """Return times, values, errors, degrees of freedom and third moments, ``[blocks, measurements]``, NaN behind."""
    longest = max(map(len, histories))
    out = np.full((5, len(histories), longest), np.nan)
    for row, history in enumerate(histories):
        for k, one in enumerate(history):
            v = one.value
            third = v.skewness / v.sequences**0.5 * v.standard_error**3
            out[:, row, k] = math.log1p(one.step), v.mean, v.standard_error, v.sequences - 1, third
    return out[0], out[1], out[2], out[3], out[4]


def combined(u: _Array, y: _Array, e: _Array, df: _Array, third: _Array, *, now: float) -> list[Paired]:
    """Return the level of every block at a time, by the local-level model.

    Args:
        u: times of the measurements, ``[blocks, measurements]``, rising; NaN behind a block's last one.
        y: what was measured, nats per token.
        e: standard errors.
        df: their degrees of freedom.
        third: third central moments of the means.
        now: the time asked about.
    """
    usual = _usual(e, df)
    steps, errors = np.diff(u, axis=1), np.nanmedian(usual)
    between = float(np.nanmedian(steps)) if np.isfinite(steps).any() else 1.0
    q = _DRIFTS * errors / max(between, 1e-12)  # [q]
    blocks = len(u)
    mean = np.repeat(y[:, :1], len(q), axis=1)  # [blocks, q], as all below
    P = np.repeat(usual[:, :1], len(q), axis=1)
    own = np.repeat(e[:, :1] ** 2, len(q), axis=1)  # sum a^2 e^2
    drift, skew = np.zeros_like(P), np.repeat(third[:, :1], len(q), axis=1)
    spread = np.repeat(e[:, :1] ** 4 / df[:, :1], len(q), axis=1)  # sum a^4 e^4 / df
    likely, last = np.zeros(len(q)), u[:, 0].copy()
    for k in range(1, u.shape[1]):
        here = np.isfinite(u[:, k])
        step = np.where(here, u[:, k] - last, 0.0)[:, None] * q
        ahead = P + step + np.where(here, usual[:, k], 1.0)[:, None]  # variance of what is expected to be measured
        off = np.where(here, y[:, k], 0.0)[:, None] - mean
        K = np.where(here[:, None], (P + step) / np.maximum(ahead, 1e-300), 0.0)
        likely -= 0.5 * np.where(here[:, None], np.log(np.maximum(ahead, 1e-300)) + off**2 / np.maximum(ahead, 1e-300), 0.0).sum(0)
        mean += K * off
        P = (1 - K) * (P + step)
        drift = (1 - K) ** 2 * (drift + step)
        own = (1 - K) ** 2 * own + K**2 * np.where(here, e[:, k] ** 2, 0.0)[:, None]
        skew = (1 - K) ** 3 * skew + K**3 * np.where(here, third[:, k], 0.0)[:, None]
        spread = (1 - K) ** 4 * spread + K**4 * np.where(here, e[:, k] ** 4 / np.where(here, df[:, k], 1.0), 0.0)[:, None]
        last = np.where(here, u[:, k], last)
    drift = drift + (now - last)[:, None] * q
    weights = np.exp(_SHARED * (likely - likely.max()))
    weights /= weights.sum()  # [q]
    level = mean @ weights
    variance = (own + drift + (mean - level[:, None]) ** 2) @ weights
    freedom = variance**2 / np.maximum(spread @ weights, 1e-300)
    counted = np.nansum(df + 1, axis=1)
    return [
        _paired(level[b], variance[b], min(freedom[b], counted[b]), float(skew[b] @ weights)) for b in range(blocks)
    ]


def _paired(mean: float, variance: float, freedom: float, third: float) -> Paired:
    sequences = max(int(freedom) + 1, 2)
    skewness = third / variance**1.5 * sequences**0.5 if variance > 0 else 0.0
    return Paired(float(mean), float(variance) ** 0.5, sequences, float(skewness))


def _usual(e: _Array, df: _Array) -> _Array:
    """Return each measurement's variance, drawn to what is usual for its block by the number of sequences.

    Weights follow from it, because an error that is small by chance would take more weight than it deserves.
    """
    rows = df + 1
    usual = np.nansum(e**2 * rows * df, axis=1) / np.nansum(df, axis=1)  # [blocks], of one sequence
    return np.asarray((df * e**2 + _PRIOR_ROWS * usual[:, None] / rows) / (df + _PRIOR_ROWS))
