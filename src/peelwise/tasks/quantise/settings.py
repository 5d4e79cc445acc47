"""What a user may choose about quantising a model. No torch: the command line makes its options from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from peelwise.records.options import MICRO_BATCH_TOKENS, Plain, check_least, option

if TYPE_CHECKING:
    from peelwise.formats.base import Format


@dataclass(frozen=True)
class QuantiseSettings:
    """What a user may choose about quantising a model.

    Attributes:
        format: Format of the weights, like int4:group=64 or ternary:channel. Default: int4 in groups of 64; of 32 or 16
            where 64 does not divide all layers, and of 32 in a .gguf file.
        skip: Layer to leave in full precision, by name or by the last part of it, like down_proj; may be repeated.
            Default: none but the output head.
        max_sweeps: Most sweeps of coordinate descent per layer after error feedback; 0 for error feedback alone.
        tolerance: The sweep that lowers a layer's error by less than this share of it is the last.
        asymmetric: Let layers make up for what the layers before them lost.
        curvature: Weigh errors with how much the loss minds them; one pass back more.
        micro_batch_tokens: Tokens that go through the model at a time; fewer need less memory.
        plan: formats of single layers by name, in place of ``format``; from an allocation.

    Raises:
        OptionError: If a value is not allowed.
        FormatError: If a format is none.
    """

    format: str | Format | None = option(
        None,
        "Format of the weights, like int4:group=64 or ternary:channel.",
        rule="int4 in groups of 64; of 32 or 16 where 64 does not divide all layers, and of 32 in a .gguf file",
    )
    skip: tuple[str, ...] = option(
        (),
        "Layer to leave in full precision, by name or by the last part of it, like down_proj; may be repeated.",
        rule="none but the output head",
    )
    max_sweeps: int = option(
        3, "Most sweeps of coordinate descent per layer after error feedback; 0 for error feedback alone."
    )
    tolerance: float = option(0.01, "The sweep that lowers a layer's error by less than this share of it is the last.")
    asymmetric: bool = option(True, "Let layers make up for what the layers before them lost.")
    curvature: bool = option(True, "Weigh errors with how much the loss minds them; one pass back more.")
    micro_batch_tokens: int = option(
        MICRO_BATCH_TOKENS, "Tokens that go through the model at a time; fewer need less memory."
    )
    plan: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_least(self, 0, "max_sweeps", "tolerance")
        check_least(self, 1, "micro_batch_tokens")
        self.parsed_format()
        self.parsed_plan()

    def parsed_format(self) -> Format | None:
        """Return the format itself; ``None`` if none was given."""
        from peelwise.formats.table import parse_format

        return parse_format(self.format) if isinstance(self.format, str) else self.format

    def parsed_plan(self) -> dict[str, Format]:
        """Return the formats of single layers."""
        from peelwise.formats.table import parse_format

        return {name: parse_format(form) for name, form in self.plan.items()}

    def plain(self) -> Plain:
        """Return the settings as plain values under the keys of the record, which files rely on."""
        form = self.parsed_format()
        return {
            "format": form.name if form else None,
            "skip": " ".join(self.skip) or None,
            "max_sweeps": self.max_sweeps,
            "tolerance": self.tolerance,
            "asymmetric": self.asymmetric,
            "curvature": self.curvature,
            "planned_layers": len(self.plan),
        }
