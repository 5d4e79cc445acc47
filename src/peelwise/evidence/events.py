"""Events of a run: from what was seen, as a code and numbers, to a row with its sentence and a suggestion. No torch.

Rows hold their sentences, because people read them with plain SQL; this is the one place where those are made. A
suggestion fits what was seen and says no more: it says where to look, and names an action only from the table of those
that were measured to help (`peelwise.evidence.actions`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from peelwise.evidence.actions import suggestion
from peelwise.records.base import Note
from peelwise.records.run import Event, Level
from peelwise.records.signals import title_of

_SLOW = 0.5  # a learning rate below this part of the other blocks' is worth a word
_NAMED = 3
DEAD_CHECKS = 3  # an output without a gradient at so many checks in a row is called dead


Complaint = Literal[
    "frozen", "not-optimised", "zero-rate", "not-updated", "no-gradient", "non-finite", "dead-units", "still-zero"
]

_ADVICE: Mapping[Complaint, str] = {
    "frozen": "If that is not meant, set requires_grad_(True).",
    "not-optimised": "If that is not meant, give them to the optimiser.",
    "zero-rate": "If that is not meant, look at the optimiser's groups and the schedule.",
    "not-updated": "Check whether the loss depends on them.",
    "no-gradient": "Check whether the loss depends on them.",
    "non-finite": "Look at the learning rate, at clipping, at the scale of the loss and at the last batches.",
    "still-zero": "Give one of an adapter's two matrices random numbers: where both are zero neither gets a gradient.",
    "dead-units": "Usual causes: a learning rate that was too large, their initial weights, the activation.",
}
# The complaints that explain why a block is not trained, as they are said of it.
_UNTRAINED: Mapping[Complaint, str] = {
    "frozen": "has frozen parameters",
    "not-optimised": "has parameters that are not in the optimiser",
    "zero-rate": "has a learning rate of zero",
    "not-updated": "has parameters that are not updated",
    "no-gradient": "has parameters that get no gradient",
    "still-zero": "has adapters that are still zero",
}


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, with the parameters (or layers) it is wrong with, in the order of the model.

    Attributes:
        kind: what is wrong.
        names: of the parameters, or the layer.
        blocks: that they are in.
        total: parameters of the model, or outputs of the layer.
        dead: outputs of the layer that get no gradient.
    """

    kind: Complaint
    names: tuple[str, ...]
    blocks: tuple[int, ...]
    total: int
    dead: int = 0

    @property
    def stops_training(self) -> bool:
        """Whether it explains why a block is not trained."""
        return self.kind in _UNTRAINED


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
        untrained: what stops its training, or ``None``.
        rate_ratio: its learning rate over the median of all blocks, or ``None``.
        change: the latest change of level, or ``None``.
        dead: the layer of which many outputs get no gradient, or ``None``.
        clipped_to: what the norm of all gradients has been at every check of late, or ``None`` where it varies.
    """

    untrained: Complaint | None = None
    rate_ratio: float | None = None
    change: Change | None = None
    dead: Finding | None = None
    clipped_to: float | None = None

    @property
    def has_own_cause(self) -> bool:
        """Whether something of this block alone explains why it is red."""
        slow = self.rate_ratio is not None and self.rate_ratio < _SLOW
        return self.untrained is not None or self.dead is not None or slow


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
    """Return what to look at in a red block: the likeliest cause that was seen, else what helped a damaged block."""
    if seen.untrained is not None:
        return f"It {_UNTRAINED[seen.untrained]}; check whether that is meant."
    if seen.rate_ratio is not None and seen.rate_ratio < _SLOW:
        return f"Its learning rate is {seen.rate_ratio:.2g} of the other blocks'; check whether that is meant."
    if seen.dead:
        return (
            f"{seen.dead.dead} of {seen.dead.total} outputs of {seen.dead.names[0]} get no gradient. "
            f"{_ADVICE['dead-units']}"
        )
    change = seen.change
    if change is not None and change.times > 1:
        return (
            f"Its {title_of(change.statistic)} rose {change.times:.1f} times around step "
            f"{change.by_step}: look at the data and the updates of that time. {suggestion('damaged-block')}"
        )
    if seen.clipped_to is not None:
        return (
            f"The norm of all gradients was {seen.clipped_to:.3g} at every check of late, as clipping makes it: check "
            "whether that is meant, and the learning rate."
        )
    return f"No cause was seen. {suggestion('damaged-block')}"


def wrong(step: int, finding: Finding) -> Event:
    """Return the event of something that is wrong with parameters or a layer."""
    count, kind = len(finding.names), finding.kind
    names = ", ".join(finding.names[:_NAMED]) + (", .." if count > _NAMED else "")
    what = f"{count} of {finding.total} parameters" if count > 1 else "1 parameter"
    are, get, have = ("are", "get", "have") if count > 1 else ("is", "gets", "has")
    text = {
        "frozen": f"{what} {are} frozen (requires_grad is False): {names}.",
        "not-optimised": f"{what} {are} not in the optimiser: {names}.",
        "zero-rate": f"{what} {have} a learning rate of zero: {names}.",
        "not-updated": f"{what} {are} not written by the optimiser while others are: {names}.",
        "no-gradient": f"{what} {get} no gradient: {names}.",
        "non-finite": f"{what} {have} a gradient that is NaN or Inf: {names}.",
        "still-zero": f"{what} of adapters {are} still zero at {DEAD_CHECKS} checks after training began: {names}.",
        "dead-units": f"{names}: {finding.dead} of {finding.total} outputs got no gradient at {DEAD_CHECKS} checks in "
        "a row.",
    }[kind]
    block = finding.blocks[0] if len(finding.blocks) == 1 else None
    level: Level = "alert" if kind == "non-finite" else "warning"
    return Event(step, level, kind, text, block, suggestion=_ADVICE[kind])


def non_finite_loss(step: int, loss: float) -> Event:
    """Return the event of a training loss that is NaN or Inf."""
    return Event(step, "alert", "non-finite", f"the training loss is {loss}.", suggestion=_ADVICE["non-finite"])


def no_gradients_seen(step: int) -> Event:
    """Return the event of checks that never found a gradient."""
    advice = "Call step() after the optimiser's step and before its zero_grad()."
    return Event(step, "info", "no-gradients-seen", "no check found any gradient.", suggestion=advice)


def not_followed(step: int, error: Exception) -> Event:
    """Return the event of a step that the monitor could not follow."""
    return Event(step, "warning", "not-followed", f"a step could not be followed; training goes on. {_named(error)}")


def not_called(step: int, error: Exception, what: str) -> Event:
    """Return the event of a callback that raised, and is called no more."""
    return Event(step, "warning", "not-called", f"{what} is called no more; training goes on. {_named(error)}")


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def not_measured(step: int, why: str, *, later: bool) -> Event:
    """Return the event of a measurement that failed; ``later``: the next is tried only after some were left out."""
    text = f"the model could not be measured: {why.rstrip('.')}." + (" It is tried again later." if later else "")
    return Event(step, "warning", "not-measured", text)


def signals_left_out(step: int, why: str) -> Event:
    """Return the event of signals of a check that were asked for and are not recorded."""
    return Event(step, "warning", "no-signals", f"the signals of a check are left out: {why.rstrip('.')}.")


def blocks_changed(step: int, names: Sequence[str]) -> Event:
    """Return the event of blocks that came or went: what is recorded has a place for each that there was."""
    named = ", ".join(names[:_NAMED]) + (", .." if len(names) > _NAMED else "")
    text = f"the blocks are not those of the start ({named} came or went); nothing is measured while that is so."
    return Event(step, "warning", "blocks-changed", text, suggestion="Close this monitor and make another.")


def layers_changed(step: int, replaced: int, asked: int, total: int) -> Event:
    """Return the event of linear layers that are other ones, or are asked about, since the last measurement."""
    what = f"{replaced} linear layers of the blocks are new or replaced" if replaced else "layers were frozen or thawed"
    text = f"{what}; {asked} of {total} are asked about."
    return Event(step, "info", "layers-changed", text)


def noted(step: int, note: Note) -> Event:
    """Return the event of a remark that a self-check of the model has made."""
    found = note.values
    texts = {
        "left-out": "{count} parameters of the blocks ({share:.1%} of their numbers) are in no linear layer that is "
        "called, so nothing is said of them: {names}.",
        "frozen-layers": "{layers} linear layers ({share:.1%} of the blocks' numbers) are frozen and not asked about; "
        "{blocks} blocks have no others.",
        "untied": "the configuration says that {embedding} and {head} share one weight; each has its own.",
        "autocast": "the model's own forward computes in {dtype} (autocast inside of it); measurements do, too.",
    }
    text = texts[note.code].format(**found) if note.code in texts else f"{note.code}: {dict(found)}."
    return Event(step, "warning" if note.code in ("left-out", "untied") else "info", note.code, text)


def stepped_back(last: int, step: int) -> Event:
    """Return the event of a step that is before the last one."""
    text = f"steps went back from {last} to {step}; what was seen from {step} on counts no more."
    return Event(step, "info", "stepped-back", text)


def losses_disagree(step: int, training: float, probe: float) -> Event:
    """Return the event of a training loss that is far from the probe's loss of the same model."""
    text = f"the training loss ({training:.2f}) and the probe's ({probe:.2f}) are far apart, at two measurements."
    if training > probe:
        advice = (
            "Usual causes: padding or prompts that count in the loss, label smoothing or further terms in it, a sum "
            "where a mean is meant, strong dropout, or a branch (such as quantisation) that only training runs."
        )
    else:
        advice = (
            "Usual causes: training text that was memorised, a loss that is divided (gradient accumulation) or masked, "
            "or a probe of another tokenizer or format than training text."
        )
    return Event(step, "warning", "losses-disagree", text, suggestion=advice)


