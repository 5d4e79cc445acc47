"""How many weights share one scale: the model, the matrix, an output channel, or a group of inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from peelwise.errors import FormatError

Granularity = Literal["model", "tensor", "channel", "group"]


@dataclass(frozen=True)
class Layout:
    """Which weights share a scale.

    Attributes:
        per: ``"model"`` (one scale for all matrices of a model), ``"tensor"``, ``"channel"`` (one per output), or
            ``"group"`` (one per output and ``size`` neighbouring inputs).
        size: inputs in a group; 0 unless ``per`` is ``"group"``.
    """

    per: Granularity = "channel"
    size: int = 0

    def __post_init__(self) -> None:
        if (self.per == "group") != (self.size > 0):
            raise FormatError(
                f"A layout needs a positive group size with per group and none otherwise, got per {self.per!r} with "
                f"size {self.size}. Say group=64, for example."
            )

    @property
    def option(self) -> str:
        """The option of a format's name that chooses this layout."""
        return f"group={self.size}" if self.per == "group" else self.per

    @property
    def shared_by_rows(self) -> bool:
        """Whether all rows of a matrix have the same scale."""
        return self.per in ("model", "tensor")

    def columns(self, d_in: int) -> int:
        """Return how many inputs share a scale.

        Raises:
            FormatError: If the group size does not divide ``d_in``.
        """
        if self.per != "group":
            return d_in
        if d_in % self.size:
            raise FormatError(
                f"group={self.size} does not divide the {d_in} inputs of this matrix. Choose a group size that divides "
                f"them, such as {_largest_divisor(d_in, self.size)}, or a scale per channel."
            )
        return self.size

    def pooled(self, W: Tensor) -> Tensor:
        """Return ``W [d_out, d_in]`` as ``[rows, groups, weights]``: the weights of each scale together."""
        d_out, d_in = W.shape
        if self.shared_by_rows:
            return W.reshape(1, 1, -1)
        size = self.columns(d_in)
        return W.reshape(d_out, d_in // size, size)

    def spread(self, values: Tensor, d_out: int, d_in: int) -> Tensor:
        """Return one value per weight ``[d_out, d_in]`` from one per scale ``[rows, groups]``; may be a view."""
        if self.per == "group":
            values = values.repeat_interleave(self.columns(d_in), dim=1)
        return values.expand(d_out, d_in)


def _largest_divisor(d_in: int, most: int) -> int:
    return next(size for size in range(min(most, d_in), 0, -1) if d_in % size == 0)
