"""When red blocks are worth a word: at the start, at every doubling of their time, at the end; as one if most are.

Where most blocks are red the cause is seldom in each of them: that is said once, with what they share. No torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from peelwise.evidence.events import Seen, red_advice
from peelwise.evidence.trends import EquivalentSteps
from peelwise.records.base import NATS, Interval
from peelwise.records.run import Event

_FEWEST_TOGETHER, _SHARE_TOGETHER = 3, 0.5  # blocks that are asked about


def are_most(red: int, asked: int) -> bool:
    """Return whether so many red blocks of all that are asked about point at what these share, not at each of them."""
    return red >= max(_FEWEST_TOGETHER, _SHARE_TOGETHER * asked)


@dataclass(frozen=True)
class RedBlock:
    """What there is to say of a red block.

    Attributes:
        gain: recoverable loss.
        worth: the same in steps of training, where a slope is known.
        measured: step of the measurement.
        seen: what else is known of it.
        unit: what the gain is in.
    """

    gain: Interval
    worth: EquivalentSteps | None
    measured: int
    seen: Seen
    unit: str = NATS

    @property
    def words(self) -> str:
        """The gain with its interval: few sequences make it lopsided, so both ends are said."""
        said = "nats recoverable" if self.unit == NATS else f"recoverable ({self.unit})"
        return f"{self.gain.mean:.4f} [{self.gain.low:.4f}, {self.gain.high:.4f}] {said}"


@dataclass
class Reds:
    """Remembers since when blocks are red, and how long they had been when that was last said."""

    _since: dict[int, int] = field(default_factory=dict)
    _told: dict[int, int] = field(default_factory=dict)
    _together: int | None = None  # since when most of them are
    _together_told: int = 0

    def events(
        self, step: int, blocks: Sequence[RedBlock | str], shared: str = "", *, quiet: bool = False
    ) -> list[Event]:
        """Return what is to be said at a measurement.

        Args:
            step: of the training.
            blocks: per block what there is to say if it is red, else its colour.
            shared: what all blocks have in common, in words.
            quiet: whether their common cause is known and was told.
        """
        red = {block: each for block, each in enumerate(blocks) if isinstance(each, RedBlock)}
        over = [(block, since) for block, since in self._since.items() if block not in red]
        for block, _ in over:
            del self._since[block]
        for block in red:
            self._since.setdefault(block, step)
        ended = [no_longer_red(step, block, str(blocks[block]), since) for block, since in over if block in self._told]
        self._told = {block: lasted for block, lasted in self._told.items() if block in red}
        asked = sum(each != "frozen" for each in blocks)
        # A block with a cause of its own is told with that, whatever the others have in common.
        own = {block: each for block, each in red.items() if each.seen.has_own_cause}
        rest = {block: each for block, each in red.items() if block not in own}
        if are_most(len(rest), asked):
            return [*ended, *self._of_single(step, own), *self._of_most(step, rest, asked, shared, quiet=quiet)]
        self._together = None
        return [*ended, *self._of_single(step, own if quiet else red)]

    def forget_from(self, step: int) -> None:
        """Forget what was seen from a step on."""
        self._since = {block: since for block, since in self._since.items() if since < step}
        self._told = {b: min(lasted, step - self._since[b]) for b, lasted in self._told.items() if b in self._since}
        if self._together is not None and self._together >= step:
            self._together = None

    def _of_most(self, step: int, red: dict[int, RedBlock], asked: int, shared: str, *, quiet: bool) -> list[Event]:
        begins = self._together is None
        since = self._together = step if self._together is None else self._together
        lasted = step - since
        if quiet or not (begins or lasted >= 2 * max(self._together_told, 1)):
            if begins:
                self._together = None  # to be said once it is not explained any more
            return []
        self._together_told = lasted
        return [together(step, red, asked, shared, since=since)]

    def _of_single(self, step: int, red: dict[int, RedBlock]) -> list[Event]:
        events = []
        for block, each in red.items():
            lasted = step - self._since[block]
            if block in self._told and lasted < 2 * max(self._told[block], 1):
                continue
            self._told[block] = lasted
            events.append(turned_red(step, block, each, since=self._since[block]))
        return events


def turned_red(step: int, block: int, red: RedBlock, *, since: int) -> Event:
    """Return the event of a block that is red, now or still.

    Args:
        step: now.
        block: its index.
        red: what there is to say of it.
        since: step from which on it has been red.
    """
    how_long = f"block {block} red for {step - since} steps" if step > since else f"block {block} turned red"
    text = f"{how_long}: {red.words}, {_worth(red.worth)}"
    if red.measured < step:
        text += f" (measured at step {red.measured})"
    return Event(step, "alert", "red", f"{text}.", block, since, red_advice(red.seen))


def together(step: int, red: dict[int, RedBlock], asked: int, shared: str, *, since: int) -> Event:
    """Return the event of most blocks being red.

    Args:
        step: now.
        red: the red blocks by index.
        asked: blocks that are asked about.
        shared: what they have in common, in words.
        since: step from which on most have been.
    """
    names = ", ".join(map(str, red))
    most = max(red, key=lambda block: red[block].gain.mean)
    how_long = f"have been red for {step - since} steps" if step > since else "are red"
    text = (
        f"{len(red)} of {asked} blocks ({names}) {how_long}, which has a common cause as a rule: up to "
        f"{red[most].words} in one (block {most}), {_worth(red[most].worth)}."
    )
    advice = (
        f"What they share: {shared}." if shared else "Look at what all blocks share: learning rate, clipping, data."
    )
    return Event(step, "alert", "red", text, None, since, advice)


def no_longer_red(step: int, block: int, colour: str, since: int) -> Event:
    """Return the event of a block that was red until now."""
    words = {"green": "nothing above the margin is found now", "yellow": "the loss is falling again"}
    why = words.get(colour, "it is undecided now")
    return Event(step, "info", "no-longer-red", f"block {block} is no longer red: {why}.", block, since)


def _worth(worth: EquivalentSteps | None) -> str:
    if worth is None or worth.low is None:
        return "with a loss that is not shown to fall"
    if worth.mean is None:
        return f"worth {_steps(worth.low)} steps or more"
    return f"worth {_steps(worth.mean)} steps"


def _steps(steps: float) -> str:
    """Round to two digits: more would be noise."""
    rounded = float(f"{steps:.2g}")
    return f"{rounded:,.0f}" if rounded >= 10 else f"{rounded:g}"
