"""Which blocks are unlike their neighbours: a rule over the signals of all blocks against depth. No torch.

1. Every signal is compared over depth by kind of part (a query matrix with query matrices), as a logarithm where it is
   a quotient. Its **deviation** at a block is the difference from the median of the blocks up to three away, over the
   robust spread of such differences over depth.
2. Signals that measure nearly the same thing form a **family**; a family's say is the largest deviation in it, so that
   ten ways of measuring a norm do not outvote one slope.
3. A block's **score** combines its families; a block is named when its score reaches the threshold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from peelwise.records.check import SignalReason
from peelwise.records.signals import SIGNALS

Floats = NDArray[np.float64]
Key = tuple[str, str]  # signal, part

LEAST_BLOCKS = 5
REACH = 3
THRESHOLD = 6.0


@dataclass(frozen=True)
class Unlikeness:
    """The scores of all blocks, and what they are made of.

    Attributes:
        scores: ``[blocks]``, larger is more unlike its neighbours.
        deviations: per signal and part ``[blocks]``, NaN where there is no value.
        typical: per signal and part ``[blocks]``, the median of the neighbours.
    """

    scores: Floats
    deviations: dict[Key, Floats]
    typical: dict[Key, Floats]


def unlikeness(values: Mapping[Key, Sequence[float | None]], blocks: int) -> Unlikeness | None:
    """Return the scores of all blocks, or ``None`` for fewer than five blocks, which have no depth to compare with.

    Args:
        values: per signal and part, one value per block, ``None`` where it has none.
        blocks: how many there are.
    """
    if blocks < LEAST_BLOCKS:
        return None
    deviations, typical = {}, {}
    for key, row in values.items():
        found = deviation(np.array([np.nan if v is None else v for v in row]), SIGNALS[key[0]].quotient)
        if found is not None:
            deviations[key], typical[key] = found
    scores = np.zeros(blocks)
    for row in deviations.values():
        scores = np.fmax(scores, np.abs(row))
    return Unlikeness(scores, deviations, typical)


def deviation(values: Floats, quotient: bool) -> tuple[Floats, Floats] | None:
    """Return robust deviations from the neighbours' median ``[blocks]``, and that median, for one signal over depth.

    Args:
        values: ``[blocks]``, NaN where there is none.
        quotient: compare logarithms.
    """
    x = np.log(np.maximum(values, 1e-30)) if quotient else values
    known = np.isfinite(x)
    if known.sum() < LEAST_BLOCKS:
        return None
    near = np.array([_near(x, place) for place in range(len(x))])
    away = x - near
    spread = 1.4826 * float(np.nanmedian(np.abs(away)))
    floor = 0.02 * float(np.nanmedian(np.abs(x))) + 1e-9
    return away / max(spread, floor), np.exp(near) if quotient else near


def named(scores: Floats, threshold: float = THRESHOLD) -> list[int]:
    """Return the blocks whose score reaches the threshold, the most unlike first."""
    return [int(b) for b in np.argsort(-scores, kind="stable") if scores[b] >= threshold]


def reasons(
    found: Unlikeness, values: Mapping[Key, Sequence[float | None]], block: int, most: int = 3
) -> tuple[SignalReason, ...]:
    """Return the signals that say most clearly that a block is unlike, one per family, the strongest first."""
    ranked = sorted(
        ((abs(float(row[block])), key) for key, row in found.deviations.items() if np.isfinite(row[block])),
        reverse=True,
    )
    chosen: list[SignalReason] = []
    for _, (signal, part) in ranked:
        value = values[signal, part][block]
        if value is None or any(each.signal == signal for each in chosen):
            continue
        typical = float(found.typical[signal, part][block])
        chosen.append(
            SignalReason(
                signal=signal,
                part=part,
                value=value,
                typical=typical if np.isfinite(typical) else None,
                deviation=float(found.deviations[signal, part][block]),
            )
        )
        if len(chosen) == most:
            break
    return tuple(chosen)


def _near(x: Floats, place: int) -> float:
    """Return the median of the values up to `REACH` blocks away, without that of the place itself."""
    around = [x[i] for i in range(max(0, place - REACH), min(len(x), place + REACH + 1)) if i != place]
    alive = [v for v in around if np.isfinite(v)]
    return float(np.median(alive)) if alive else float("nan")
