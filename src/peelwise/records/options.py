"""What a person may choose: the help sentence and the default of every option, in one place for Python and the command
line. No torch, so that ``--help`` is instant.

A settings class is a frozen dataclass whose fields are made by `option`. Its docstring says the same sentences, which a
test checks; the command line makes its options from the fields.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeVar, get_args

from peelwise.errors import OptionError

Panel = Literal["Text", "Measurement", "Model", "Output"]
Plain = dict[str, bool | int | float | str | None]
Refine = Literal["trainable", "all", "adapters"]

MARGIN_RULE = "the larger of 0.5 % of the loss and 0.003 nats per token"
MICRO_BATCH_TOKENS = 1024
MOST_SUMS = 2**29  # bytes of a block's sums at a time where weights stay in their files
REFINE_HELP = (
    "Which linear layers of the blocks are refined: those whose weights training can change (requires_grad; where "
    "there are none, all), all of them, or adapters (LoRA) alone."
)
STACK_HELP = "The list of blocks to measure by its name in the model, such as encoder.block."
STACK_RULE = "the largest, of an encoder-decoder the decoder's"
# Nats per token. Below, a gain could be what losses differ by from one machine to another; above, nothing would count.
LEAST_MARGIN, MOST_MARGIN = 5e-4, 1.0

_T = TypeVar("_T")
_POWERS = ("", "K", "M", "G", "T")
_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class Option:
    """One option as it is described to people.

    Attributes:
        name: of the field.
        help: the sentence, without the default.
        rule: a default that is a rule instead of a value, in words, or ``None``.
        panel: the group of ``--help`` that it stands in.
        default: its value.
    """

    name: str
    help: str
    rule: str | None
    panel: Panel
    default: Any

    @property
    def sentence(self) -> str:
        """The help with the rule, as docstrings say it."""
        return self.help if self.rule is None else f"{self.help} Default: {self.rule}."


def option(default: _T, help: str, *, panel: Panel = "Measurement", rule: str | None = None) -> _T:
    """Return the field of a settings class; typed as its value, since that is what instances hold."""
    made: _T = field(default=default, metadata={"help": help, "panel": panel, "rule": rule})
    return made


def options_of(settings: type[Any]) -> dict[str, Option]:
    """Return the options of a settings class by name; fields that are no options are left out."""
    return {
        one.name: Option(one.name, one.metadata["help"], one.metadata["rule"], one.metadata["panel"], one.default)
        for one in fields(settings)
        if "help" in one.metadata
    }


def parse_seconds(budget: float | str) -> float:
    """Return seconds from a number or a text like ``90``, ``90s``, ``5m`` or ``1.5h``.

    Raises:
        OptionError: If it is neither, or not positive.
    """
    if isinstance(budget, (int, float)):
        seconds = float(budget)
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smh]?)\s*", str(budget))
        seconds = float(match[1]) * _UNITS[match[2]] if match else 0.0
    if not seconds > 0:  # also NaN
        raise OptionError(f"A budget is a positive time like 90s, 5m or 1h; got {budget!r}.")
    return seconds


def parse_amount(name: str, amount: float | str) -> float:
    """Return a number from one or from a text like ``80GB``, ``16GiB``, ``50G`` or ``2.5e12``: bytes, or a rate.

    Args:
        name: of the option.
        amount: the number or text; ``K``, ``M``, ``G``, ``T`` are powers of 1000, with an ``i`` of 1024.

    Raises:
        OptionError: If it is neither, or not positive and finite.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)\s*([KMGT]?)(i?)B?\s*", str(amount), re.IGNORECASE)
    value = 0.0
    if match and (match[2] or not match[3]):
        value = float(match[1]) * (1024 if match[3] else 1000) ** _POWERS.index(match[2].upper())
    if not 0 < value < math.inf:
        raise OptionError(f"{name}: expected a positive amount like 80GB, 16GiB or 50G, got {str(amount)[:80]!r}.")
    return value


def check_least(settings: object, least: float, *names: str) -> None:
    """Refuse settings below ``least``; ``None`` stands for a default.

    Raises:
        OptionError: With the name of the first that is.
    """
    for name in names:
        value = getattr(settings, name)
        if value is not None and not value >= least:
            raise OptionError(f"{name}: expected at least {least:g}, got {value}. Leave it out for the default.")


def check_refine(refine: object) -> None:
    """Refuse what is no choice of layers.

    Raises:
        OptionError: If it is none.
    """
    if refine not in get_args(Refine):
        raise OptionError(f"refine: expected one of {', '.join(get_args(Refine))}, got {refine!r}.")


def check_margin(margin: float | None) -> None:
    """Refuse a margin that is no number within the bounds; ``None`` stands for the default.

    Raises:
        OptionError: If it is.
    """
    if margin is not None and not is_margin(margin):
        raise OptionError(
            f"margin: expected {LEAST_MARGIN:g} to {MOST_MARGIN:g} nats per token, got {margin}. "
            "Leave it out for the default."
        )


def is_margin(value: object) -> bool:
    """Whether a value is a number within the bounds of a margin."""
    return isinstance(value, int | float) and not isinstance(value, bool) and LEAST_MARGIN <= value <= MOST_MARGIN
