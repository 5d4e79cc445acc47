"""What every weight format is: a set of matrices with a way to write them down and a price in bits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from peelwise.errors import FormatError


@dataclass(frozen=True, eq=False)
class Encoded:
    """A matrix as its format writes it down.

    Attributes:
        codes: ``[d_out, d_in]``, integers; the values themselves for `Dense`.
        scales: ``[rows, groups]`` in the dtype they are stored in; ``None`` for `Dense`. ``rows`` is
            ``d_out``, or 1 if one scale serves the whole matrix.
        zeros: as ``scales``: zero points (integers) or minima (same dtype as the scales), or ``None``.
        support: ``[d_out, d_in]`` bool, false where the weight is a structural zero; ``None`` if there are none.
    """

    codes: Tensor
    scales: Tensor | None = None
    zeros: Tensor | None = None
    support: Tensor | None = None


class Format(ABC):
    """A feasible set of weight matrices ``[d_out, d_in]``."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The text that `parse_format` makes this format from."""

    @abstractmethod
    def rounded(self, W: Tensor, support: Tensor | None = None) -> Encoded:
        """Do what `encode` does without looking for mistakes, as a training step wants it."""

    def encode(self, W: Tensor, support: Tensor | None = None) -> Encoded:
        """Write ``W`` down by rounding to nearest, with the scale that the format's own rule gives.

        Args:
            W: ``[d_out, d_in]``, any float dtype.
            support: ``[d_out, d_in]`` bool, false for structural zeros; `Masked` gives it.

        Raises:
            FormatError: If ``W`` is no finite matrix, its shape does not go with the format, or a scale is too large
                for the dtype that it is stored in.
        """
        check_matrix(W, support)
        encoded = self.rounded(W, support)
        if encoded.scales is not None and not bool(encoded.scales.isfinite().all()):
            raise FormatError(f"{self.name}: a scale does not fit the dtype it is stored in. Use scale=float32.")
        return encoded

    @abstractmethod
    def decode(self, encoded: Encoded) -> Tensor:
        """Return the matrix ``[d_out, d_in]`` that ``encoded`` stands for, float32."""

    @abstractmethod
    def bits(self, d_out: int, d_in: int, support: Tensor | None = None) -> float:
        """Return the bits that a ``[d_out, d_in]`` matrix takes: codes, scales and zero points.

        A code counts ``log2`` of the number of its levels. Structural zeros are free.
        """

    def project(self, W: Tensor) -> Tensor:
        """Return the matrix of the format that rounding makes of ``W``, float32."""
        return self.decode(self.encode(W))

    def bits_per_weight(self, d_out: int, d_in: int) -> float:
        """Return `bits` per entry of the matrix, structural zeros counted as entries."""
        return self.bits(d_out, d_in) / (d_out * d_in)

    def __str__(self) -> str:
        return self.name


def check_matrix(W: Tensor, support: Tensor | None) -> None:
    """Refuse what no format can hold.

    Raises:
        FormatError: If ``W`` is not a finite matrix, or ``support`` does not go with it or leaves a row empty.
    """
    if W.dim() != 2 or W.numel() == 0:
        raise FormatError(f"A format holds a matrix [d_out, d_in], got shape {tuple(W.shape)}. Flatten or skip it.")
    if not bool(W.isfinite().all()):
        raise FormatError("The matrix holds NaN or Inf, which no format can write down. Repair it first.")
    if support is not None:
        check_support(support, (W.shape[0], W.shape[1]))


def check_support(support: Tensor, shape: tuple[int, int]) -> None:
    """Refuse a support of another shape, of another type than bool, or with an empty row.

    Raises:
        FormatError: With the first empty row.
    """
    if support.dtype != torch.bool or tuple(support.shape) != shape:
        raise FormatError(
            f"support: expected a bool tensor of shape {shape}, got {str(support.dtype).removeprefix('torch.')} "
            f"of shape {tuple(support.shape)}. Give one truth value per weight."
        )
    empty = (~support.any(1)).nonzero().flatten()
    if empty.numel():
        raise FormatError(
            f"support: row {int(empty[0])} has no weight ({empty.numel()} empty rows of {shape[0]}), so its output "
            "could never change. Give every row at least one weight, or drop these outputs."
        )
