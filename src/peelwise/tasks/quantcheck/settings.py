"""What a user may choose about a comparison with the full-precision parent. No torch: the command line makes its
options from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from peelwise.errors import OptionError
from peelwise.records.options import MICRO_BATCH_TOKENS, Plain, check_least, option, parse_seconds

if TYPE_CHECKING:
    from peelwise.formats.base import Format


@dataclass(frozen=True)
class QuantcheckSettings:
    """What a user may choose about a comparison with the full-precision parent.

    Attributes:
        budget: Wall time, in seconds or like 90s, 5m, 1h; layers not reached by then are listed as not measured.
        format: Format of plain weights that were quantised and saved as such, like int3:group=32. Default: what the
            layers say themselves.
        max_sweeps: Most sweeps of coordinate descent per layer and start.
        tolerance: The sweep that lowers a layer's error by less than this share of it is the last.
        micro_batch_tokens: Tokens that go through a model at a time; fewer need less memory.
        activations: Format that the inputs of quantised layers are rounded to when the model runs, like int8:channel (a
            scale per token), or none. Default: what folder and layers say themselves.
        allocate: Most bits per weight of a plan for PARENT in formats of 2, 3, 4 and 8 bits, as of `peelwise allocate`.
            Default: no plan.
        dampings: of the inputs' sums that select chooses from, in units of the mean diagonal.

    Raises:
        OptionError: If a value is not allowed.
        FormatError: If ``format`` names no format.
    """

    budget: float | str = option(
        "10m", "Wall time, in seconds or like 90s, 5m, 1h; layers not reached by then are listed as not measured."
    )
    format: str | Format | None = option(
        None,
        "Format of plain weights that were quantised and saved as such, like int3:group=32.",
        rule="what the layers say themselves",
    )
    max_sweeps: int = option(5, "Most sweeps of coordinate descent per layer and start.")
    tolerance: float = option(0.01, "The sweep that lowers a layer's error by less than this share of it is the last.")
    micro_batch_tokens: int = option(
        MICRO_BATCH_TOKENS, "Tokens that go through a model at a time; fewer need less memory."
    )
    activations: str | None = option(
        None,
        "Format that the inputs of quantised layers are rounded to when the model runs, like int8:channel (a scale per "
        "token), or none.",
        rule="what folder and layers say themselves",
    )
    allocate: float | None = option(
        None,
        "Most bits per weight of a plan for PARENT in formats of 2, 3, 4 and 8 bits, as of `peelwise allocate`.",
        rule="no plan",
    )
    dampings: tuple[float, ...] = (0.0, 1e-2, 1e-1, 1.0)

    def __post_init__(self) -> None:
        parse_seconds(self.budget)
        check_least(self, 1, "max_sweeps", "micro_batch_tokens")
        check_least(self, 0, "tolerance")
        if isinstance(self.format, str):
            self.parsed_format()
        self.parsed_activations()
        if self.allocate is not None and not 0 < self.allocate < float("inf"):
            raise OptionError(f"allocate: expected a positive number of bits per weight, got {self.allocate}.")

    @property
    def budget_seconds(self) -> float:
        """Wall time in seconds."""
        return parse_seconds(self.budget)

    def parsed_format(self) -> Format | None:
        """Return the format itself."""
        from peelwise.formats.table import parse_format

        return parse_format(self.format) if isinstance(self.format, str) else self.format

    def parsed_activations(self) -> Format | None:
        """Return the format of inputs that is asked for; ``None`` if none is."""
        if self.activations in (None, "none"):
            return None
        from peelwise.formats.table import parse_format

        return parse_format(str(self.activations))

    def plain(self) -> Plain:
        """Return the settings as plain values under the keys of the record, which files rely on."""
        form = self.parsed_format()
        return {
            "budget_seconds": self.budget_seconds,
            "form": form.name if form else None,
            "max_sweeps": self.max_sweeps,
            "tolerance": self.tolerance,
            **({} if self.activations is None else {"activations": self.activations}),
            **({} if self.allocate is None else {"allocate": self.allocate}),
        }
