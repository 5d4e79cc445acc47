"""What a comparison found, in sentences, made from its numbers and codes."""

from __future__ import annotations

from peelwise.records.plain_text import clean
from peelwise.records.quantcheck import QuantcheckRecord

ABOUT_LAYERS = (
    "Inputs are the parent's. Errors are measured on report, as parts of the parent's mean squared output there."
)
ABOUT_PRICES = (
    "Predicted to second order: half of the output error, weighed with the squared gradient of the parent's loss; nats "
    "per token. Layers make each other's errors worse or better, so that sums are not what all cost together."
)
MOST_BLOCKS = 4  # that a sentence names
NOT_KEPT = "The better weights of the layers do not lower the loss on select, so none of them is used."


def survival(record: QuantcheckRecord) -> list[str]:
    """Return what became of a fine-tune, in sentences; none if no base was given."""
    found = record.fine_tune
    if found is None:
        return []
    gained = f"{found.gained.mean:+.4f} ({found.gained.low:+.4f} to {found.gained.high:+.4f}) nats per token"
    if found.survives is None or found.low is None or found.high is None:
        return [
            f"The fine-tune is not shown to gain anything on this text: {gained}. Give text of the kind that it was "
            "made for."
        ]
    lines = [
        f"{100 * found.survives:.0f} % ({100 * found.low:.0f} to {100 * found.high:.0f}) of what the fine-tune gained "
        f"on this text survives: it gained {gained} on {clean(found.base.name)}, of which {found.kept.mean:+.4f} are "
        "left."
    ]
    lost = sorted((block for block in found.blocks if block.lost.low > 0), key=lambda block: -block.lost.mean)
    if lost:
        named = ", ".join(f"{block.index} ({block.lost.mean:.4f})" for block in lost[:MOST_BLOCKS])
        more = f" and {len(lost) - MOST_BLOCKS} more" if len(lost) > MOST_BLOCKS else ""
        lines.append(f"Lost in blocks {named}{more}: nats per token, each block alone with its quantised weights.")
    loud = [block for block in found.blocks if block.noise is not None and block.noise > 1]
    if loud:
        lines.append(
            f"In {len(loud)} of {len(found.blocks)} blocks quantisation changes the outputs more than the fine-tune "
            "did."
        )
    return lines


def activations(record: QuantcheckRecord) -> list[str]:
    """Return what quantised inputs cost, in sentences; none where inputs are not quantised."""
    cost, damage = record.loss.activations, record.loss.damage
    if cost is None:
        return []
    interval = f"{cost.mean:+.4f} ({cost.low:+.4f} to {cost.high:+.4f}) nats per token"
    formats = clean(record.activations or "")
    if cost.low <= 0:
        lines = [f"Quantised inputs ({formats}) are not shown to cost anything beside the weights: {interval}."]
    else:
        larger = "more" if cost.mean > damage.mean else "less"
        lines = [f"Quantised inputs ({formats}) cost {interval}, {larger} than the weights."]
    rounded = [layer for layer in record.layers if layer.inputs is not None]
    worse = sorted((m for m in rounded if m.inputs and m.inputs > m.error), key=lambda m: -(m.inputs or 0))
    if worse:
        names = ", ".join(clean(layer.name) for layer in worse[:MOST_BLOCKS])
        more = f" and {len(worse) - MOST_BLOCKS} more" if len(worse) > MOST_BLOCKS else ""
        lines.append(f"Their rounding changes the output more than that of the weights does in {names}{more}.")
    return lines


def conclusion(record: QuantcheckRecord) -> str:
    """Return what was found, and no more than that."""
    damage, left, case = record.loss.damage, record.loss.left, record.conclusion.case
    if case == "no-damage":
        return f"Quantising costs {damage.mean:+.4f} nats per token here, which is not distinguishable from nothing."
    costs = f"Quantising costs {damage.mean:.4f} nats per token."
    if case == "recoverable":
        part = f" ({100 * left.mean / damage.mean:.0f} % of the damage)" if damage.mean > 0 else ""
        return (
            f"{costs} Of these, {left.mean:.4f}{part} are recoverable at the same bit width: other codes and scales "
            "of the same formats win them back on text they were not fitted on."
        )
    solved = sum(layer.split is not None for layer in record.layers)
    return (
        f"{costs} The best weights found inside the formats ({solved} of {len(record.layers)} layers) are not shown to "
        "win anything back."
    )
