"""Words for what a monitor sees: events, each with a suggestion that fits what was seen and no more. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from peelwise.evidence.trends import EquivalentSteps
from peelwise.records.base import Interval
from peelwise.records.run import Event
from peelwise.records.signals import title_of

_SLOW = 0.5  # a learning rate below this part of the other blocks' is worth a word


@dataclass(frozen=True)
class Change:
    """A lasting change of one statistic of a block against all others: how many times, and between which steps."""

    statistic: str
    times: float
    after_step: int
    by_step: int


@dataclass(frozen=True)
class Seen:
    """What is known of a block besides its verdict.

    Attributes:
        untrained: why it is not being trained, in words, or empty.
        rate_ratio: its learning rate over the median of all blocks, or ``None``.
        change: the latest change of level, or ``None``.
        dead: which of its outputs get no gradient, in words, or empty.
        clipped_to: what the norm of all gradients has been at every check of late, or ``None`` where it varies.
    """

    untrained: str = ""
    rate_ratio: float | None = None
    change: Change | None = None
    dead: str = ""
    clipped_to: float | None = None


def turned_red(
    step: int, block: int, gain: Interval, worth: EquivalentSteps | None, *, since: int, measured: int, seen: Seen
) -> Event:
    """Return the event of a block that is red, now or still.

    Args:
        step: now.
        block: its index.
        gain: recoverable loss.
        worth: the same in steps of training, where a slope is known.
        since: step from which on it has been red.
        measured: step of the measurement.
        seen: what else is known of it.
    """
    how_long = f"block {block} red for {step - since} steps" if step > since else f"block {block} turned red"
    half = (gain.high - gain.low) / 2
    text = f"{how_long}: {gain.mean:.3f} +- {half:.3f} nats recoverable, {_worth(worth)}"
    if measured < step:
        text += f" (measured at step {measured})"
    return Event(step, "alert", "red", f"{text}.", block, since, red_advice(seen))


def no_longer_red(step: int, block: int, colour: str, since: int) -> Event:
    """Return the event of a block that was red until now."""
    words = {"green": "nothing above the margin is found now", "yellow": "the loss is falling again"}
    why = words.get(colour, "it is undecided now")
    return Event(step, "info", "no-longer-red", f"block {block} is no longer red: {why}.", block, since)


def changed(step: int, block: int, change: Change) -> Event:
    """Return the event of a statistic that has changed its level against all other blocks'."""
    up = change.times > 1
    times = change.times if up else 1 / change.times
    when = f"between steps {change.after_step} and {change.by_step}"
    text = (
        f"block {block}: its {title_of(change.statistic)} {'rose' if up else 'fell'} {times:.1f} "
        f"times {when}, against what all blocks did, and stays there."
    )
    return Event(step, "warning", "change", text, block, change.by_step, f"See what changed {when}.")


def red_advice(seen: Seen) -> str:
    """Return what one may try on a red block: the likeliest cause that was seen, else what is open."""
    if seen.untrained:
        return f"It {seen.untrained}; see whether that is meant."
    if seen.rate_ratio is not None and seen.rate_ratio < _SLOW:
        return f"Its learning rate is {seen.rate_ratio:.2g} of the other blocks'; raise it."
    if seen.dead:
        return f"{seen.dead}; re-initialising those outputs, or a smaller learning rate, may bring them back."
    change = seen.change
    if change is not None and change.times > 1:
        return (
            f"Its {title_of(change.statistic)} rose {change.times:.1f} times around step "
            f"{change.by_step}: look at the data and the updates of that time; clipping the gradient's norm, or "
            "re-initialising the block, may help."
        )
    if seen.clipped_to is not None:
        return (
            f"The norm of all gradients was {seen.clipped_to:.3g} at every check of late, as clipping makes it: clip "
            "less, or raise the learning rate."
        )
    return (
        "No cause was seen. A larger learning rate for this block, or applying a witness (peelwise audit, then "
        "peelwise apply), may help; which of them does was not measured."
    )


def _worth(worth: EquivalentSteps | None) -> str:
    if worth is None or worth.low is None:
        return "with a loss that is not moving"
    if worth.mean is None:
        return f"worth {_steps(worth.low)} steps or more"
    return f"worth {_steps(worth.mean)} steps"


def _steps(steps: float) -> str:
    """Round to two digits: more would be noise."""
    rounded = float(f"{steps:.2g}")
    return f"{rounded:,.0f}" if rounded >= 10 else f"{rounded:g}"