def gains_not_finite(step: int, blocks: Sequence[int]) -> Event:
    """Return the event of differences that are no numbers; ``blocks`` may hold the whole model."""
    named = ", ".join("all together" if block < 0 else f"block {block}" for block in blocks[:_NAMED])
    named += ", .." if len(blocks) > _NAMED else ""
    text = f"what refining gains is NaN or Inf ({named}) and counts as not measured."
    return Event(step, "warning", "gains-not-finite", text)


def not_monitored(step: int, error: Exception) -> Event:
    """Return the event of a training that no monitor could be made for."""
    return Event(step, "warning", "not-monitored", f"training goes on unmonitored: {_named(error)}")


def cost(
    step: int, full: int, taken: int, seconds: tuple[float, float], budget: float, *, of: str = "probe tokens"
) -> Event:
    """Return the event of what measurements are expected to cost, at the first step.

    Args:
        step: the first one.
        full: tokens of the whole probe.
        taken: of them, what measurements begin with.
        seconds: that a measurement takes which can decide a block, on all tokens and on those.
        budget: share of wall time.
        of: what is counted in the place of tokens.
    """
    text = f"{full:,} {of} at {budget:.1%} mean one measurement in {_time(seconds[0] / budget)}"
    if taken < full:
        text += f"; {taken:,} are measured at first, one in {_time(seconds[1] / budget)}"
    advice = "More are taken as the run gets longer." if taken < full else ""
    return Event(step, "info", "cost", f"{text}.", suggestion=advice)


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.2g} min" if seconds < 5400 else f"{seconds / 3600:.2g} h"


