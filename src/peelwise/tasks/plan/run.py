"""Put a plan together: every task in every way that the weights can be kept in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import get_args

from peelwise.records.plan import PlanRecord, Shape, StagePlan, Task, TaskPlan, Way
from peelwise.tasks.plan import low_bit, stages, studies
from peelwise.tasks.plan.memory import Memory
from peelwise.tasks.plan.settings import PlanSettings
from peelwise.tasks.plan.stages import Loops, Probe, Stage

# Interpreter, PyTorch, transformers and what else is imported: measured, `benchmarks/planning.py`.
BASE_BYTES = 0.48e9
_FLOAT32, _HALF = 4, 2

Text = tuple[int, int]  # tokens of a probe, and of a sequence


def run_plan(
    shape: Shape, settings: PlanSettings, memory_bytes: float, texts: Mapping[Task, Text], loops: Loops | None = None
) -> PlanRecord:
    """Return what measuring a model of this shape would take.

    Args:
        shape: the model.
        settings: text and machine.
        memory_bytes: what each process may take.
        texts: tokens that each task takes by itself, and how long a sequence is; tasks without text are left out.
        loops: how often what depends on the model is done; as a rule without it.
    """
    found = []
    tasks: tuple[Task, ...] = get_args(Task)
    for task in tasks if settings.processes == 1 else ("audit",):  # the one command that several processes share
        tokens, length = texts.get(task, (0, 1))
        tokens = settings.tokens or tokens if tokens else 0
        for way in _ways(shape, settings.processes):
            each = planned(shape, task, way, (tokens, length), settings.processes, loops or Loops())
            found.append(TaskPlan(task=task, way=way, tokens=tokens, stages=tuple(_timed(shape, way, *each, settings))))
    return PlanRecord(
        shape=shape,
        memory_bytes=memory_bytes,
        base_bytes=BASE_BYTES,
        processes=settings.processes,
        operations_per_second=settings.amount("speed"),
        disk_bytes_per_second=settings.amount("disk"),
        plans=tuple(found),
    )


def planned(
    shape: Shape,
    task: Task,
    way: Way,
    text: Text,
    processes: int,
    loops: Loops,
    base_bytes: float = BASE_BYTES,
    probe: Probe | None = None,
) -> tuple[Memory, list[Stage]]:
    """Return the stages of a task, and what is in memory throughout.

    Several processes share the sequences of a probe, solves and signals of weights; each holds the whole model and all
    replacement weights.

    Args:
        shape: the model.
        task: what is done.
        way: how its weights are kept.
        text: tokens, and how long a sequence is.
        processes: that share an audit.
        loops: how often what depends on the model is done.
        base_bytes: of interpreter and packages.
        probe: the parts of the text, where they are known; else as they are drawn as a rule.
    """
    tokens, length = text
    micro = PlanSettings().micro_batch_tokens
    memory = Memory(
        shape,
        tokens / processes,
        micro,
        bytes_of(shape, way),
        way == "stream",
        base_bytes,
        models=2 if task in _TWO_MODELS else 1,
        changes_on_disk=way == "stream" and task in ("audit", "quantise"),
    )
    if task == "check-weights":
        return memory, stages.check_weights(shape, memory)
    probe = probe or Probe.of(tokens / processes, length, micro)
    if task == "audit":
        return memory, stages.audit(shape, probe, memory, loops, processes)
    return memory, _STAGES[task](shape, probe, memory, loops)


_STAGES: Mapping[Task, Callable[[Shape, Probe, Memory, Loops], list[Stage]]] = {
    "check": stages.check,
    "compare": stages.compare,
    "quantise": low_bit.quantise,
    "quantcheck": low_bit.quantcheck,
    "anatomy": studies.anatomy,
}
_TWO_MODELS: tuple[Task, ...] = ("compare", "quantcheck")


def bytes_of(shape: Shape, way: Way) -> int:
    """Return what a weight takes in memory: that of its dtype, in a stream that of the stored one."""
    if way == "stream":
        return _HALF if shape.stored_bytes_per_weight < _FLOAT32 - 1 else _FLOAT32
    return _FLOAT32 if way == "float32" else _HALF


def _ways(shape: Shape, processes: int) -> tuple[Way, ...]:
    # Each of several processes holds what it measures.
    if not shape.streamable or processes > 1:
        return "float32", "bfloat16"
    # Files in half precision hold what is in memory then; of others a stream is exact, and half precision is not.
    halves = bytes_of(shape, "stream") == _HALF
    return ("float32", "bfloat16", "stream") if halves else ("float32", "stream", "bfloat16")


def _timed(shape: Shape, way: Way, memory: Memory, found: list[Stage], settings: PlanSettings) -> Iterator[StagePlan]:
    """Yield the stages with seconds where a speed is known; weights in memory are read once, before the first."""
    speed, disk = settings.amount("speed"), settings.amount("disk")
    for place, stage in enumerate(found):
        streamed = stage.work.read_bytes(shape, memory.bytes_per_weight)
        once = shape.stored_bytes * memory.models if place == 0 else 0.0
        read = streamed if way == "stream" else once
        seconds = None if speed is None else stage.work.operations / speed + (read / disk if disk else 0.0)
        yield StagePlan(
            stage=stage.name,
            operations=stage.work.operations,
            read_bytes=read,
            peak_bytes=memory.held + stage.memory,
            seconds=seconds,
        )
