"""What a user may choose about an anatomy. No torch: the command line makes its options from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from peelwise.errors import OptionError
from peelwise.records.options import (
    MARGIN_RULE,
    MICRO_BATCH_TOKENS,
    Plain,
    check_least,
    check_margin,
    option,
    parse_seconds,
)

STUDIES = ("ablation", "predictability", "structure", "bending", "recovery")


@dataclass(frozen=True)
class AnatomySettings:
    """What a user may choose about an anatomy.

    Attributes:
        budget: Wall time, in seconds or like 90s, 5m, 1h; what is not reached by then is listed as not measured.
        studies: Studies to make, of ablation, predictability, structure, bending and recovery. Default: all of them.
        margin: Smallest increase of the loss that counts, nats per token. Default: the larger of 0.5 % of the loss and
            0.003 nats per token.
        micro_batch_tokens: Tokens that go through the model at a time; fewer need less memory.

    Raises:
        OptionError: If a value is not allowed.
    """

    budget: float | str = option(
        "25m", "Wall time, in seconds or like 90s, 5m, 1h; what is not reached by then is listed as not measured."
    )
    studies: Sequence[str] = option(
        (), "Studies to make, of ablation, predictability, structure, bending and recovery.", rule="all of them"
    )
    margin: float | None = option(None, "Smallest increase of the loss that counts, nats per token.", rule=MARGIN_RULE)
    micro_batch_tokens: int = option(
        MICRO_BATCH_TOKENS, "Tokens that go through the model at a time; fewer need less memory."
    )

    def __post_init__(self) -> None:
        parse_seconds(self.budget)
        check_least(self, 1, "micro_batch_tokens")
        check_margin(self.margin)
        for name in self.studies:
            if name not in STUDIES:
                raise OptionError(f"studies: there is no study {name!r}. Known: {', '.join(STUDIES)}.")

    @property
    def budget_seconds(self) -> float:
        """Wall time in seconds."""
        return parse_seconds(self.budget)

    @property
    def wanted(self) -> tuple[str, ...]:
        """Names of the studies to make."""
        return tuple(self.studies) or STUDIES

    def plain(self) -> Plain:
        """Return the settings as plain values under the keys of the record."""
        return {
            "budget_seconds": self.budget_seconds,
            "studies": ",".join(self.studies) or None,
            "margin": self.margin,
            "micro_batch_tokens": self.micro_batch_tokens,
        }
