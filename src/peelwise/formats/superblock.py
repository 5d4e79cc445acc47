"""Integer codes whose scales are themselves codes: the K-quants of GGUF files.

A super-block is 256 neighbouring inputs of a row in groups of 16 or 32, with

    W = (D a) q              or   W = (D a) q - (M b)

``D`` and ``M`` are float16 numbers of the super-block, ``a`` and ``b`` integers of four to eight bits per group, ``q``
the codes. `Encoded` keeps the products, exact in float32: ``scales = D a``, ``zeros = -M b``. They are tied to each
other by ``D`` and ``M``, so a solver moves codes and leaves the scales. Layout and numbers: the ggml project.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from peelwise.errors import FormatError
from peelwise.formats.layout import Layout
from peelwise.formats.scaled import Levels, Offset, Scaled

SUPER = 256


class Shape(NamedTuple):
    """What distinguishes one type from another; bits are those of a file."""

    width: int  # bits of a code
    group: int  # weights that share a scale
    scale_bits: int
    signed: bool  # scales of both signs, and no minima


TYPES: Mapping[str, Shape] = {
    "q2_k": Shape(2, 16, 4, False),
    "q3_k": Shape(3, 16, 6, True),
    "q4_k": Shape(4, 32, 6, False),
    "q5_k": Shape(5, 32, 6, False),
    "q6_k": Shape(6, 16, 8, True),
}


@dataclass(frozen=True)
class SuperBlock(Scaled):
    """A K-quant; ``encode`` covers the range of every group and takes the nearest scales that can be stored.

    Attributes:
        type: ``"q2_k"`` to ``"q6_k"``.
    """

    type: str = "q4_k"

    @classmethod
    def of(cls, type_: str) -> SuperBlock:
        """Return the format of a type, ``"q2_k"`` to ``"q6_k"``."""
        return cls(Layout("group", TYPES[type_].group), torch.float32, type_)

    @property
    def shape(self) -> Shape:
        """Its bits and group."""
        return TYPES[self.type]

    @property
    def name(self) -> str:
        """The type."""
        return self.type

    @property
    def levels(self) -> Levels:
        """All integers of that many bits, signed where there are no minima."""
        half = 2 ** (self.shape.width - 1)
        return Levels(-half, half - 1) if self.shape.signed else Levels(0, 2 * half - 1)

    @property
    def offset(self) -> Offset:
        """A minimum where scales have one sign."""
        return "none" if self.shape.signed else "minimum"

    @property
    def scales_stay(self) -> bool:
        """True: the scales of a super-block share a factor."""
        return True

    def rule(self, pooled: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return scales that cover each group, and minima; both are made storable by `rounded`'s next step."""
        high, low = pooled.amax(-1), pooled.amin(-1)
        if self.shape.signed:
            largest = torch.where(high > -low, high, low)
            return largest / self.levels.low, None  # the largest weight takes the code that has no opposite
        low = low.clamp_max(0.0)
        return (high.clamp_min(0.0) - low) / self.levels.high, low

    def stored(self, scales: Tensor) -> Tensor:
        """Return the nearest products ``D a`` ``[rows, groups]``; those that a file holds come back as they are."""
        per = SUPER // self.shape.group
        if scales.shape[-1] % per:
            raise FormatError(
                f"{self.name}: super-blocks of {SUPER} weights do not divide the inputs of this matrix. Choose a "
                "format of smaller groups, such as int4:group=32."
            )
        blocks = scales.nan_to_num(0.0).float().reshape(-1, per)
        factor, codes = factored(blocks, self.shape.scale_bits, signed=self.shape.signed)
        return (factor.float() * codes).reshape(scales.shape)

    def bits(self, d_out: int, d_in: int, support: Tensor | None = None) -> float:
        """Return the bits of a file: codes, scales (and minima) of groups, and 16 or 32 per super-block."""
        width, group, scale_bits, signed = self.shape
        parts = 1 if signed else 2
        return d_out * d_in * (width + parts * (scale_bits / group + 16 / SUPER))


def factored(values: Tensor, bits: int, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Return ``D [n, 1]`` (float16) and integers ``a [n, groups]`` with ``D a`` nearest to ``values [n, groups]``.

    Every number of steps for the largest value is tried, so products of this kind are found again exactly.

    Args:
        values: all of one sign unless ``signed``.
        bits: of ``a``.
        signed: whether ``a`` has both signs: ``-2^(bits-1) .. 2^(bits-1)-1``, else ``0 .. 2^bits-1``.
    """
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    peak = values.gather(1, values.abs().argmax(1, keepdim=True))  # [n, 1]
    best_factor = torch.zeros_like(peak, dtype=torch.float16)
    best_codes = torch.zeros_like(values)
    lowest = torch.full_like(peak, torch.inf)
    for steps in [*range(high, 0, -1), *range(low, 0)]:
        factor = (peak / steps).to(torch.float16)
        safe = torch.where(factor == 0, 1.0, factor.float())
        codes = (values / safe).round().clamp(low, high).masked_fill(factor == 0, 0.0)
        error = (values - factor.float() * codes).square().sum(1, keepdim=True)
        better = (error < lowest) & factor.isfinite()
        lowest = torch.where(better, error, lowest)
        best_factor, best_codes = torch.where(better, factor, best_factor), torch.where(better, codes, best_codes)
    return best_factor, best_codes
