"""The level that successive measurements show of a number that drifts: a local-level model of every block. No torch.

Measurement ``k`` at time ``u_k = log(1 + step)`` gives ``y_k`` with error ``e_k``, on report sequences of its own:

    y_k = level_k + noise_k              noise_k ~ (0, e_k^2), independent between measurements
    level_k = level_(k-1) + drift_k      drift_k ~ (0, q (u_k - u_(k-1)))

Changes of a training run are about as large from step 1,000 to 2,000 as from 100 to 200, hence the logarithm. For a
known ``q`` Kalman's filter gives each measurement its weight ``a_k``, which falls with its age, and the level now has

    mean  sum a_k y_k        variance  sum a_k^2 e_k^2 + what may have drifted between and since

``q`` is the same for all blocks. It is not known, so it is averaged over: a grid of values, weighed by how likely they
make the measurements, the latest most. The smallest is 0.03 of an error's variance between two measurements, so that no
more than about the last six count in full, however still a run seems to stand. Degrees of freedom follow from those of
the errors (Satterthwaite), the skewness from the third moments. A value more than three deviations from what was
expected begins anew, for a fault is no drift; it counts as three for the likelihood of ``q``. (A. C. Harvey,
"Forecasting, structural time series models and the Kalman filter", Cambridge, 1989.)

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
_DRIFTS = np.geomspace(0.03, 30.0, 13)  # [q]
_SHARED = 0.4  # of the logarithm of a likelihood: blocks are measured on the same sequences, so their noise is alike
_PRIOR_ROWS = 20.0  # degrees of freedom that the block's usual error counts for, beside a measurement's own
_FORGET = 0.8  # of a likelihood, with every later measurement: a run may have stood still and fall now
_TINY = 1e-300
_Array = NDArray[np.float64]


@dataclass(frozen=True)
class Observed:
    """One measurement of a block's number.

    Attributes:
        report: places of the sequences it was made on.
        anew: whether it was too far from what was expected to be drift.
    """

    step: int
    value: Paired
    report: range
    anew: bool = False


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
            self._known[block] = [*self._known.get(block, []), Observed(step, value, report, jumped)][-_REMEMBERED:]

    def forget_from(self, step: int) -> None:
        """Forget what was measured from a step on."""
        self._known = {b: kept for b, old in self._known.items() if (kept := [o for o in old if o.step < step])}

    def drop(self, block: int) -> None:
        """Forget what was measured of a block."""
        self._known.pop(block, None)

    @property
    def count(self) -> int:
        """How many measurements of a block there are, of the one that has most."""
        return max(map(len, self._known.values()), default=0)

    def at(self, step: int) -> dict[int, Paired]:
        """Return the level of every block measured at a step, which is not before the last measurement."""
        if not self._known:
            return {}
        return dict(zip(self._known, combined(_table(list(self._known.values())), math.log1p(step)), strict=True))


@dataclass(frozen=True)
class Table:
    """Measurements of several blocks, ``[blocks, measurements]`` each, as rows that end in NaN where there are fewer.

    Attributes:
        u: their times, rising.
        y: what was measured, nats per token.
        e: standard errors of it.
        df: their degrees of freedom.
        third: third central moments of the means.
        anew: 1 where a block's level begins anew, else 0.
    """

    u: _Array
    y: _Array
    e: _Array
    df: _Array
    third: _Array
    anew: _Array


def _table(histories: list[list[Observed]]) -> Table:
    out = np.full((6, len(histories), max(map(len, histories))), np.nan)
    for row, history in enumerate(histories):
        for k, one in enumerate(history):
            v = one.value
            third = v.skewness / v.sequences**0.5 * v.standard_error**3
            out[:, row, k] = math.log1p(one.step), v.mean, v.standard_error, v.sequences - 1, third, one.anew
    return Table(*out)


@dataclass
class _Filtered:
    """What is known of every block for every ``q``, ``[blocks, q]`` each.

    Attributes:
        mean: of the level.
        P: its variance as the weights see it.
        own: ``sum a^2 e^2``.
        drift: what may have drifted, squared and weighed alike.
        third: ``sum a^3 third``.
        spread: ``sum a^4 e^4 / df``.
    """

    mean: _Array
    P: _Array
    own: _Array
    drift: _Array
    third: _Array
    spread: _Array


def combined(table: Table, now: float) -> list[Paired]:
    """Return the level of every block at a time, by the local-level model."""
    usual = _usual(table.e, table.df)
    between = np.diff(table.u, axis=1)
    between = between[np.isfinite(between)]
    apart = float(np.median(between)) if between.size else 1.0
    noisy = usual[usual > 0]
    q = _DRIFTS * (float(np.median(noisy)) if noisy.size else 0.0) / max(apart, 1e-12)  # [q]
    state, likely, last = _filtered(table, usual, q)
    weights = np.exp(_SHARED * (likely - likely.max()))
    weights /= weights.sum()  # [q]
    level = state.mean @ weights
    drift = state.drift + (now - last)[:, None] * q
    variance = (state.own + drift + (state.mean - level[:, None]) ** 2) @ weights
    freedom = np.minimum(variance**2 / np.maximum(state.spread @ weights, _TINY), np.nansum(table.df + 1, axis=1))
    third = state.third @ weights
    return [_paired(*numbers) for numbers in zip(level, variance, freedom, third, strict=True)]


def _filtered(table: Table, usual: _Array, q: _Array) -> tuple[_Filtered, _Array, _Array]:
    """Run Kalman's filter for every ``q``: states, the logarithm of each likelihood ``[q]``, times of the last ones."""
    known = np.isfinite(table.u)
    # What is not there gets no weight.
    y, e, df, third, usual = (np.where(known, a, 1.0) for a in (table.y, table.e, table.df, table.third, usual))
    e = np.where(
        e > 0, e, usual**0.5
    )  # where no step helped, a witness gains nothing for certain; the level is not known
    first = [np.repeat(a[:, :1], len(q), axis=1) for a in (y, usual, e**2, 0 * e, third, e**4 / df)]
    state, likely, last = _Filtered(*first), np.zeros(len(q)), table.u[:, 0]
    for k in range(1, table.u.shape[1]):
        here, anew = known[:, k, None], (table.anew[:, k] == 1)[:, None]
        step = np.where(here, table.u[:, k, None] - last[:, None], 0.0) * q
        ahead = np.maximum(state.P + step + usual[:, k, None], _TINY)  # variance of what is expected to be measured
        off = y[:, k, None] - state.mean
        apart = np.where(anew, np.minimum(off**2 / ahead, _JUMP**2), off**2 / ahead)
        likely = _FORGET * likely - 0.5 * np.where(here, np.log(ahead) + apart, 0.0).sum(0)
        K = np.where(here, np.where(anew, 1.0, (state.P + step) / ahead), 0.0)
        rest = 1 - K
        state = _Filtered(
            state.mean + K * off,
            np.where(anew, usual[:, k, None], rest * (state.P + step)),
            rest**2 * state.own + K**2 * e[:, k, None] ** 2,
            rest**2 * (state.drift + step),
            rest**3 * state.third + K**3 * third[:, k, None],
            rest**4 * state.spread + K**4 * e[:, k, None] ** 4 / df[:, k, None],
        )
        last = np.where(known[:, k], table.u[:, k], last)
    return state, likely, last


def _paired(mean: float, variance: float, freedom: float, third: float) -> Paired:
    sequences = max(int(freedom + 1e-6) + 1, 2)
    skewness = third / variance**1.5 * sequences**0.5 if variance > 0 else 0.0
    return Paired(float(mean), float(variance) ** 0.5, sequences, float(skewness))


def _usual(e: _Array, df: _Array) -> _Array:
    """Return each measurement's variance, drawn to what is usual for its block by the number of sequences.

    Weights follow from it, because an error that is small by chance would take more weight than it deserves.
    """
    rows = df + 1
    usual = np.nansum(e**2 * rows * df, axis=1) / np.nansum(df, axis=1)  # [blocks], of one sequence
    return np.asarray((df * e**2 + _PRIOR_ROWS * usual[:, None] / rows) / (df + _PRIOR_ROWS))
