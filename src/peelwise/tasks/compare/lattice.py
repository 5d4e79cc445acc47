"""Whether the weights of a matrix lie on a few values per group, as quantised ones do."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_GROUPS = (256, 128, 64, 32, 16)  # along a row, after the whole row
_SAMPLED = 192  # groups looked at
_MOST_STEPS = 255  # of an evenly spaced lattice: eight bits
_MOST_LEVELS = 16  # of one that is not even, such as NF4
_OFF = 0.06  # of a step that a value may be off its place: bfloat16 rounds by less, for the bits that matter
_SHARE = 0.9  # of the groups that must agree


@dataclass(frozen=True)
class Lattice:
    """Values per group: ``steps`` of an even spacing between the least and the largest, or ``levels`` otherwise."""

    group: int  # 0: the whole row
    steps: int | None
    levels: int | None

    @property
    def size(self) -> int:
        """Number of values."""
        return self.steps + 1 if self.steps is not None else self.levels or 0


def lattice_of(W: Tensor) -> Lattice | None:
    """Return the coarsest lattice, over the largest groups, that rows of ``W [d_out, d_in]`` lie on, or ``None``."""
    d_in = W.shape[1]
    for group in (d_in, *(g for g in _GROUPS if g < d_in and d_in % g == 0)):
        rows = _sample(W.reshape(-1, group))
        if len(rows) == 0:
            continue
        found = Lattice(0 if group == d_in else group, _steps(rows), _levels(rows))
        if found.steps is not None or found.levels is not None:
            return found
    return None


def lattice_at(W: Tensor, group: int) -> Lattice | None:
    """Return the lattice over groups of one size (0: rows), or ``None``."""
    rows = _sample(W.reshape(-1, group or W.shape[1]))
    found = Lattice(group, _steps(rows), _levels(rows)) if len(rows) else None
    return None if found is None or found.size == 0 else found


def _sample(groups: Tensor) -> Tensor:
    """Return some groups ``[s, g]`` that are not constant, from everywhere, float64."""
    stride = max(1, len(groups) // (2 * _SAMPLED))
    some = groups[::stride].double()
    return some[(some.amax(1) > some.amin(1))][:_SAMPLED]


def _steps(rows: Tensor) -> int | None:
    """Return the least number of even steps from the least to the largest value that all values lie on."""
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    place = (rows - low) / (high - low)  # [s, g] in 0..1
    found = torch.full((len(rows),), _MOST_STEPS + 1, device=rows.device)
    for steps in range(1, min(_MOST_STEPS, rows.shape[1] * 8) + 1):
        open_ = (found > _MOST_STEPS).nonzero().squeeze(1)
        if len(open_) == 0:
            break
        scaled = place[open_] * steps
        on = ((scaled - scaled.round()).abs().amax(1)) <= _OFF
        found[open_[on]] = steps
    # Extremes of a group need not be the lattice's: the largest of most groups is the number that is meant.
    largest = int(torch.quantile(found.double(), _SHARE).ceil())
    return largest if largest <= _MOST_STEPS else None


def _levels(rows: Tensor) -> int | None:
    if rows.shape[1] < 4 * _MOST_LEVELS:
        return None
    ordered = rows.sort(dim=1).values
    counts = (ordered.diff(dim=1) > 0).sum(dim=1) + 1
    largest = int(torch.quantile(counts.double(), _SHARE).ceil())
    return largest if largest <= _MOST_LEVELS else None
