"""What an anatomy found, in sentences, made from its numbers and codes."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from peelwise.evidence.anatomy import perplexity_ratio
from peelwise.records.anatomy import Ablation, AnatomyRecord, Bend, Bent, BlockAnatomy, Predictability
from peelwise.records.base import Interval
from peelwise.show.words import nats

# A line for every way; a test says so.
ABLATIONS: Mapping[Ablation, str] = MappingProxyType(
    {
        "skipped": "skipped",
        "attention": "attention silent",
        "mlp": "MLP silent",
        "mean": "mean output",
        "neighbours": "neighbours' mean",
    }
)
ABLATION_MEANINGS: Mapping[Ablation, str] = MappingProxyType(
    {
        "skipped": "The block's input is passed on as its output.",
        "attention": "What attention writes is set to zero.",
        "mlp": "What the MLP writes is set to zero.",
        "mean": "What the block adds is replaced by its mean over the fit tokens.",
        "neighbours": "Its linear layers are replaced by the mean of those of the blocks beside it; norms stay.",
    }
)
BENDS: Mapping[Bend, str] = MappingProxyType(
    {
        "scale-down": "scaled down to",
        "scale-up": "scaled up to",
        "noise": "noise, std",
        "low-rank": "rank cut by",
        "rounding": "bits",
        "signs": "signs flipped",
    }
)
NOT_TOLERATED = "none"
SIGNS = "Costs are increases of the loss in nats per token on text that nothing was chosen on; below 0 is better so."
TOLERATED = (
    "Tolerated is the largest strength up to which the upper end of every interval is within the margin: with more "
    "text intervals shrink, and it can only grow."
)
RECOVERED = (
    "Recovered: of what noise of half a standard deviation costs, the share that one closed-form round of the block "
    "alone takes back. Retrained: the share that training the block alone does, stopped early on select."
)
CONTROLS = (
    "A predictor explains something only if it explains more than of independent matrices of the same norms. "
    "Differences of independent matrices have a cosine of -1/2 from one to the next whatever their order, so -1/2 says "
    "nothing."
)
CORRELATED = (
    "Rank correlations over blocks; those in bold are significant with all columns asked about at once (Holm). A "
    "correlation over few blocks says little of another model."
)
_TELLS = 0.02  # of the squared norm that a predictor must explain beyond its control


def conclusion(record: AnatomyRecord) -> str:
    """Return what was found, in a few sentences."""
    said = [*_importance(record), *_better(record), *_weights(record)]
    if not record.complete:
        said.append("Stopped early: what is missing was not measured within the budget.")
    return " ".join(said) or "Nothing was measured."


def _importance(record: AnatomyRecord) -> list[str]:
    costs = {b.index: b.ablation["skipped"] for b in record.blocks if "skipped" in b.ablation}
    if not costs:
        return []
    order = sorted(costs, key=lambda index: -costs[index].mean)
    most, least = order[0], order[-1]
    whole = "" if len(costs) == len(record.blocks) else f"Of the {len(costs)} blocks measured: w"
    high, low = costs[most], costs[least]
    return [
        f"{whole or 'W'}ithout block {most} the loss rises most, by {nats(high.mean)} nats per token (perplexity "
        f"{times(high)}); without block {least} least, by {nats(low.mean)} ({times(low)})."
    ]


def _better(record: AnatomyRecord) -> list[str]:
    if not any(block.ablation for block in record.blocks):
        return []
    if not record.better_without:
        return ["No block or part was found without which the model is better."]
    which = ", ".join(f"{each.block} ({ABLATIONS[each.ablation]})" for each in record.better_without)
    return [f"The model is better without: {which} (Holm over all blocks and ways)."]


def _weights(record: AnatomyRecord) -> list[str]:
    if not record.predictability:
        return []
    told = [each.part for each in record.predictability if is_told(each)]
    if not told:
        return ["Other blocks' matrices tell no more of a block's than independent random matrices do."]
    return [f"Other blocks' matrices tell something of {', '.join(told)}."]


def is_told(each: Predictability) -> bool:
    """Whether the fitted predictor explains more of a kind of matrix than of independent ones, on rows held out."""
    return each.explained.ridge > each.independent.ridge + _TELLS


def times(cost: Interval) -> str:
    """Return what a cost multiplies the perplexity by, with three digits."""
    ratio = perplexity_ratio(cost)
    return f"x {ratio:,.0f}" if ratio >= 100 else f"x {ratio:.3g}"


def tolerated(bent: Bent) -> str:
    """Return what a block tolerates of one way of bending it."""
    if bent.tolerated is None:
        return NOT_TOLERATED
    share = bent.kind in ("low-rank", "signs")
    return f"{100 * bent.tolerated:g} %" if share else f"{bent.tolerated:g}"


def retrained(block: BlockAnatomy) -> str:
    """Return what training a damaged block alone takes back of the damage, and after how many steps."""
    done = None if block.recovery is None else block.recovery.retrained
    if done is None:
        return "-"
    return f"{100 * done.share:.0f} % in {done.best_step if done.steps is None else done.steps}"


def bent_of(block: BlockAnatomy, kind: Bend) -> Bent | None:
    """Return what one way of bending did to a block, or ``None``."""
    return next((bent for bent in block.bent if bent.kind == kind), None)
