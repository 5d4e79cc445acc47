"""What a user may choose about a comparison of two models. No torch: the command line makes its options from it."""

from __future__ import annotations

from dataclasses import dataclass

from peelwise.records.options import (
    MARGIN_RULE,
    MICRO_BATCH_TOKENS,
    Plain,
    check_least,
    check_margin,
    option,
    parse_seconds,
)


@dataclass(frozen=True)
class CompareSettings:
    """What a user may choose about a comparison of two models.

    Attributes:
        budget: Wall time, in seconds or like 90s, 5m, 1h; what is not reached by then is listed as not measured.
        layers_of: Blocks whose layers are put back one by one, those with the largest effect first.
        margin: Smallest effect that counts as evidence, nats per token. Default: the larger of 0.5 % of the loss and
            0.003 nats per token.
        path: Also put parts back one after another, from either end, to see interactions.
        micro_batch_tokens: Tokens that go through a model at a time; fewer need less memory.

    Raises:
        OptionError: If a value is not allowed.
    """

    budget: float | str = option(
        "5m", "Wall time, in seconds or like 90s, 5m, 1h; what is not reached by then is listed as not measured."
    )
    layers_of: int = option(3, "Blocks whose layers are put back one by one, those with the largest effect first.")
    margin: float | None = option(None, "Smallest effect that counts as evidence, nats per token.", rule=MARGIN_RULE)
    path: bool = option(True, "Also put parts back one after another, from either end, to see interactions.")
    micro_batch_tokens: int = option(
        MICRO_BATCH_TOKENS, "Tokens that go through a model at a time; fewer need less memory."
    )

    def __post_init__(self) -> None:
        parse_seconds(self.budget)
        check_least(self, 0, "layers_of")
        check_least(self, 1, "micro_batch_tokens")
        check_margin(self.margin)

    @property
    def budget_seconds(self) -> float:
        """Wall time in seconds."""
        return parse_seconds(self.budget)

    def plain(self) -> Plain:
        """Return the settings as plain values under the keys of the record, which files rely on."""
        return {
            "budget_seconds": self.budget_seconds,
            "layers_of": self.layers_of,
            "margin": self.margin,
            "path": self.path,
            "micro_batch_tokens": self.micro_batch_tokens,
        }
