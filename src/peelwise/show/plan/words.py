"""What a plan comes to, in one sentence made from its numbers."""

from __future__ import annotations

from peelwise.records.plan import PlanRecord, Task, TaskPlan, Way
from peelwise.show.words import amount, stage_words

TASKS: dict[Task, str] = {
    "check-weights": "check --no-text",
    "check": "check",
    "audit": "audit",
    "compare": "compare",
    "quantise": "quantise",
    "quantcheck": "quantcheck",
    "anatomy": "anatomy",
}
WAYS: dict[Way, str] = {"float32": "float32", "bfloat16": "--dtype bfloat16", "stream": "--stream"}
_HOW: dict[Way, tuple[str, str]] = {
    "float32": ("fits with weights in float32", "fit with weights in float32"),
    "bfloat16": ("fits with --dtype bfloat16", "fit with --dtype bfloat16"),
    "stream": ("needs --stream", "need --stream"),
}
# Where a stage's own words are too long for a table, or there are none.
_OWN_STAGES = {
    "ablation": "blocks skipped, one at a time",
    "leave-one-out": "each block left out of all",
    "identity": "opening, NaN, fingerprint",
    "proposals": "replacement weights of all blocks",
    "shuffled-control": "control: permuted targets",
    "untrained-control": "control: the model at initialisation",
    "experts": "loads of experts",
    "factors": "factors on blocks that stand out",
}


def stage_name(stage: str) -> str:
    """Return what a stage of a plan does."""
    return _OWN_STAGES.get(stage) or stage_words(stage).partition(":")[0]


def conclusion(record: PlanRecord) -> str:
    """Return what fits, how, and why the rest does not, in one sentence."""
    by_way: dict[Way, list[str]] = {}
    refused = []
    for task in record.tasks:
        found = record.fitting(task)
        if found is None:
            refused.append(_refusal(record, task))
        else:
            by_way.setdefault(found.way, []).append(TASKS[task])
    parts = [f"{_listed(names)} {_HOW[way][len(names) > 1]}" for way, names in by_way.items()]
    where = f"In {size(record.memory_bytes)}" + (f" on each of {record.processes}" if record.processes > 1 else "")
    return f"{where}: " + "; ".join([*parts, *refused]) + "."


def smallest(record: PlanRecord, task: Task) -> TaskPlan:
    """Return the plan of a task that takes least memory."""
    return min(record.ways(task), key=lambda plan: plan.largest.peak_bytes)


def size(value: float) -> str:
    """Return bytes for people, in powers of 1000 as devices are sold."""
    return amount(value, 1000, "B")


def _refusal(record: PlanRecord, task: Task) -> str:
    plan = smallest(record, task)
    how = f" even with {WAYS[plan.way]}" if plan.way != "float32" else ""
    return (
        f"{TASKS[task]} does not fit, because its stage {stage_name(plan.largest.stage)!r} takes "
        f"{size(plan.largest.peak_bytes)}{how}"
    )


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
