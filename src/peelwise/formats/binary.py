"""One bit per weight: a scale times a sign."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from peelwise.formats.scaled import Levels, Scaled


@dataclass(frozen=True)
class Binary(Scaled):
    """``W = s q`` with ``q`` in {-1, 1}; ``encode`` takes ``s = mean |W|``, the nearest in squared error.

    Sources: arXiv:1603.05279 (scale per output channel), arXiv:2502.01908 (one scale for the whole model).
    """

    @property
    def name(self) -> str:
        """``binary`` with its layout."""
        return self._named("binary")

    @property
    def levels(self) -> Levels:
        """-1 and 1."""
        return Levels(-1, 1, 2)

    def rule(self, pooled: Tensor) -> tuple[Tensor, None]:
        """Return the mean of absolute values."""
        return pooled.abs().nanmean(-1), None