def unlike_scales(step: int, block: int, deviations: float, slope: float) -> Event:
    """Return the event of a block whose scales the loss would change far more certainly than the others'.

    Args:
        step: of the training.
        block: its index.
        deviations: by how many standard deviations its evidence is above chance.
        slope: the largest gain slope of its parts, in absolute value; nats per unit of log scale.
    """
    text = (
        f"block {block} is unlike the others: the loss asks for {'smaller' if slope > 0 else 'larger'} scales in it "
        f"(gain slope {slope:+.3f} nats per unit of log scale, {deviations:.1f} standard deviations)"
    )
    advice = "It is refined first; `peelwise check` on a checkpoint tries factors and says what stands out."
    return Event(step, "warning", "unlike-scales", f"{text}.", block, suggestion=advice)


def few_tokens(step: int, note: Note) -> Event:
    """Return the event of sums that are rank deficient, from the remark of the first one."""
    found = note.values
    if note.code == "few-fit-tokens":
        text = f"{found['tokens']} fit tokens are few for the {found['inputs']} inputs of {found['layer']}"
        text += f" (its sum has rank {found['rank']})"
    elif note.code == "few-expert-tokens":
        text = f"{found['matrices']} of {found['of']} matrices of experts of {found['block']} saw fewer fit tokens "
        text += f"than they have inputs, {found['without']} of them none"
    else:
        text = f"the sum of {found['layer']} needs damping {found['used']:g} instead of {found['damping']:g}"
    advice = "Damping keeps the result valid; more fit tokens would sharpen it."
    return Event(step, "info", "few-tokens", f"{text}.", suggestion=advice)


def not_recorded(step: int, error: object, what: str = "", *, begun: bool = True) -> Event:
    """Return the event of a run that is not, or no longer, recorded; ``what`` names a logger instead of the file."""
    lost = f"{what} logs nothing more" if what else f"the run is {'no longer' if begun else 'not'} recorded"
    return Event(step, "warning", "not-recorded", f"{lost}; training goes on. {error}")


def codes_still(step: int, block: int, measurements: int) -> Event:
    """Return the event of a low-bit block whose codes do not move."""
    text = f"block {block}: almost none of its codes flipped over {measurements} measurements."
    advice = (
        "Its latent weights move less than it takes to cross a threshold: look at its learning rate and its scale. Its "
        "verdict, or peelwise audit, tells whether other codes would do better."
    )
    return Event(step, "warning", "codes-still", text, block, suggestion=advice)


def fake_quantisers_switched(step: int, on: int, off: int, *, compiled: bool) -> Event:
    """Return the event of a run in which fake quantisers were switched on or off between two measurements."""
    text = f"Fake quantisers were switched: {on} are on now and {off} off."
    advice = "Losses and verdicts before and after are of different models: compare only those on one side."
    if compiled:
        advice += (
            " The model is compiled: measured is the module as it stands. Code that was compiled with guards skipped, "
            "exported or captured before keeps the old state, and then the training's loss and the probe's part."
        )
    return Event(step, "warning", "fake-quant-switched", text, suggestion=advice)


def dead_rows(step: int, block: int, dead: int, layer: str) -> Event:
    """Return the event of a low-bit layer that has outputs with all-zero weights."""
    text = f"block {block}: {dead} outputs of {layer} have all-zero weights."
    advice = "They contribute nothing: look at the layer's threshold and scale."
    return Event(step, "warning", "dead-rows", text, block, suggestion=advice)
