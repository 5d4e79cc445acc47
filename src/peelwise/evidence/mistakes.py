"""Mistakes that people make in trainings, told from numbers of single steps: rules, and the sentence of each. No torch.

A rule names a kind of mistake only where numbers show just that one, and, but for a leak, at two checks in a row: a
false alarm is worse than silence. What is said once is not said again while it lasts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median

from peelwise.evidence.facts import StepFacts, UpdateFacts
from peelwise.evidence.trends import loss_gap
from peelwise.records.run import Event, Level

_SIGHTINGS = 2  # checks in a row that must show a mistake
_GONE = 5  # checks in a row that must not show it any more: a broken run looks well at single moments
_KNOWN = 0.2  # of the thresholds of a rate that is known to be too large
_FASTER, _LARGE = 30.0, 0.01  # times the other blocks' update; the least part of the weights, in one step
_FASTER_ANYWAY, _LARGE_ANYWAY = 3.0, 0.001  # the same where the learning rate itself is as many times theirs
_REPLACED, _THE_SAME = (
    0.5,
    0.9,
)  # cosine with the weights of earlier: of a block that is another, of blocks that are not
_SMALL, _LOSSES = 1e-4, 40  # update per step; losses to judge by
_STEADY, _DECAYED = 1.02, 0.3  # a rate that still rises or has fallen far is on its way, not wrong
_LOST = 0.5  # part of the weights with a gradient that did not move
_SHRINK, _COUPLED = 0.01, 3.0  # part of the weights that decay takes a step; times the gradient
_KEPT = 0.05  # part of the last gradient that is in this one
_APART, _LEAST_APART, _ALIKE, _LEAST_ALIKE = 0.1, 0.1, 0.03, 0.02  # of a loss, and nats
_BETTER = 0.05  # part of the loss: no healthy model predicts the token after the next better than the next
_PADDED = 0.05  # part of a batch


@dataclass(frozen=True)
class Mistake:
    """One kind of mistake with the numbers that show it."""

    kind: str
    text: str
    suggestion: str
    block: int | None = None
    level: Level = "alert"


@dataclass
class Diagnosis:
    """Remembers what checks have seen; `add` returns what is to be said now.

    Attributes:
        present: kinds that were told and that one of the last five checks has shown; while there are any, no block
            of the run is called green.
    """

    present: set[str] = field(default_factory=set)
    _sightings: Counter[str] = field(default_factory=Counter)
    _misses: Counter[str] = field(default_factory=Counter)
    _said: set[str] = field(default_factory=set)
    _rates: list[float] = field(default_factory=list)  # the highest one at every check
    _lowest: float | None = None  # the probe's loss, so far

    def add(self, facts: StepFacts) -> list[Event]:
        """Return the events of mistakes that are seen for certain now and were not told before."""
        found = {m.kind: m for m in self._all(facts)}
        for kind in {*found, *self._sightings}:
            if kind in found:
                self._sightings[kind] += 1
                self._misses[kind] = 0
            elif _could_tell(kind, facts):
                self._sightings[kind] = 0
                self._misses[kind] += 1
                if self._misses[kind] >= _GONE:
                    self.present.discard(kind)
        certain = [m for kind, m in found.items() if self._sightings[kind] >= _SIGHTINGS]
        self.present |= {m.kind for m in certain}
        if any(kind != _GENERAL for kind in self.present):  # a cause has been named: its consequence needs no word
            certain = [m for m in certain if m.kind != _GENERAL]
        new = [m for m in certain if m.kind not in self._said]
        self._said |= {m.kind for m in new}
        return [Event(facts.step, m.level, m.kind, m.text, m.block, suggestion=m.suggestion) for m in new]

    def _all(self, facts: StepFacts) -> Iterator[Mistake]:
        steady = self._steady(facts)
        fast = _rate_too_large(facts, _KNOWN if "rate-too-large" in self.present else 1.0)
        replaced = _replaced(facts)
        if replaced is not None and (fast is None or (facts.updates is not None and facts.updates.rates_known)):
            fast = None  # one step that changes everything, at a rate like the others', is none of the optimiser
        elif fast is not None or "rate-too-large" in self.present:
            replaced = None
        for mistake in (fast, replaced, *(rule(facts) for rule in _RULES)):
            if mistake is not None:
                yield mistake
        lost = facts.updates is not None and facts.updates.lost is not None and facts.updates.lost > _LOST
        if steady and not lost and (mistake := _rate_too_small(facts)) is not None:
            yield mistake
        if facts.pulse is not None:
            mistake = _worse_than_counting(facts, self._lowest)
            self._lowest = min(facts.pulse.loss.mean, self._lowest or facts.pulse.loss.mean)
            if mistake is not None:
                yield mistake

    def _steady(self, facts: StepFacts) -> bool:
        """Whether the learning rate neither rises any more (warm-up) nor has fallen far (the end of a schedule)."""
        now = facts.updates.highest_rate if facts.updates else None
        if now is None:
            return False
        before, self._rates = self._rates, [*self._rates, now]
        return bool(before) and now <= _STEADY * before[-1] and now >= _DECAYED * max(before)


def shared_words(updates: UpdateFacts | None, clipped_to: float | None) -> str:
    """Return what all blocks have in common in how they are trained, as far as it was seen."""
    said = []
    if updates is not None and updates.usual is not None:
        said.append(f"one step changes the weights by {updates.usual:.2g} of their size")
    if updates is not None and updates.highest_rate is not None:
        said.append(f"the highest learning rate is {updates.highest_rate:.3g}")
    if updates is not None and updates.lost is not None and updates.lost > _LOST / 2:
        said.append(f"{updates.lost:.0%} of the {updates.dtype} weights with a gradient did not move")
    if updates is not None and updates.shrink > _SHRINK / 2:
        said.append(f"weight decay takes {updates.shrink:.2%} of the weights a step")
    if clipped_to is not None:
        said.append(f"the gradient's norm was {clipped_to:.3g} at every check of late, as clipping makes it")
    return "; ".join(said)


def leak(step: int, words: str) -> Event:
    """Return the event of a model whose logits move with later tokens, from what the check of it has found."""
    text = f"a leak: {words.rstrip('.')}."
    advice = "Look at the mask of every attention head; a training loss that falls far below the usual is the leak's."
    return Event(step, "alert", "leak", text, suggestion=advice)


def _rate_too_large(facts: StepFacts, part_of_thresholds: float) -> Mistake | None:
    seen = facts.updates
    if seen is None or seen.usual is None:
        return None
    usual = median([value for value in seen.moved if value is not None])
    rates = [rate for rate in seen.rates if rate is not None]

    def too_fast(block: int, moved: float, part: float) -> bool:
        own = seen.rates[block] if seen.rates else None
        by_rate = own is not None and own > _FASTER * median(rates) > 0  # which no update need show at every step
        times, least = (_FASTER_ANYWAY, _LARGE_ANYWAY) if by_rate else (_FASTER, _LARGE)
        return moved > part_of_thresholds * times * usual and part > part_of_thresholds * least

    updates = enumerate(zip(seen.moved, seen.relative, strict=True))
    fast = [b for b, (moved, part) in updates if moved is not None and part is not None and too_fast(b, moved, part)]
    if not fast or usual == 0:
        return None
    times = median([(seen.moved[block] or 0.0) / usual for block in fast])
    part = median([seen.relative[block] or 0.0 for block in fast])
    size = f"{part:.0%}" if part >= _LARGE else f"{part:.2%}"
    text = f"{_blocks(fast)}: one step changes {_its(fast)} weights by {size}, {times:.0f} times the other blocks'"
    own = [rate for block in fast if (rate := seen.rates[block] if seen.rates else None) is not None]
    if rates and own and median(own) > 2 * median(rates):
        text += f"; the learning rate is {median(own) / median(rates):.3g} times theirs"
    return Mistake(
        "rate-too-large",
        f"{text}.",
        "Lower the learning rate of these blocks: look at the optimiser's groups.",
        fast[0] if len(fast) == 1 else None,
    )


def _replaced(facts: StepFacts) -> Mistake | None:
    """Say that single blocks are other ones than a while ago, while all others are what they were."""
    seen = facts.updates
    known = [] if seen is None else [cosine for cosine in seen.alike if cosine is not None]
    if seen is None or not known:
        return None
    rates = [rate for rate in seen.rates if rate is not None]
    usual, highest = median(known), _FASTER_ANYWAY * median(rates) if rates else 0.0

    def is_another(block: int, cosine: float) -> bool:
        own = seen.rates[block] if seen.rates else None
        return cosine < _REPLACED and (own is None or own <= highest)

    other = [block for block, cosine in enumerate(seen.alike) if cosine is not None and is_another(block, cosine)]
    if not other or usual < _THE_SAME:
        return None
    lowest = min(seen.alike[block] or 0.0 for block in other)
    text = (
        f"{_blocks(other)}: {_its(other)} weights are not those of step {seen.since} (cosine {lowest:.2f}; of the "
        f"other blocks {usual:.2f}): no step of training does that."
    )
    advice = (
        "Was a checkpoint loaded, or were layers made or initialised anew, since then? If so it must be trained again."
    )
    return Mistake("weights-replaced", text, advice, other[0] if len(other) == 1 else None)


def _rate_too_small(facts: StepFacts) -> Mistake | None:
    seen = facts.updates
    if seen is None or seen.usual is None or seen.usual > _SMALL or facts.count < _LOSSES or not facts.hopeless:
        return None
    assert facts.slope is not None
    assert facts.recent is not None
    assert facts.counting is not None
    if facts.slope.falling:
        left = (facts.recent - facts.counting) / -facts.slope.mean
        slope = f"at its slope it takes about {float(f'{left:.2g}'):,.0f} steps to reach it"
    else:
        slope = "it is not shown to fall"
    rate = "" if seen.highest_rate is None else f" at a learning rate of {seen.highest_rate:.3g}"
    text = (
        f"one step changes the weights by {seen.usual:.1g} of their size{rate}. The training loss ({facts.recent:.2f}) "
        f"is above that of counting {facts.counted} ({facts.counting:.2f}); {slope}."
    )
    return Mistake(
        "rate-too-small", text, "Raise the learning rate: usual is a change of a thousandth to a hundredth a step."
    )


def _updates_lost(facts: StepFacts) -> Mistake | None:
    seen = facts.updates
    if seen is None or seen.lost is None or seen.lost <= _LOST:
        return None
    text = (
        f"{seen.lost:.0%} of the weights that got a gradient did not change in this step: they are kept in "
        f"{seen.dtype}, and the update is below half of the distance to the next number."
    )
    advice = "Keep the weights in float32 (autocast computes in half precision), or use stochastic rounding."
    return Mistake("updates-lost", text, advice)


def _decay_too_strong(facts: StepFacts) -> Mistake | None:
    seen = facts.updates
    if seen is None:
        return None
    advice = "Lower the weight decay; 0.01 to 0.1 is usual with AdamW."
    if seen.shrink > _SHRINK and seen.kept_norm < 1 - _SHRINK:
        text = (
            f"weight decay takes {seen.shrink:.1%} of the weights in every step: what was learnt {1 / seen.shrink:.0f} "
            f"steps ago is mostly forgotten. The decayed weights have {seen.kept_norm:.2g} of their first norm."
        )
        return Mistake("decay-too-strong", text, advice)
    if seen.coupled > _COUPLED:
        text = f"weight decay adds {seen.coupled:.2g} times the gradient's norm to the gradient."
        return Mistake("decay-too-strong", text, advice)
    return None


def _gradients_kept(facts: StepFacts) -> Mistake | None:
    seen = facts.updates
    if seen is None or seen.stale is None or seen.stale < _KEPT:
        return None
    text = (
        f"the gradient of this step holds that of the step before ({seen.stale:.0%} of it): gradients are not cleared "
        "and add up over the run."
    )
    return Mistake("gradients-kept", text, "Call optimizer.zero_grad() in every step.")


def _labels_shifted(facts: StepFacts) -> Mistake | None:
    batch, pulse, told = facts.batch, facts.pulse, facts.loss
    advice = "Shift labels once: transformers' models shift them themselves, others do not."
    if batch is not None and told is not None and not _alike(told, batch.unpadded):
        for name, other in (("the token after the next", batch.twice), ("the token that it has just read", batch.same)):
            if other < (1 - _BETTER) * batch.next and abs(told - other) < 0.5 * abs(told - batch.next):
                how = "shifted twice" if other == batch.twice else "not shifted"
                text = (
                    f"labels are {how}: the training loss ({told:.2f}) is that of predicting {name} ({other:.2f} on "
                    f"the batch of this step), and the next token costs {batch.next:.2f}."
                )
                return Mistake("labels-shifted", text, advice)
    if batch is None and pulse is not None and pulse.twice is not None and pulse.twice.low > _LEAST_APART:
        text = (
            f"labels are shifted twice: on the probe the model predicts the token after the next by "
            f"{pulse.twice.mean:.2f} nats better than the next one."
        )
        return Mistake("labels-shifted", text, advice)
    return None


def _padding_in_loss(facts: StepFacts) -> Mistake | None:
    batch, told = facts.batch, facts.loss
    if batch is None or told is None or batch.padding < _PADDED:
        return None
    as_computed = [batch.next, batch.next if batch.labelled_first is None else batch.labelled_first]
    if not any(_alike(told, each) for each in as_computed) or not _apart(told, batch.unpadded):
        return None
    text = (
        f"padding counts in the loss: {batch.padding:.0%} of the targets repeat one token at the end of their rows. "
        f"The training loss is {told:.2f} with them and would be {batch.unpadded:.2f} without."
    )
    return Mistake("padding-in-loss", text, "Set the labels of padding to -100 (ignore_index), or use the mask.")


def _repeated_data(facts: StepFacts) -> Mistake | None:
    batch, pulse = facts.batch, facts.pulse
    if batch is None or pulse is None or facts.recent is None or not batch.repeats:
        return None
    gap = loss_gap(facts.losses, [pulse.loss.low, pulse.loss.high])
    if gap is None or gap > 0:
        return None
    text = (
        f"the same data again and again: {batch.repeated} of {batch.rows} sequences of late had been seen before "
        f"({batch.distinct} different ones in all). The training loss is {facts.recent:.2f}, the probe's "
        f"{pulse.loss.mean:.2f}: what is learnt is these sequences."
    )
    return Mistake("repeated-data", text, "Look at the data loader: its shuffling, its length, an iterator made anew.")


def _worse_than_counting(facts: StepFacts, lowest: float | None) -> Mistake | None:
    """Say that a model is worse than none, unless it is only young: then its loss falls."""
    assert facts.pulse is not None
    loss = facts.pulse.loss
    if facts.counting is None:
        return None
    if loss.low <= facts.counting + facts.margin or facts.count < _LOSSES or facts.slope is None:
        return None
    risen = lowest is not None and loss.low > lowest + facts.margin
    if not risen and not facts.hopeless:
        return None
    now = f"rose from {lowest:.2f}" if risen and lowest is not None else "is not shown to reach it at its present slope"
    text = (
        f"the probe's loss ({loss.mean:.2f}) is above that of counting {facts.counted} ({facts.counting:.2f}), worse "
        f"than a model without blocks, and {now}."
    )
    seen = facts.updates
    size = "" if seen is None or seen.usual is None else f" One step changes the weights by {seen.usual:.2g}."
    advice = f"Usual causes: a learning rate that is too large, labels of another text, a wrong mask.{size}"
    return Mistake(_GENERAL, text, advice)


_GENERAL = "worse-than-counting"
_RULES: tuple[Callable[[StepFacts], Mistake | None], ...] = (
    _updates_lost,
    _decay_too_strong,
    _gradients_kept,
    _labels_shifted,
    _padding_in_loss,
    _repeated_data,
)
_FROM_PULSES = {"repeated-data", _GENERAL}
_FROM_BATCHES = {"labels-shifted", "padding-in-loss"}


def _could_tell(kind: str, facts: StepFacts) -> bool:
    """Whether a check that does not show a mistake had what it takes to show it."""
    if kind in _FROM_PULSES:
        return facts.pulse is not None
    return facts.batch is not None if kind in _FROM_BATCHES else facts.updates is not None


def _apart(one: float, other: float) -> bool:
    return abs(one - other) > max(_APART * one, _LEAST_APART)


def _alike(one: float, other: float) -> bool:
    return abs(one - other) < max(_ALIKE * abs(one), _LEAST_ALIKE)


def _blocks(indices: Sequence[int]) -> str:
    """Return ``block 3``, ``blocks 3 and 4`` or ``blocks 1, 2, 5, ..`` of ascending indices."""
    if len(indices) == 1:
        return f"block {indices[0]}"
    if len(indices) == 2:
        return f"blocks {indices[0]} and {indices[1]}"
    if indices[-1] - indices[0] == len(indices) - 1:
        return f"blocks {indices[0]} to {indices[-1]}"
    return f"blocks {', '.join(map(str, indices[:3]))}" + (", .." if len(indices) > 3 else "")


def _its(indices: Sequence[int]) -> str:
    return "its" if len(indices) == 1 else "their"
