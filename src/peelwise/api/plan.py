"""`plan`: what measuring a model would take, as people use it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from peelwise.api.report import Result, frame
from peelwise.errors import OptionError
from peelwise.model.shape import read_shape
from peelwise.model.streaming import available_memory
from peelwise.probe.options import ProbeOptions
from peelwise.records.plan import PlanRecord, Task
from peelwise.tasks.check.settings import CHECK_LENGTH, CHECK_TOKENS
from peelwise.tasks.plan.run import Text, run_plan
from peelwise.tasks.plan.settings import PlanSettings

if TYPE_CHECKING:
    import pandas as pd

    from peelwise.records.plan import Shape

_USUAL: Text = (ProbeOptions.tokens, ProbeOptions.sequence_length)
# What each command takes by itself.
TEXTS: dict[Task, Text] = {
    "check": (CHECK_TOKENS, CHECK_LENGTH),
    "audit": _USUAL,
    "compare": _USUAL,
    "quantise": _USUAL,
    "quantcheck": _USUAL,
    "anatomy": _USUAL,
}


@dataclass(frozen=True, eq=False)
class PlanReport(Result):
    """What measuring a model would take.

    Attributes:
        record: every number.
    """

    record: PlanRecord

    def to_frame(self) -> pd.DataFrame:
        """Return one row per task, way of keeping weights, and stage.

        Raises:
            MissingExtraError: Without pandas.
        """
        rows = [
            {"task": plan.task, "way": plan.way} | stage.model_dump()
            for plan in self.record.plans
            for stage in plan.stages
        ]
        return frame([{"row": place} | row for place, row in enumerate(rows)], "row")


def plan(model: str | Path | Shape, settings: PlanSettings | None = None) -> PlanReport:
    """Tell what checking, auditing and comparing a model would take, and whether it fits; no weight is read.

    Bytes of memory, bytes read from disk, operations and, given speeds, seconds of every stage, by formulas in the
    sizes of the model: `docs/planning.md` has them, and how far they are from what was measured.

    Args:
        model: a folder with ``config.json``, that file, a ``.gguf`` file, ``"smollm2"``, or a shape, such as
            ``Decoder(..).shape()`` of `peelwise.tasks.plan.shapes`.
        settings: text and machine.

    Returns:
        The report; print it, or read its ``record``.

    Raises:
        PeelwiseError: With one or two lines on what is wrong and what to do.

    Example:
        >>> report = peelwise.plan("path/to/model", peelwise.PlanSettings(memory="80GB"))
        >>> report.record.fitting("check").way
        'float32'
    """
    settings = settings or PlanSettings()
    memory = settings.amount("memory") or available_memory()
    if memory is None:
        raise OptionError("How much memory is free here is not known. Say it, like --memory 16GB.")
    shape = read_shape(model) if isinstance(model, str | Path) else model
    return PlanReport(run_plan(shape, settings, memory, TEXTS))
