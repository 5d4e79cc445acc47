"""Every matrix, in one floating-point dtype; and matrices of a file whose layout is none of our formats."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from peelwise.formats.base import Encoded, Format


@dataclass(frozen=True)
class Dense(Format):
    """Any matrix; ``dtype`` is the dtype of its values."""

    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        """``dense``, with the dtype unless it is float32."""
        return "dense" if self.dtype == torch.float32 else f"dense:{str(self.dtype).removeprefix('torch.')}"

    def rounded(self, W: Tensor, support: Tensor | None = None) -> Encoded:
        """Round to the dtype; see `Format.rounded`."""
        return Encoded((W if support is None else W * support).to(self.dtype), support=support)

    def decode(self, encoded: Encoded) -> Tensor:
        """Return the values; see `Format.decode`."""
        return encoded.codes.float()

    def bits(self, d_out: int, d_in: int, support: Tensor | None = None) -> float:
        """Return the bits; see `Format.bits`."""
        weights = d_out * d_in if support is None else float(support.sum())
        return weights * torch.finfo(self.dtype).bits


@dataclass(frozen=True)
class Stored(Dense):
    """The numbers of a layer that a file stores in a layout of its own: they can be measured, and nothing be sought.

    Attributes:
        layout: what the layout is called.
        each: bits per weight in the file.
    """

    layout: str = ""
    each: float = 32.0

    @property
    def name(self) -> str:
        """What the layout is called."""
        return self.layout

    def bits(self, d_out: int, d_in: int, support: Tensor | None = None) -> float:
        """Return the bits in the file."""
        return d_out * d_in * self.each
