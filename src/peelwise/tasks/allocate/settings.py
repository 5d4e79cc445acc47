"""What a user may choose about an allocation of bits. No torch: the command line makes its options from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from peelwise.errors import OptionError
from peelwise.records.options import MICRO_BATCH_TOKENS, Plain, check_least, option

if TYPE_CHECKING:
    from peelwise.formats.base import Format

LEAST_FORMATS = 2


@dataclass(frozen=True)
class AllocateSettings:
    """What a user may choose about an allocation of bits.

    Attributes:
        bits: Most bits per weight of the quantised layers on average, scales included.
        formats: Format that a layer may get; repeat it for each. dense leaves layers alone.
        points: Further budgets between the smallest and the largest format, for the curve of loss against bits.
        micro_batch_tokens: Tokens that go through the model at a time; fewer need less memory.

    Raises:
        OptionError: If a value is not allowed.
        FormatError: If a format is none.
    """

    bits: float = option(4.0, "Most bits per weight of the quantised layers on average, scales included.")
    formats: tuple[str, ...] = option(
        ("int2:group=64", "int3:group=64", "int4:group=64", "int8:group=64"),
        "Format that a layer may get; repeat it for each. dense leaves layers alone.",
    )
    points: int = option(
        3, "Further budgets between the smallest and the largest format, for the curve of loss against bits."
    )
    micro_batch_tokens: int = option(
        MICRO_BATCH_TOKENS, "Tokens that go through the model at a time; fewer need less memory."
    )

    def __post_init__(self) -> None:
        check_least(self, 0, "points")
        check_least(self, 1, "micro_batch_tokens")
        if not 0 < self.bits < float("inf"):
            raise OptionError(f"bits: expected a positive number of bits per weight, got {self.bits}.")
        if all(form.name.startswith("dense") for form in self.parsed_formats()):
            raise OptionError("formats: expected one of fewer bits than dense among them, such as int4:group=64.")
        names = [form.name for form in self.parsed_formats()]
        if len(names) < LEAST_FORMATS or len(set(names)) < len(names):
            raise OptionError(f"formats: expected at least two different ones, got {', '.join(names) or 'none'}.")

    def parsed_formats(self) -> list[Format]:
        """Return the formats themselves."""
        from peelwise.formats.table import parse_format

        return [parse_format(form) for form in self.formats]

    def plain(self) -> Plain:
        """Return the settings as plain values under the keys of the record, which files rely on."""
        return {
            "bits": self.bits,
            "formats": " ".join(form.name for form in self.parsed_formats()),
            "points": self.points,
        }
