"""What a comparison found, in sentences, made from its numbers and codes."""

from __future__ import annotations

from peelwise.records.quantcheck import QuantcheckRecord

ABOUT_LAYERS = (
    "Inputs are the parent's. Errors are measured on report, as parts of the parent's mean squared output there."
)
NOT_KEPT = "The better weights of the layers do not lower the loss on select, so none of them is used."


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
