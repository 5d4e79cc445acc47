"""What all low-bit formats share: evenly spaced codes times a scale, perhaps with a zero point or a minimum.

    no offset         W = s q
    zero point        W = s (q - z)         z one of the codes
    minimum           W = s q + m           m a number as precise as the scale

``s``, ``z`` and ``m`` belong to all weights that share a scale. A scale may be 0, where all weights are the same, and
negative, where that fits more weights into ``-8 .. 7`` than its opposite (GGUF's Q4_0 stores such scales).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from peelwise.errors import FormatError
from peelwise.formats.base import Encoded, Format
from peelwise.formats.layout import Layout

Offset = Literal["none", "zero point", "minimum"]
SCALE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Levels:
    """Evenly spaced integer codes ``low, low + step .. high``."""

    low: int
    high: int
    step: int = 1

    @property
    def count(self) -> int:
        """How many codes there are."""
        return (self.high - self.low) // self.step + 1

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest integer type that holds every code."""
        return torch.uint8 if self.low >= 0 else torch.int8

    def nearest(self, x: Tensor) -> Tensor:
        """Return the code nearest to each value, in the dtype of ``x``; halves go up, so 0 has the sign +1."""
        steps = ((x - self.low) / self.step + 0.5).floor_()
        return steps.clamp_(0, self.count - 1).mul_(self.step).add_(self.low)

    @property
    def symmetric(self) -> bool:
        """Whether every negated code is a code."""
        return self.low == -self.high

    def contains(self, codes: Tensor) -> Tensor:
        """Return for every value whether it is a code."""
        return (codes >= self.low) & (codes <= self.high) & ((codes - self.low) % self.step == 0)

    def moved(self, codes: Tensor, signs: Tensor) -> Tensor:
        """Return the codes that are next in the direction of ``signs`` (-1, 0, 1); those at the end stay."""
        return (codes + signs * self.step).clamp(self.low, self.high)

    def position(self, x: Tensor) -> Tensor:
        """Return where values stand on a line with the codes at 0, 1 .. count - 1."""
        return (x - self.low) / self.step


@dataclass(frozen=True)
class Scaled(Format):
    """Codes times scales; a subclass says which codes, and how a scale follows from the weights.

    Attributes:
        layout: which weights share a scale.
        scale_dtype: the dtype that scales and minima are stored in; they are rounded to it.
    """

    layout: Layout
    scale_dtype: torch.dtype = torch.float16

    @property
    @abstractmethod
    def levels(self) -> Levels:
        """The codes."""

    @property
    def offset(self) -> Offset:
        """What is added to the scaled codes."""
        return "none"

    @property
    def scales_stay(self) -> bool:
        """Whether scales and offsets are tied to each other, so that none can be re-fitted by itself."""
        return False

    @abstractmethod
    def rule(self, pooled: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return scales and offsets ``[rows, groups]``, unrounded, for weights ``[rows, groups, n]``.

        Structural zeros are NaN in ``pooled``; a scale without any weight may come out NaN.
        """

    def stored(self, scales: Tensor) -> Tensor:
        """Return scales or minima rounded to what is stored; NaN (no weight at all) becomes 0."""
        return scales.nan_to_num(0.0, math.inf, -math.inf).to(self.scale_dtype)

    def stored_zeros(self, zeros: Tensor | None) -> Tensor | None:
        """Return offsets as they are stored: minima rounded like scales, zero points to the nearest code."""
        if zeros is None:
            return None
        if self.offset == "minimum":
            return self.stored(zeros)
        return self.levels.nearest(zeros.nan_to_num(0.0)).to(self.levels.dtype)

    def rounded(self, W: Tensor, support: Tensor | None = None) -> Encoded:
        """Round ``W`` to nearest; see `Format.rounded`."""
        W = W if W.dtype == torch.float64 else W.float()
        pooled = self.layout.pooled(W if support is None else W.masked_fill(~support, math.nan))
        scales, zeros = self.rule(pooled)
        return self.quantized(W, self.stored(scales), self.stored_zeros(zeros), support)

    def quantized(self, W: Tensor, scales: Tensor, zeros: Tensor | None, support: Tensor | None = None) -> Encoded:
        """Return ``W [d_out, d_in]`` rounded to the nearest level at the given stored scales and offsets."""
        unrounded = Encoded(W, scales, zeros, support)
        codes = self.levels.nearest(self.in_codes(W, unrounded)).to(self.levels.dtype)
        return replace(unrounded, codes=codes)

    def in_codes(self, W: Tensor, at: Encoded) -> Tensor:
        """Return ``W [d_out, d_in]`` in units of codes, unrounded, at the scales and offsets of ``at``.

        With a scale of 0 every code gives the same weight, and structural zeros have none: 0 is returned there.
        """
        assert at.scales is not None
        W = W if W.dtype == torch.float64 else W.float()
        s = self.layout.spread(at.scales.to(W), *W.shape)
        safe = torch.where(s != 0, s, torch.ones_like(s))
        if at.zeros is None:
            x = W / safe
        else:
            z = self.layout.spread(at.zeros.to(W), *W.shape)
            x = W / safe + z if self.offset == "zero point" else (W - z) / safe
        return x.masked_fill(s == 0 if at.support is None else (s == 0) | ~at.support, 0.0)

    def with_positive_scales(self, encoded: Encoded) -> Encoded:
        """Return the same matrix with codes instead of scales negated, where every negated code is a code too."""
        if encoded.scales is None or self.offset != "none" or not self.levels.symmetric:
            return encoded
        negative = self.layout.spread(encoded.scales < 0, *encoded.codes.shape)
        return replace(encoded, codes=torch.where(negative, -encoded.codes, encoded.codes), scales=encoded.scales.abs())

    def decode(self, encoded: Encoded) -> Tensor:
        """Return the matrix; see `Format.decode`."""
        if encoded.scales is None or (encoded.zeros is None) != (self.offset == "none"):
            raise FormatError(f"{self.name}: the codes given were written by another format.")
        d_out, d_in = encoded.codes.shape
        codes = encoded.codes.float()
        scales = self.layout.spread(encoded.scales.float(), d_out, d_in)
        if encoded.zeros is None:
            W = codes * scales
        else:
            zeros = self.layout.spread(encoded.zeros.float(), d_out, d_in)
            W = (codes - zeros) * scales if self.offset == "zero point" else codes * scales + zeros
        return W if encoded.support is None else W * encoded.support

    def bits(self, d_out: int, d_in: int, support: Tensor | None = None) -> float:
        """Return the bits; see `Format.bits`. A scale for the whole model is counted with none of its matrices."""
        weights: float = d_out * d_in
        groups: float = self.layout.rows(d_out) * (d_in // self.layout.columns(d_in))
        if support is not None:
            weights = float(support.sum())
            groups = float(self.layout.pooled(support).any(-1).sum())
        if self.layout.per == "model":
            groups = 0
        per_group = float(torch.finfo(self.scale_dtype).bits)
        if self.offset == "zero point":
            per_group += math.log2(self.levels.count)
        elif self.offset == "minimum":
            per_group *= 2
        return weights * math.log2(self.levels.count) + groups * per_group

    def _named(self, family: str, *options: str) -> str:
        """Return the name from the family and its own options, with those that all scaled formats have."""
        dtype = str(self.scale_dtype).removeprefix("torch.")
        suffix = () if self.scale_dtype == torch.float16 else (f"scale={dtype}",)
        return f"{family}:{','.join((self.layout.option, *options, *suffix))}"
