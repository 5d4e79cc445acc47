"""What a user may choose about a check. No torch: the command line makes its options from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from peelwise.records.options import MICRO_BATCH_TOKENS, STACK_HELP, STACK_RULE, Plain, check_least, option
from peelwise.records.signals import over_depth

# Tokens that a check draws unless told otherwise: few numbers are fitted, so few decide.
CHECK_TOKENS = 2_048
CHECK_LENGTH = 64  # of a sequence: enough of them to report on


@dataclass(frozen=True)
class CheckSettings:
    """What a user may choose about a check.

    Attributes:
        signals: Signals to compute, by name. Default: all of them.
        most_witnesses: Blocks at most for which ablation and gain witnesses are measured.
        micro_batch_tokens: Tokens that go through the model at a time; fewer need less memory.
        stack: The list of blocks to measure by its name in the model, such as encoder.block. Default: the largest, of
            an encoder-decoder the decoder's.

    Raises:
        OptionError: If a value is not allowed.
    """

    signals: Sequence[str] = option((), "Signals to compute, by name.", rule="all of them")
    most_witnesses: int = option(3, "Blocks at most for which ablation and gain witnesses are measured.")
    micro_batch_tokens: int = option(
        MICRO_BATCH_TOKENS, "Tokens that go through the model at a time; fewer need less memory."
    )
    stack: str | None = option(None, STACK_HELP, rule=STACK_RULE)

    def __post_init__(self) -> None:
        check_least(self, 0, "most_witnesses")
        check_least(self, 1, "micro_batch_tokens")
        over_depth(self.signals)

    @property
    def wanted(self) -> tuple[str, ...]:
        """Names of the signals to compute."""
        return over_depth(self.signals or ("all",))

    def plain(self) -> Plain:
        """Return the settings as plain values under the keys of the record."""
        plain: Plain = {
            "signals": ",".join(self.signals) or None,
            "most_witnesses": self.most_witnesses,
            "micro_batch_tokens": self.micro_batch_tokens,
        }
        return plain if self.stack is None else plain | {"stack": self.stack}
