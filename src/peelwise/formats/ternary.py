"""Three levels per weight, ``log2 3 = 1.58`` bits: a scale times -1, 0 or 1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from peelwise.formats.scaled import Levels, Scaled

Measure = Literal["absmean", "absmedian"]


@dataclass(frozen=True)
class Ternary(Scaled):
    """``W = s q`` with ``q`` in {-1, 0, 1}; ``encode`` takes as ``s`` the mean or the median of ``|W|``.

    Source: arXiv:2402.17764 (absmean, one scale per matrix).

    Attributes:
        measure: how ``encode`` finds the scale; what may be stored is the same for both.
    """

    measure: Measure = "absmean"

    @property
    def name(self) -> str:
        """``ternary`` with its layout, and ``absmedian`` if that is its measure."""
        return self._named("ternary", *(() if self.measure == "absmean" else (self.measure,)))

    @property
    def levels(self) -> Levels:
        """-1, 0 and 1."""
        return Levels(-1, 1)

    def rule(self, pooled: Tensor) -> tuple[Tensor, None]:
        """Return the mean or the median of absolute values; the mean where half of them are 0 already."""
        mean = pooled.abs().nanmean(-1)
        if self.measure == "absmean":
            return mean, None
        median = pooled.abs().nanmedian(-1).values
        return torch.where(median > 0, median, mean), None
