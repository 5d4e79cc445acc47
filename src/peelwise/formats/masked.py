"""A format on a fixed support: weights outside it are zero, are never trained, and cost nothing."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from peelwise.errors import FormatError
from peelwise.formats.base import Encoded, Format, check_matrix, check_support


class Pattern(ABC):
    """Which weights of a matrix are on the support."""

    @property
    @abstractmethod
    def option(self) -> str:
        """The option of a format's name that chooses this pattern."""

    @abstractmethod
    def support(self, W: Tensor) -> Tensor:
        """Return the support ``[d_out, d_in]``, bool, for a matrix of the shape of ``W``.

        Raises:
            FormatError: If the pattern does not go with the shape or leaves a row empty.
        """

    def bits(self, d_out: int, d_in: int) -> float:
        """Return what it takes to write the support down; nothing where the problem gives it."""
        return 0.0


@dataclass(frozen=True)
class BlockDiagonal(Pattern):
    """``blocks`` equal blocks on the diagonal: each group of outputs sees one group of inputs."""

    blocks: int

    @property
    def option(self) -> str:
        """``blocks=N``."""
        return f"blocks={self.blocks}"

    def support(self, W: Tensor) -> Tensor:
        """Return the support; see `Pattern.support`."""
        d_out, d_in = W.shape
        if self.blocks < 1 or d_out % self.blocks or d_in % self.blocks:
            raise FormatError(
                f"blocks={self.blocks} does not divide a matrix of [{d_out}, {d_in}] evenly. Choose a number of blocks "
                "that divides both sides."
            )
        rows = torch.arange(d_out, device=W.device) // (d_out // self.blocks)
        out: Tensor = rows[:, None] == torch.arange(d_in, device=W.device) // (d_in // self.blocks)
        return out


@dataclass(frozen=True)
class Banded(Pattern):
    """Weights at most ``width`` inputs away from the (stretched) diagonal, ``|j - i d_in/d_out| <= width``."""

    width: int

    @property
    def option(self) -> str:
        """``band=N``."""
        return f"band={self.width}"

    def support(self, W: Tensor) -> Tensor:
        """Return the support; see `Pattern.support`."""
        if self.width < 0:
            raise FormatError(f"band={self.width} is negative. Use 0 for the diagonal alone, or more.")
        d_out, d_in = W.shape
        centre = torch.arange(d_out, device=W.device) * d_in // d_out
        out: Tensor = (torch.arange(d_in, device=W.device) - centre[:, None]).abs() <= self.width
        return out


@dataclass(frozen=True)
class NOfM(Pattern):
    """The ``kept`` largest of every ``of`` neighbouring inputs; to tell which takes ``log2 C(of, kept)`` bits."""

    kept: int
    of: int

    def __post_init__(self) -> None:
        if not 0 < self.kept <= self.of:
            raise FormatError(f"keep={self.kept}:{self.of}: expected 1 <= N <= M, such as keep=2:4.")

    @property
    def option(self) -> str:
        """``keep=N:M``."""
        return f"keep={self.kept}:{self.of}"

    def support(self, W: Tensor) -> Tensor:
        """Return the support of the largest absolute values; see `Pattern.support`."""
        d_out, d_in = W.shape
        if d_in % self.of:
            raise FormatError(f"{self.option}: {self.of} does not divide the {d_in} inputs. Choose an M that does.")
        size = W.abs().reshape(d_out, d_in // self.of, self.of)
        out = torch.zeros(size.shape, dtype=torch.bool, device=W.device)
        return out.scatter_(2, size.topk(self.kept, dim=2).indices, True).view(d_out, d_in)

    def bits(self, d_out: int, d_in: int) -> float:
        """Return the bits of the choice."""
        return d_out * d_in / self.of * math.log2(math.comb(self.of, self.kept))


@dataclass(frozen=True, eq=False)
class Given(Pattern):
    """The support given, ``[d_out, d_in]`` bool."""

    mask: Tensor

    @property
    def option(self) -> str:
        """``support=given``, which no text can stand for."""
        return "support=given"

    def support(self, W: Tensor) -> Tensor:
        """Return the support; see `Pattern.support`."""
        check_support(self.mask, (W.shape[0], W.shape[1]))
        return self.mask.to(W.device)


@dataclass(frozen=True)
class Masked(Format):
    """``inner`` on the support of ``pattern``; scales follow from the weights on it alone.

    One bit with one scale for the whole model on a support that the problem gives is the format of arXiv:2502.01908.
    """

    inner: Format
    pattern: Pattern

    def __post_init__(self) -> None:
        if isinstance(self.inner, Masked):
            raise FormatError(f"{self.inner.name} is masked already. Give one support.")

    @property
    def name(self) -> str:
        """The inner name with the pattern as one more option."""
        separator = "," if ":" in self.inner.name else ":"
        return f"{self.inner.name}{separator}{self.pattern.option}"

    def encode(self, W: Tensor, support: Tensor | None = None) -> Encoded:
        """Round what is on the support; see `Format.encode`. A ``support`` given replaces the pattern's own."""
        check_matrix(W, None)
        return self.inner.encode(W, self.pattern.support(W) if support is None else support)

    def rounded(self, W: Tensor, support: Tensor | None = None) -> Encoded:
        """Round what is on the support; see `Format.rounded`."""
        return self.inner.rounded(W, self.pattern.support(W) if support is None else support)

    def decode(self, encoded: Encoded) -> Tensor:
        """Return the matrix; see `Format.decode`."""
        return self.inner.decode(encoded)

    def bits(self, d_out: int, d_in: int, support: Tensor | None = None) -> float:
        """Return the bits, with those that tell the support; see `Format.bits`."""
        if support is None:
            support = self.pattern.support(torch.zeros(d_out, d_in))
        return self.inner.bits(d_out, d_in, support) + self.pattern.bits(d_out, d_in)
