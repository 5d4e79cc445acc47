"""From numbers to colours: red, yellow, green or grey, with the reason as a code; frozen blocks get none. No torch.

Thirty blocks are thirty questions: a colour is given only where Holm's procedure over all measured blocks
rejects the opposite, at 2.5 % on each side (95 % together). The plain 95 % interval is what is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from peelwise.evidence.intervals import Paired, holm_rejections
from peelwise.records.base import NATS, Colour
from peelwise.records.codes import INTERACTS, Reason

LEVEL = 0.025
# How verdicts follow from numbers. A record names its rule: what was certified by an older one is judged by that.
# 1: solo gains decide. 2: on text that is not training text, marginal gains do. 3: of blocks whose solo gains are not
# distinguishable, the one to look at first is that with the largest marginal gain.
RULE = 3
TIES_BY_MARGINAL = 3
_OWN_GAINS = 2  # the rule since which marginal gains decide on other text
_ROBUST_DEVIATIONS = 3.0
_FEWEST_FOR_TREND = 5
_AT_WORK = 4.0  # margins that the median block's removal costs where it says something that one costs nothing
_APART = 1.96  # standard errors


@dataclass(frozen=True)
class Evidence:
    """What was measured for one block; ``None`` means not measured. Of a ``frozen`` one nothing is asked.

    ``bound`` is what its direction gains to first order at most; it counts where the block was not refined by itself.
    """

    alone: Paired | None = None
    unique: Paired | None = None
    frozen: bool = False
    bound: Paired | None = None


@dataclass(frozen=True)
class Verdict:
    """A colour, its reason, and how many report sequences would decide a grey one (if that is what lacks).

    ``interaction``: refining the block beside its neighbours hurts, so its marginal gain is significantly negative.
    """

    colour: Colour
    reason: Reason
    sequences_needed: int | None = None
    interaction: bool = False

    @property
    def code(self) -> str:
        """The reason with the interaction, in one text: what a run history holds."""
        return f"{self.reason}{INTERACTS if self.interaction else ''}"


def default_margin(loss: float, unit: str = NATS) -> float:
    """Return the margin in nats per token: the larger of 0.5 % of the loss and 0.003; in other units 0.5 %."""
    return max(0.005 * loss, 0.003 if unit == NATS else 0.0)


def cloud_colour(loss: float, upper: float | None, lower: float, margin: float) -> Colour:
    """Return the region of the loss's cloud that a loss lies in; all in nats per token on the same tokens.

    Red: above ``upper``, what a model without any block reaches. Green: at or below ``lower + margin``, so that no
    witness of the whole model is known that gains more than the margin. Yellow: between (arXiv:2410.10984 calls
    these regions a cloud). Red comes first: early in training one step's witness may be above both.

    Args:
        loss: of the model.
        upper: of the reference without blocks, or ``None`` where it is not known; then nothing is red.
        lower: of the composed witness.
        margin: smallest gain that matters.
    """
    if upper is not None and loss > upper:
        return "red"
    return "green" if loss <= lower + margin else "yellow"


def own_gains_decide(in_distribution: bool, rule: int = RULE) -> bool:
    """Return whether verdicts follow from marginal gains: on text that is not known to be training text."""
    return not in_distribution and rule >= _OWN_GAINS


def judge(
    evidence: Sequence[Evidence],
    margin: float,
    *,
    in_distribution: bool,
    still_falling: bool = False,
    rule: int = RULE,
) -> list[Verdict]:
    """Return one verdict per block.

    On training text the solo gain decides. On other text it also holds what every block could adapt to that text, and
    the marginal gain what is left after all others have adapted: a block is green if that is below the margin, and
    red only if it is above, or if the solo gain stands out from the trend over depth. A block that was not refined is
    green where the slope of its direction leaves no room for a gain above the margin.

    Args:
        evidence: per block in order of depth.
        margin: smallest recoverable loss that matters, nats per token.
        in_distribution: whether the probe is training text.
        still_falling: whether the training loss is still falling.
        rule: by which verdicts follow; an earlier one for records that were made by it.
    """
    alone = [e.alone for e in evidence]
    above = _holm([a.p_at_most(margin) if a else None for a in alone])
    most = [e.alone or e.bound for e in evidence]  # a gain that was not measured is bounded by the slope
    below = _holm([m.p_at_least(margin) if m else None for m in most])
    unique_above = _holm([e.unique.p_at_most(margin) if e.unique else None for e in evidence])
    unique_below = _holm([e.unique.p_at_least(margin) if e.unique else None for e in evidence])
    unique_negative = _holm([e.unique.p_at_least(0.0) if e.unique else None for e in evidence])
    own_matters = own_gains_decide(in_distribution, rule)
    outlying = stands_out([a.mean if a else None for a in alone], margin)
    verdicts = []
    for i, measured in enumerate(alone):
        if evidence[i].frozen:
            verdicts.append(Verdict("frozen", "frozen"))
            continue
        own = evidence[i].unique
        verdict = _one(measured, margin, above[i], below[i], unique_above[i])
        # A block that takes away from its neighbours' gain has nothing of its own, and may have much by itself.
        nothing = unique_below[i] and (below[i] or not unique_negative[i])
        if own_matters and nothing and not (above[i] and outlying[i]):
            verdict = Verdict("green", "nothing-of-its-own")
        elif own_matters and unique_above[i] and verdict.colour != "red":
            verdict = Verdict("red", "own-above-margin")
        elif own_matters and own is not None and verdict.colour == "grey" and not unique_below[i]:
            verdict = Verdict("grey", "more-tokens", own.sequences_needed(margin))
        if verdict.colour == "red" and still_falling:
            verdict = Verdict("yellow", "still-falling")
        elif verdict.colour == "red" and not in_distribution and not (outlying[i] or unique_above[i]):
            verdict = Verdict("yellow", "foreign-text")
        if unique_negative[i]:
            unsure = verdict.reason in ("nothing-above-margin", "screened")
            verdict = replace(verdict, colour="grey" if unsure else verdict.colour, interaction=True)
        verdicts.append(verdict)
    return verdicts


def _one(alone: Paired | None, margin: float, above: bool, below: bool, unique_above: bool) -> Verdict:
    if alone is None and unique_above:
        return Verdict("grey", "marginal-only")
    if alone is None:
        return Verdict("green", "screened") if below else Verdict("grey", "not-refined")
    if above:
        return Verdict("red", "above-margin")
    if below:
        return Verdict("green", "nothing-above-margin")
    return Verdict("grey", "more-tokens", alone.sequences_needed(margin))


def stands_out(values: Sequence[float | None], margin: float) -> list[bool]:
    """Return which values lie above the trend over depth by more than three robust deviations.

    The trend is Theil and Sen's line (median of pairwise slopes), the deviation 1.4826 times the median
    absolute residual. A value must also clear the trend by ``margin``: where all agree to the digit, three
    deviations are nothing. Fewer than five measured blocks have no trend.
    """
    index = np.array([i for i, v in enumerate(values) if v is not None], dtype=float)
    found = np.array([v for v in values if v is not None], dtype=float)
    if len(found) < _FEWEST_FOR_TREND:
        return [False] * len(values)
    first, second = np.triu_indices(len(found), k=1)
    slope = np.median((found[second] - found[first]) / (index[second] - index[first]))
    residual = found - slope * index
    residual -= np.median(residual)
    deviation = 1.4826 * np.median(np.abs(residual))
    out = {int(i) for i, r in zip(index, residual, strict=True) if r > max(_ROBUST_DEVIATIONS * deviation, margin)}
    return [i in out for i in range(len(values))]


def leaders(values: Sequence[Paired | None]) -> list[int]:
    """Return the block with the largest value and those that are not distinguishable from it, largest first.

    Apart is more than 1.96 standard errors of both together. Blocks that were not measured do not compete.
    """
    known = sorted(((i, v) for i, v in enumerate(values) if v is not None), key=lambda pair: -pair[1].mean)
    if not known:
        return []
    _, top = known[0]
    return [i for i, v in known if top.mean - v.mean <= _APART * (top.standard_error**2 + v.standard_error**2) ** 0.5]


def harmful(removals: Sequence[Paired | None], margin: float) -> list[int]:
    """Return the blocks whose removal lowers the loss by more than the margin (Holm over all), the worst first.

    Args:
        removals: what the loss rises by without each block, nats per token.
        margin: smallest decrease that matters.
    """
    shown = _holm([r.p_at_least(-margin) if r else None for r in removals])
    found = [(r.mean, i) for i, (r, flag) in enumerate(zip(removals, shown, strict=True)) if r and flag]
    return [i for _, i in sorted(found)]


def idle(removals: Sequence[Paired | None], margin: float) -> list[int]:
    """Return the blocks that do no work: leaving one out changes the loss by less than the margin (Holm over all).

    Only where the median block is worth several margins: in a model whose blocks all do little, none stands out.

    Args:
        removals: what the loss rises by without each block, nats per token.
        margin: smallest change that matters.
    """
    known = [r.mean for r in removals if r]
    if len(known) < _FEWEST_FOR_TREND or float(np.median(known)) < _AT_WORK * margin:
        return []
    below = _holm([r.p_at_least(margin) if r else None for r in removals])
    above = _holm([r.p_at_most(-margin) if r else None for r in removals])
    return [i for i, shown in enumerate(zip(below, above, strict=True)) if all(shown)]


def _holm(p_values: Sequence[float | None]) -> list[bool]:
    """Holm over the measured blocks; unmeasured ones are never rejected."""
    known = [i for i, p in enumerate(p_values) if p is not None]
    rejected = holm_rejections([p for p in p_values if p is not None], LEVEL)
    out = [False] * len(p_values)
    for i, flag in zip(known, rejected, strict=True):
        out[i] = flag
    return out
