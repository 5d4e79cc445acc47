"""What a low-bit module holds, and how one kind of module is recognised, read and written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from peelwise.formats.base import Encoded, Format


@dataclass(frozen=True, eq=False)
class Held:
    """What a low-bit linear layer holds.

    Attributes:
        format: the format that its weights obey.
        encoded: its codes, scales and zero points.
        latent: the full-precision weight ``[d_out, d_in]`` that training moves, or ``None``.
    """

    format: Format
    encoded: Encoded
    latent: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """The effective weight ``[d_out, d_in]``, float32."""
        return self.format.decode(self.encoded)


@dataclass(frozen=True)
class Adapter:
    """How one kind of module is recognised and read, and given other codes where that is possible."""

    name: str
    matches: Callable[[nn.Module], bool]
    read: Callable[[Any], Held]
    write: Callable[[Any, Encoded], None] | None = None


def is_class(kind: str, where: str) -> Callable[[Any], bool]:
    """Return whether a module is of a class of that name from a package; by name, so that nothing is imported."""
    return lambda module: type(module).__name__ == kind and type(module).__module__.startswith(where)
