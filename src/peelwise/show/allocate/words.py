"""What an allocation found, in sentences, made from its numbers."""

from __future__ import annotations

from peelwise.records.allocation import AllocationRecord
from peelwise.records.base import Interval

THIS_PLAN = "this plan"
CHOSEN = {
    "predicted": "from predictions alone",
    "corrected": "from predictions corrected by measured blocks",
}
ABOUT_INTERACTION = (
    "damages of single blocks on select add up to {single:.4f} nats; all together cost {joint:.4f} there: {words}"
)


def curve_rows(record: AllocationRecord) -> list[tuple[float, str, float, Interval]]:
    """Return bits per weight, formats, loss and damage of all that was measured, the plan among them, by bits."""
    rows = [(p.bits_per_weight, p.name if p.kind == "uniform" else "mixed", p.loss, p.damage) for p in record.curve]
    rows.append((record.bits_per_weight, THIS_PLAN, record.parent_loss + record.damage.mean, record.damage))
    return sorted(rows, key=lambda row: row[0])


def conclusion(record: AllocationRecord) -> str:
    """Return what was found, and no more than that."""
    how = CHOSEN.get(record.chosen, f"{record.chosen.removeprefix('uniform ')} for all layers")
    said = (
        f"{record.bits_per_weight:.2f} bits per weight (at most {record.budget_bits:g}) cost "
        f"{record.damage.mean:+.4f} nats per token; chosen on select: {how}."
    )
    if not record.better_than or record.chosen.startswith("uniform"):
        return said
    # The rival is the one that is hardest to beat; that others do far worse says nothing.
    name, gain = min(record.better_than.items(), key=lambda item: item[1].mean)
    apart = f"{gain.mean:.4f} less than {name} for all layers (95 % interval {gain.low:.4f} to {gain.high:.4f})"
    if gain.low > 0:
        return f"{said} That is {apart}, the best single format within the budget."
    return f"{said} It is not shown to be better than the best single format within the budget: {apart}."


def interaction(record: AllocationRecord) -> str:
    """Return whether damages add up."""
    single, joint = record.interaction.sum_of_single, record.interaction.joint
    words = "together they cost more" if joint > single else "together they cost less"
    return ABOUT_INTERACTION.format(single=single, joint=joint, words=words)
