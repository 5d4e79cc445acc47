"""How many weights share one scale: the model, the matrix, a square of it, an output channel, or a group of inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from peelwise.errors import FormatError

Granularity = Literal["model", "tensor", "channel", "group", "block"]


@dataclass(frozen=True)
class Layout:
    """Which weights share a scale.

    Attributes:
        per: ``"model"`` (one scale for all matrices of a model), ``"tensor"``, ``"channel"`` (one per output),
            ``"group"`` (one per output and ``size`` neighbouring inputs), or ``"block"`` (one per ``size`` neighbouring
            outputs and inputs).
        size: inputs in a group, or side of a block; 0 otherwise.
    """

    per: Granularity = "channel"
    size: int = 0

    def __post_init__(self) -> None:
        if (self.per in ("group", "block")) != (self.size > 0):
            raise FormatError(
                f"A layout needs a positive group size (or side of a block) and none otherwise, got per {self.per!r} "
                f"with size {self.size}. Say group=64, for example."
            )

    @property
    def option(self) -> str:
        """The option of a format's name that chooses this layout."""
        return f"{self.per}={self.size}" if self.size else self.per

    @property
    def shared_by_rows(self) -> bool:
        """Whether several rows of a matrix have the same scale."""
        return self.per in ("model", "tensor", "block")

    def rows(self, d_out: int) -> int:
        """Return how many rows of scales a matrix of ``d_out`` outputs has.

        Raises:
            FormatError: If the side of a block does not divide ``d_out``.
        """
        if self.per == "block":
            if d_out % self.size:
                raise FormatError(
                    f"block={self.size} does not divide the {d_out} outputs of this matrix. Choose a side that divides "
                    f"them, such as {_largest_divisor(d_out, self.size)}, or a scale per channel."
                )
            return d_out // self.size
        return 1 if self.shared_by_rows else d_out

    def columns(self, d_in: int) -> int:
        """Return how many inputs share a scale.

        Raises:
            FormatError: If the group size does not divide ``d_in``.
        """
        if not self.size:
            return d_in
        if d_in % self.size:
            raise FormatError(
                f"{self.per}={self.size} does not divide the {d_in} inputs of this matrix. Choose a group size that "
                f"divides them, such as {_largest_divisor(d_in, self.size)}, or a scale per channel."
            )
        return self.size

    def pooled(self, W: Tensor) -> Tensor:
        """Return ``W [d_out, d_in]`` as ``[rows, groups, weights]``: the weights of each scale together."""
        d_out, d_in = W.shape
        rows, size = self.rows(d_out), self.columns(d_in)
        return W.reshape(rows, d_out // rows, d_in // size, size).transpose(1, 2).reshape(rows, d_in // size, -1)

    def spread(self, values: Tensor, d_out: int, d_in: int) -> Tensor:
        """Return one value per weight ``[d_out, d_in]`` from one per scale ``[rows, groups]``; may be a view."""
        if self.size:
            values = values.repeat_interleave(self.columns(d_in), dim=1)
        if self.per == "block":
            values = values.repeat_interleave(self.size, dim=0)
        return values.expand(d_out, d_in)


def _largest_divisor(d_in: int, most: int) -> int:
    return next(size for size in range(min(most, d_in), 0, -1) if d_in % size == 0)
