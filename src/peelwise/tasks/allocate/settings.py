"""What a user may choose about an allocation of bits. No torch: the command line makes its options from it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from peelwise.errors import OptionError
from peelwise.records.options import MICRO_BATCH_TOKENS, Plain, check_least, option

if TYPE_CHECKING:
    from peelwise.formats.base import Format

LEAST_FORMATS = 2
WIDTHS = (2, 3, 4, 8)  # of the formats that are taken where none are given


@dataclass(frozen=True)
class AllocateSettings:
    """What a user may choose about an allocation of bits.

    Attributes:
        bits: Most bits per weight of the quantised layers on average, scales included.
        formats: Format that a layer may get; repeat it for each. dense leaves layers alone. Default: int2, int3, int4
            and int8 in groups of 64, or of 32 or 16 where 64 does not divide all layers.
        points: Further budgets between the smallest and the largest format, for the curve of loss against bits.
        micro_batch_tokens: Tokens that go through the model at a time; fewer need less memory.

    Raises:
        OptionError: If a value is not allowed.
        FormatError: If a format is none.
    """

    bits: float = option(4.0, "Most bits per weight of the quantised layers on average, scales included.")
    formats: tuple[str, ...] = option(
        (),
        "Format that a layer may get; repeat it for each. dense leaves layers alone.",
        rule="int2, int3, int4 and int8 in groups of 64, or of 32 or 16 where 64 does not divide all layers",
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
        names = [form.name for form in self.parsed_formats()]
        if not names:
            return
        if all(name.startswith("dense") for name in names):
            raise OptionError("formats: expected one of fewer bits than dense among them, such as int4:group=64.")
        if len(names) < LEAST_FORMATS or len(set(names)) < len(names):
            raise OptionError(f"formats: expected at least two different ones, got {', '.join(names)}.")

    def in_layout(self, layout: str) -> AllocateSettings:
        """Return the settings with formats, if none were given: those of `WIDTHS` with ``layout`` for an option."""
        return self if self.formats else replace(self, formats=tuple(f"int{width}:{layout}" for width in WIDTHS))

    def parsed_formats(self) -> list[Format]:
        """Return the formats themselves; none if none were given."""
        from peelwise.formats.table import parse_format

        return [parse_format(form) for form in self.formats]

    def plain(self) -> Plain:
        """Return the settings as plain values under the keys of the record, which files rely on."""
        return {
            "bits": self.bits,
            "formats": " ".join(form.name for form in self.parsed_formats()),
            "points": self.points,
        }
