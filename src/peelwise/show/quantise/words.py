"""What quantising came to, in sentences, made from its numbers and codes."""

from __future__ import annotations

from peelwise.records.quantise import QuantiseRecord

STEPS = {
    "rounded": "rounded to nearest",
    "fed-back": "error feedback",
    "descended": "and descent",
    "weighed": "weighed by the loss",
}
ABOUT_LAYERS = (
    "What the codes of a layer lose at the inputs that it gets, in percent of its mean squared output; below 0 where "
    "it makes up for more than it loses. On the first 2,048 report tokens. The last step weighs errors by what the "
    "loss minds, so that this number may rise where the loss falls."
)


def conclusion(record: QuantiseRecord) -> str:
    """Return what was found, and no more than that."""
    loss, case = record.loss, record.conclusion.case
    bits = f"{record.format}, {record.bits_per_weight:.2f} bits per weight of the quantised layers"
    if case == "no-damage":
        return (
            f"{bits}: costs {loss.damage.mean:+.4f} nats per token here, which is not distinguishable from nothing. "
            f"Rounding to nearest costs {loss.rounding_damage.mean:.4f}."
        )
    if case == "no-better":
        return (
            f"{bits}: costs {loss.damage.mean:.4f} nats per token, which is not shown to be less than the "
            f"{loss.rounding_damage.mean:.4f} of rounding to nearest."
        )
    part = 100 * loss.recovered.mean / loss.rounding_damage.mean
    return (
        f"{bits}: costs {loss.damage.mean:.4f} nats per token, where rounding to nearest costs "
        f"{loss.rounding_damage.mean:.4f}: {part:.0f} % of the damage is avoided. Only more bits or training win back "
        "what is left."
    )
