"""What a user may choose about a plan. No torch: the command line makes its options from it."""

from __future__ import annotations

from dataclasses import dataclass

from peelwise.records.options import MICRO_BATCH_TOKENS, check_least, option, parse_amount


@dataclass(frozen=True)
class PlanSettings:
    """What a user may choose about a plan.

    Attributes:
        tokens: Tokens of text. Default: what each command takes by itself.
        processes: Processes that share an audit, as torchrun starts them.
        memory: Memory of each process, like 80GB or 16GiB. Default: what is free here.
        speed: Operations per second in products of matrices, like 50G or 20T. Default: no seconds are shown.
        disk: Bytes per second from disk, like 1GB. Default: reading takes no time.

    Raises:
        OptionError: If a value is not allowed.
    """

    tokens: int | None = option(None, "Tokens of text.", rule="what each command takes by itself")
    processes: int = option(1, "Processes that share an audit, as torchrun starts them.")
    memory: float | str | None = option(None, "Memory of each process, like 80GB or 16GiB.", rule="what is free here")
    speed: float | str | None = option(
        None, "Operations per second in products of matrices, like 50G or 20T.", rule="no seconds are shown"
    )
    disk: float | str | None = option(None, "Bytes per second from disk, like 1GB.", rule="reading takes no time")

    def __post_init__(self) -> None:
        check_least(self, 1, "tokens", "processes")
        for name in ("memory", "speed", "disk"):
            self.amount(name)

    def amount(self, name: str) -> float | None:
        """Return ``memory``, ``speed`` or ``disk`` as a number, ``None`` where it was left out."""
        value = getattr(self, name)
        return None if value is None else parse_amount(name, value)

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens that go through a model at a time unless a command is told otherwise."""
        return MICRO_BATCH_TOKENS
