"""A plan on the terminal: what fits, the commands in every way, and the stages of each."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from peelwise.records.plain_text import clean
from peelwise.records.plan import PlanRecord, TaskPlan
from peelwise.show.plan.words import TASKS, WAYS, conclusion, size, smallest, stage_name
from peelwise.show.words import amount, duration

_NAMES = 30  # columns of a terminal, so that the tables of stages are alike

_SEVERAL = (
    " Of all commands, audit alone runs in several processes (torchrun -m peelwise audit): text and solves are shared, "
    "each process holds the whole model. What they tell each other is left out."
)


def render(record: PlanRecord) -> RenderableType:
    """Return the view."""
    shape = record.shape
    about = (
        f"  {shape.architecture}, {amount(shape.parameters)} parameters, {shape.depth} blocks, width {shape.width:,}, "
        f"{size(shape.stored_bytes)} in files"
    )
    shown = [record.fitting(task) or smallest(record, task) for task in record.tasks]
    return Group(
        Text.assemble((clean(shape.name), "bold"), (clean(about), "dim")),
        Text(conclusion(record)),
        Text("\nLargest memory by how weights are kept" + _each(record), style="bold"),
        _tasks(record),
        Text("\nStages" + _each(record), style="bold"),
        *(_stages(record, plan) for plan in shown),
        Text(
            "Computed from sizes, not measured. Operations are those of products, attention and decompositions to the "
            "end; audits, comparisons, checks of quantised weights and anatomies stop when their budget is spent."
            + (_SEVERAL * (record.processes > 1)),
            style="dim",
        ),
    )


def _each(record: PlanRecord) -> str:
    return " (each process)" if record.processes > 1 else ""


def _tasks(record: PlanRecord) -> Table:
    ways = list(dict.fromkeys(plan.way for plan in record.plans))
    table = _table("", "tokens", "operations", *(WAYS[way] for way in ways))
    for task in record.tasks:
        plans = {plan.way: plan for plan in record.ways(task)}
        any_of = next(iter(plans.values()))
        cells = [Text(TASKS[task]), Text(f"{any_of.tokens:,}" if any_of.tokens else ""), _count(any_of.operations)]
        for way in ways:
            needed = plans[way].largest.peak_bytes
            cells.append(Text(size(needed), "green" if needed <= record.memory_bytes else "red"))
        table.add_row(*cells)
    return table


def _stages(record: PlanRecord, plan: TaskPlan) -> Table:
    timed = plan.seconds is not None
    columns = ("operations", "memory", "from disk", *(("time",) if timed else ()))
    table = _table(f"{TASKS[plan.task]}, {WAYS[plan.way]}", *columns)
    for stage in plan.stages:
        fits = stage.peak_bytes <= record.memory_bytes
        cells = [
            Text(clean(stage_name(stage.stage))),
            _count(stage.operations),
            Text(size(stage.peak_bytes), "" if fits else "red"),
            Text(size(stage.read_bytes) if stage.read_bytes else ""),
        ]
        table.add_row(*cells, *([Text(duration(stage.seconds or 0.0))] if timed else []))
    total = [Text("all"), _count(plan.operations), Text(size(plan.largest.peak_bytes)), Text(size(plan.read_bytes))]
    table.add_row(*total, *([Text(duration(plan.seconds or 0.0))] if timed else []), style="bold")
    return table


def _count(operations: float) -> Text:
    return Text(amount(operations) if operations else "")


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, padding=(0, 1), header_style="bold", pad_edge=False)
    table.add_column(first, min_width=_NAMES if first else 0)
    for title in others:
        table.add_column(title, justify="right", no_wrap=True)
    return table
