"""Two to eight bits per weight: evenly spaced levels, symmetric about zero or anywhere."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from peelwise.errors import FormatError
from peelwise.formats.scaled import Levels, Offset, Scaled

Kind = Literal["symmetric", "affine", "minimum"]
_OFFSETS: dict[Kind, Offset] = {"symmetric": "none", "affine": "zero point", "minimum": "minimum"}


@dataclass(frozen=True)
class Integer(Scaled):
    """``2^width`` evenly spaced levels; ``encode`` takes the smallest scale at which nothing is clipped.

    Attributes:
        width: bits of a code, 2 to 8.
        kind: ``"symmetric"`` (codes ``-2^(b-1) .. 2^(b-1)-1``), ``"affine"`` (codes ``0 .. 2^b-1`` and an integer
            zero point) or ``"minimum"`` (the same codes and a stored minimum, as in GGUF's Q4_1).
    """

    width: int = 4
    kind: Kind = "symmetric"

    def __post_init__(self) -> None:
        if not 2 <= self.width <= 8:
            raise FormatError(f"Integer formats have 2 to 8 bits, got {self.width}. For one bit use binary.")

    @property
    def name(self) -> str:
        """``int4`` and the like with layout and kind."""
        return self._named(f"int{self.width}", self.kind)

    @property
    def levels(self) -> Levels:
        """All integers of that many bits, signed if symmetric."""
        half = 2 ** (self.width - 1)
        return Levels(-half, half - 1) if self.kind == "symmetric" else Levels(0, 2 * half - 1)

    @property
    def offset(self) -> Offset:
        """None, zero point or minimum."""
        return _OFFSETS[self.kind]

    def rule(self, pooled: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the scale that covers the range of the weights, and the offset."""
        missing = pooled.isnan()
        high = pooled.masked_fill(missing, -math.inf).amax(-1)
        low = pooled.masked_fill(missing, math.inf).amin(-1)
        high, low = (t.masked_fill(missing.all(-1), 0.0) for t in (high, low))
        if self.kind == "minimum":
            return (high - low) / self.levels.high, low
        high, low = high.clamp_min(0.0), low.clamp_max(0.0)  # 0 is always one of the levels
        if self.kind == "symmetric":
            return (high / self.levels.high).maximum(low / self.levels.low), None
        scales = (high - low) / self.levels.high
        return scales, (-low / scales).nan_to_num(0.0)
