"""Codes that are not evenly spaced: four-bit tables and eight-bit floating-point numbers, times a scale.

A code is the value itself, so ``W = s q`` as in every other format; only the nearest code is found in a table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from peelwise.errors import FormatError
from peelwise.formats.scaled import Levels, Scaled


@dataclass(frozen=True)
class Table(Levels):
    """Codes in any distances, in ascending order; ``low``, ``high`` and ``step`` say where they end."""

    values: tuple[float, ...] = ()

    @classmethod
    def of(cls, values: Tensor) -> Table:
        """Return the table of distinct finite ``values``."""
        found = sorted(set(values[values.isfinite()].tolist()))
        return cls(found[0], found[-1], 0, tuple(found))

    @property
    def count(self) -> int:
        """How many codes there are."""
        return len(self.values)

    @property
    def dtype(self) -> torch.dtype:
        """Single precision, which holds every code."""
        return torch.float32

    @property
    def symmetric(self) -> bool:
        """Whether every negated code is a code."""
        return self.values == tuple(-value for value in reversed(self.values))

    def nearest(self, x: Tensor) -> Tensor:
        """Return the code nearest to each value, in the dtype of ``x``; halves go up."""
        codes = self._codes(x)
        return codes[torch.bucketize(x.contiguous(), (codes[1:] + codes[:-1]) / 2, right=True)]

    def contains(self, codes: Tensor) -> Tensor:
        """Return for every value whether it is a code."""
        return torch.isin(codes, self._codes(codes))

    def moved(self, codes: Tensor, signs: Tensor) -> Tensor:
        """Return the codes that are next in the direction of ``signs`` (-1, 0, 1); those at the end stay."""
        known = self._codes(codes)
        at = torch.bucketize(codes.contiguous(), (known[1:] + known[:-1]) / 2, right=True)
        return known[(at + signs.long()).clamp(0, self.count - 1)]

    def position(self, x: Tensor) -> Tensor:
        """Return where values stand on a line with the codes at 0, 1 .. count - 1."""
        codes = self._codes(x)
        below = (torch.bucketize(x.contiguous(), codes, right=True) - 1).clamp(0, self.count - 2)
        return below + (x - codes[below]) / (codes[below + 1] - codes[below])

    def _codes(self, like: Tensor) -> Tensor:
        return torch.tensor(self.values, dtype=like.dtype, device=like.device)


def _float_table(dtype: torch.dtype) -> Table:
    return Table.of(torch.arange(256).to(torch.uint8).view(dtype).float())


# bitsandbytes: quantiles of a normal distribution (arXiv:2305.14314), and a table in twelfths. As float32 has them.
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_FP4 = (0.0, 0.005208333333, 1 / 6, 0.25, 1 / 3, 0.5, 2 / 3, 1.0)


@lru_cache
def table_of(name: str) -> Table:
    """Return the codes of a format by its name.

    Raises:
        FormatError: If there is none.
    """
    if name not in UNEVEN:
        raise FormatError(f"Unknown table of codes {name!r}: expected one of {', '.join(UNEVEN)}.")
    kept = UNEVEN[name]
    if isinstance(kept, torch.dtype):
        return _float_table(kept)
    return Table.of(torch.tensor(kept, dtype=torch.float32))


# Name -> the values, or the eight-bit dtype that has them.
UNEVEN: Mapping[str, tuple[float, ...] | torch.dtype] = {
    "nf4": _NF4,
    "fp4": (*_FP4, *(-value for value in _FP4)),
    "float8_e4m3": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class Uneven(Scaled):
    """``W = s q`` with ``q`` from a table; ``encode`` takes the smallest scale at which nothing is clipped.

    Attributes:
        table: which: ``"nf4"``, ``"fp4"``, ``"float8_e4m3"`` or ``"float8_e5m2"``.
    """

    table: str = "nf4"

    def __post_init__(self) -> None:
        table_of(self.table)

    @property
    def name(self) -> str:
        """The name of the table with the layout."""
        return self._named(self.table)

    @property
    def levels(self) -> Levels:
        """The values of the table."""
        return table_of(self.table)

    def rule(self, pooled: Tensor) -> tuple[Tensor, None]:
        """Return the scale that brings the largest weight to the largest code."""
        return pooled.abs().nan_to_num(0.0).amax(-1) / self.levels.high, None
