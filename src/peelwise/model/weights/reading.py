"""What is said of a model whose quantised folder was taken apart: how many layers are codes, and what runs besides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from peelwise.model.layers import unwrapped
from peelwise.model.weights.fakes import fake_notes
from peelwise.records.base import Note, note

_ATTRIBUTE = "_peelwise_reading"


@dataclass(frozen=True)
class Reading:
    """How a quantised folder was read.

    Attributes:
        said: its ``quantization_config``.
        codes: layers that hold codes of our formats.
        numbers: quantised layers that hold plain numbers, exactly those that are stored, with their bits per weight.
        scales: by layer, fixed scales of its quantised inputs.
    """

    said: Mapping[str, Any]
    codes: int
    numbers: Mapping[str, float]
    scales: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def method(self) -> str:
        """The tool's name."""
        return str(self.said.get("quant_method"))


def note_reading(model: nn.Module, reading: Reading) -> None:
    """Keep with a model how it was read; not saved with it."""
    object.__setattr__(model, _ATTRIBUTE, reading)


def reading_of(model: nn.Module) -> Reading | None:
    """Return how a model was read, if its folder was quantised and taken apart here."""
    found = getattr(unwrapped(model), _ATTRIBUTE, None)
    return found if isinstance(found, Reading) else None


def reading_notes(model: nn.Module) -> Iterator[Note]:
    """Yield what a reader should know of it."""
    yield from fake_notes(model)
    reading = reading_of(model)
    if reading is not None and reading.numbers:
        yield note("read-as-numbers", method=reading.method, layers=len(reading.numbers), codes=reading.codes)
