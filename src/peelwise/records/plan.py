"""What measuring a model would take: its shape, and memory, disk traffic, operations and seconds stage by stage.

Computed from sizes, never measured. Plain numbers, no torch.
"""

from __future__ import annotations

from typing import Literal

from peelwise.records.base import SCHEMA_VERSION, Record

# How weights are kept: in memory in one of two dtypes, or in their files, in the stored dtype (`--stream`).
Way = Literal["float32", "bfloat16", "stream"]
Task = Literal["check-weights", "check", "audit", "compare", "quantise", "quantcheck", "anatomy"]


class InputGroup(Record):
    """Linear layers of the blocks that are given one input, as queries, keys and values are.

    ``inputs`` is ``d_in``, ``outputs`` the ``d_out`` of each layer, ``count`` how many such groups the whole model has.
    ``routed`` is the share of tokens that one is given: 1, or of experts those chosen over all. ``expert`` says that
    they are of a mixture: each has sums of its own, and no signals of its weights.
    """

    inputs: int
    outputs: tuple[int, ...]
    count: int
    routed: float = 1.0
    expert: bool = False

    @property
    def weights(self) -> int:
        """Weights of one such group, ``sum d_in d_out``."""
        return self.inputs * sum(self.outputs)


class Shape(Record):
    """The sizes of a decoder-only transformer, as far as what it costs to measure depends on them.

    ``parameters`` counts every distinct one; ``groups`` are the linear layers inside of the blocks. ``attention_width``
    is the sum over blocks of ``heads x head_dim``. ``stored_bytes_per_weight`` is what a weight takes in the file, and
    ``streamable`` whether it can be left there (`--stream`): plain safetensors can.
    """

    name: str
    architecture: str
    parameters: int
    width: int
    depth: int
    vocabulary: int
    tied: bool
    attention_width: int
    groups: tuple[InputGroup, ...]
    stored_bytes_per_weight: float
    streamable: bool = True

    @property
    def linear_weights(self) -> int:
        """Weights of all linear layers in blocks, ``W``."""
        return sum(group.count * group.weights for group in self.groups)

    @property
    def active_weights(self) -> float:
        """Those of them that one token goes through: of experts, the chosen ones alone."""
        return sum(group.count * group.weights * group.routed for group in self.groups)

    @property
    def head_weights(self) -> int:
        """Weights of the output head, ``vocabulary x width``."""
        return self.vocabulary * self.width

    @property
    def stored_bytes(self) -> float:
        """Bytes of all weights in their files."""
        return self.parameters * self.stored_bytes_per_weight


class StagePlan(Record):
    """What one stage takes: operations, bytes of weights that go through it, bytes of memory, and seconds.

    ``operations`` are those of products, attention and decompositions. ``read_bytes`` are read from disk where the
    weights stay in their files and one block is all that memory has room for. ``peak_bytes`` is the memory in use
    while it runs. ``seconds`` is ``None`` where no speed was given.
    """

    stage: str
    operations: float
    read_bytes: float
    peak_bytes: float
    seconds: float | None = None


class TaskPlan(Record):
    """One command on this model with its weights kept in one way; ``tokens`` are those of the whole probe."""

    task: Task
    way: Way
    tokens: int
    stages: tuple[StagePlan, ...]

    @property
    def operations(self) -> float:
        """Of all stages."""
        return sum(stage.operations for stage in self.stages)

    @property
    def read_bytes(self) -> float:
        """Of all stages."""
        return sum(stage.read_bytes for stage in self.stages)

    @property
    def largest(self) -> StagePlan:
        """The stage that takes most memory."""
        return max(self.stages, key=lambda stage: stage.peak_bytes)

    @property
    def seconds(self) -> float | None:
        """Of all stages, ``None`` where no speed was given."""
        known = [stage.seconds for stage in self.stages if stage.seconds is not None]
        return sum(known) if len(known) == len(self.stages) else None


class PlanRecord(Record):
    """What measuring one model would take on one machine.

    ``memory_bytes`` is what each of ``processes`` may take, ``base_bytes`` what interpreter and packages take of it.
    Speeds are as given: operations and bytes from disk, per second and process. ``plans`` are by task and way, in the
    order in which ways are to be preferred; ways that a model cannot be kept in are left out.
    """

    kind: Literal["plan"] = "plan"
    schema_version: int = SCHEMA_VERSION
    shape: Shape
    memory_bytes: float
    base_bytes: float
    processes: int
    operations_per_second: float | None
    disk_bytes_per_second: float | None
    plans: tuple[TaskPlan, ...]

    @property
    def tasks(self) -> tuple[Task, ...]:
        """Every task once, in order."""
        return tuple(dict.fromkeys(plan.task for plan in self.plans))

    def ways(self, task: Task) -> tuple[TaskPlan, ...]:
        """Return the plans of a task, the way to be preferred first."""
        return tuple(plan for plan in self.plans if plan.task == task)

    def fitting(self, task: Task) -> TaskPlan | None:
        """Return the first plan of a task that fits into memory, or ``None``."""
        return next((plan for plan in self.ways(task) if plan.largest.peak_bytes <= self.memory_bytes), None)

    def to_json(self) -> str:
        """Return the record as JSON text."""
        return self.model_dump_json(indent=2)
