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
    better = [name for name, gain in record.better_than.items() if gain.low > 0]
    if better:
        gains = ", ".join(f"{record.better_than[name].mean:.4f} less than {name}" for name in better)
        return f"{said} That is {gains} for all layers."
    if record.better_than and not record.chosen.startswith("uniform"):
        return f"{said} It is not shown to be better than one format for all layers within the budget."
    return said


def interaction(record: AllocationRecord) -> str:
    """Return whether damages add up."""
    single, joint = record.interaction.sum_of_single, record.interaction.joint
    words = "together they cost more" if joint > single else "together they cost less"
    return ABOUT_INTERACTION.format(single=single, joint=joint, words=words)
