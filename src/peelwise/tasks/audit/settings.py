"""What a user may choose about an audit. No torch: the command line makes its options from it."""

from __future__ import annotations

from dataclasses import dataclass

from peelwise.records.options import (
    MARGIN_RULE,
    MICRO_BATCH_TOKENS,
    REFINE_HELP,
    STACK_HELP,
    STACK_RULE,
    Plain,
    Refine,
    check_least,
    check_margin,
    check_refine,
    option,
    parse_seconds,
)


@dataclass(frozen=True)
class AuditSettings:
    """What a user may choose about an audit.

    Attributes:
        budget: Wall time, in seconds or like 90s, 5m, 1h; what is finished by then is reported.
        joint_rounds: Most rounds of refining all blocks together.
        solo_rounds: Most rounds of refining one block by itself.
        margin: Smallest recoverable loss that matters, in nats per token. Default: the larger of 0.5 % of the loss and
            0.003 nats per token.
        controls: Run the null controls.
        micro_batch_tokens: Tokens that go through the model at a time; fewer need less memory.
        refine: Which linear layers of the blocks are refined: those whose weights training can change (requires_grad;
            where there are none, all), all of them, or adapters (LoRA) alone.
        stack: The list of blocks to measure by its name in the model, such as encoder.block. Default: the largest, of
            an encoder-decoder the decoder's.

    Raises:
        OptionError: If a value is not allowed.
    """

    budget: float | str = option(
        "5m", "Wall time, in seconds or like 90s, 5m, 1h; what is finished by then is reported."
    )
    joint_rounds: int = option(4, "Most rounds of refining all blocks together.")
    solo_rounds: int = option(4, "Most rounds of refining one block by itself.")
    margin: float | None = option(None, "Smallest recoverable loss that matters, in nats per token.", rule=MARGIN_RULE)
    controls: bool = option(True, "Run the null controls.")
    micro_batch_tokens: int = option(
        MICRO_BATCH_TOKENS, "Tokens that go through the model at a time; fewer need less memory."
    )
    refine: Refine = option("trainable", REFINE_HELP)
    stack: str | None = option(None, STACK_HELP, rule=STACK_RULE)

    def __post_init__(self) -> None:
        parse_seconds(self.budget)
        check_least(self, 0, "joint_rounds", "solo_rounds")
        check_margin(self.margin)
        check_least(self, 1, "micro_batch_tokens")
        check_refine(self.refine)

    @property
    def budget_seconds(self) -> float:
        """Wall time in seconds."""
        return parse_seconds(self.budget)

    def plain(self) -> Plain:
        """Return the settings as plain values under the keys of the record, which files rely on."""
        plain: Plain = {
            "budget_seconds": self.budget_seconds,
            "joint_rounds": self.joint_rounds,
            "alone_rounds": self.solo_rounds,
            "margin_nats": self.margin,
            "controls": self.controls,
            "micro_batch_tokens": self.micro_batch_tokens,
            "refine": self.refine,
        }
        return plain if self.stack is None else plain | {"stack": self.stack}
