"""What putting parts back repairs, what they break, layer by layer and along two ways from NEW to OLD."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor, nn

from peelwise.engine.clock import Clock
from peelwise.engine.session import LOSSES
from peelwise.evidence.intervals import Paired, paired
from peelwise.model.layers import unwrapped
from peelwise.model.runner import Runner
from peelwise.records.base import Interval
from peelwise.records.compare import Unit
from peelwise.tasks.compare.mixing import Mix, Side, lent, mixed_losses


@dataclass(frozen=True)
class Part:
    """One exchangeable part: its places in the order embedding, blocks, norm, head."""

    unit: Unit
    places: tuple[int, ...]
    block: int | None = None


def heads_apart(old: Runner, new: Runner) -> bool:
    """Whether in both models the head is a module of its own."""
    return old.head is not None and new.head is not None


def parts_of(old: Runner, new: Runner) -> tuple[Part, ...]:
    """Return all parts from the input on; norm and head are one part where the head cannot be told apart."""
    count = len(new.blocks)
    blocks = [Part("block", (1 + i,), i) for i in range(count)]
    ends = (
        [Part("norm", (count + 1,)), Part("head", (count + 2,))]
        if heads_apart(old, new)
        else [Part("head", (count + 1, count + 2))]
    )
    return (Part("embedding", (0,)), *blocks, *ends)


@dataclass(eq=False)
class Pair:
    """Both models over report, and the clock. Losses are ``[sequences]``, nats."""

    old: Side
    new: Side
    clock: Clock

    @property
    def heads_apart(self) -> bool:
        """Whether norm and head are exchanged one by one: in both models the head is a module of its own."""
        return heads_apart(self.old.runner, self.new.runner)

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """All parts from the input on."""
        return parts_of(self.old.runner, self.new.runner)

    def losses(self, sides: Sequence[Side]) -> Tensor:
        """Return the losses of the model put together from ``sides``: embedding, blocks, norm, head.

        What one model has computed already up to the first part of the other is not computed again.
        """
        last = len(self.new.blocks)
        same = next((i for i, side in enumerate(sides) if side is not sides[0]), len(sides))
        if same == len(sides):
            return sides[0].trace.losses
        start = min(same, last + 1) - 1  # station before the first block to be run
        return mixed_losses(Mix(sides[0], start, sides[1 + start : 1 + last], sides[-2], sides[-1]))

    def exchanged(self, base: Side, other: Side, parts: Iterable[Part]) -> Tensor:
        """Return the losses of ``base`` with some parts of ``other``."""
        sides = [base] * (len(self.new.blocks) + 3)
        for place in (place for part in parts for place in part.places):
            sides[place] = other
        return self.losses(sides)

    def gain(self, before: Tensor, after: Tensor) -> Paired:
        """Return the paired decrease from ``before`` to ``after``, nats per token."""
        return paired((before - after).cpu().numpy(), self.new.trace.tokens.cpu().numpy())

    def seconds_for(self, part: Part) -> float:
        """Estimate the seconds that the loss with one exchanged part takes, by the first passes of both models."""
        seconds, work = self.clock.stages.get(LOSSES, (0.0, 0.0))  # nothing but forward passes
        rate, tokens = (seconds / work if work else 0.0), self.new.trace.predicted
        start = 0 if part.block is None and part.unit == "embedding" else min(part.places[0] - 1, len(self.new.blocks))
        return rate * tokens * (sum(self.new.runner.shares[start:]) + self.new.runner.head_share)


@dataclass
class Measured:
    """What was measured so far; what is missing was not reached."""

    repairs: dict[Part, Interval] = field(default_factory=dict)
    breaks: dict[Part, Interval] = field(default_factory=dict)
    from_first: dict[Part, Interval] = field(default_factory=dict)
    from_last: dict[Part, Interval] = field(default_factory=dict)
    layers: dict[str, Interval] = field(default_factory=dict)  # by full name of the layer


def measure_repairs(pair: Pair, parts: Sequence[Part], found: Measured) -> bool:
    """Put OLD's parts into NEW one at a time; return whether the budget sufficed for all of ``parts``."""
    for done, part in enumerate(parts):
        if not pair.clock.affords(pair.seconds_for(part)):
            return False
        pair.clock.tell(done, len(parts))
        found.repairs[part] = pair.gain(pair.new.trace.losses, pair.exchanged(pair.new, pair.old, [part])).interval()
    return True


def measure_breaks(pair: Pair, parts: Sequence[Part], found: Measured) -> bool:
    """Put NEW's parts into OLD one at a time."""
    for done, part in enumerate(parts):
        if not pair.clock.affords(pair.seconds_for(part)):
            return False
        pair.clock.tell(done, len(parts))
        found.breaks[part] = pair.gain(pair.exchanged(pair.old, pair.new, [part]), pair.old.trace.losses).interval()
    return True


def measure_path(pair: Pair, changed: Sequence[Part], found: Measured) -> bool:
    """Put changed parts back one after another, from the embedding on and from the head on.

    Steps of a way add up to loss(NEW) - loss(OLD). Only parts that compute something else are steps.
    """
    if len(changed) == 1:  # both ways are this one step
        if changed[0] in found.repairs:
            found.from_first[changed[0]] = found.from_last[changed[0]] = found.repairs[changed[0]]
        return changed[0] in found.repairs
    ways = (changed, found.from_first), (changed[::-1], found.from_last)
    for way, (order, steps) in enumerate(ways):
        before, taken = pair.new.trace.losses, dict[Part, Interval]()
        for done, part in enumerate(order, start=1):
            if not pair.clock.affords(pair.seconds_for(part)):
                return False
            pair.clock.tell(way * len(order) + done - 1, 2 * len(order))
            after = pair.exchanged(pair.new, pair.old, order[:done]) if done < len(order) else pair.old.trace.losses
            taken[part] = pair.gain(before, after).interval()
            before = after
        steps.update(taken)
    return True


def measure_layers(pair: Pair, block: int, names: Sequence[str], found: Measured) -> bool:
    """Put OLD's layers of one block into NEW one at a time.

    Args:
        pair: both models.
        block: whose layers.
        names: of the modules in it that hold changed tensors.
        found: gets the intervals; of modules that are never called, nothing is measured.
    """
    theirs, own = (dict(unwrapped(side.blocks[block].module).named_modules()) for side in (pair.old, pair.new))
    part = pair.parts[1 + block]
    for name in names:
        if name not in own or name not in theirs or not name:
            continue
        if not pair.clock.affords(pair.seconds_for(part)):
            return False
        losses = _with_layer(pair, block, own[name], theirs[name])
        if losses is not None:
            full = f"{pair.new.blocks[block].name}.{name}"
            found.layers[full] = pair.gain(pair.new.trace.losses, losses).interval()
    return True


def _with_layer(pair: Pair, block: int, own: nn.Module, theirs: nn.Module) -> Tensor | None:
    """Return the losses of NEW with one of OLD's modules, or ``None`` if the module is never called."""
    called: list[bool] = []
    handle = theirs.register_forward_pre_hook(lambda *_: called.append(True))
    try:
        with lent({own: theirs}):
            losses = pair.new.runner.losses_from(pair.new.trace, block)
    finally:
        handle.remove()
    return losses if called else None
