"""The library as people use it: audit a model, look at the report, verify and apply a certificate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peelwise.api.inputs import open_target, parse_seconds
from peelwise.api.report import Report, frame
from peelwise.engine.clock import Watcher
from peelwise.probe.probe import Probe
from peelwise.records.audit import AuditRecord
from peelwise.tasks.audit.run import AuditSettings, run_audit

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn


@dataclass(frozen=True, eq=False)
class AuditReport(Report):
    """What an audit found: the record, and the tensors that prove it.

    Attributes:
        record: every number, as in ``certificate.json``.
        witness: replacement changes by name, ``composed/<map>`` and ``alone/<map>``, ``[d_out, d_in (+1)]``.
        probe: the token sequences that were used.
    """

    record: AuditRecord

    def to_frame(self) -> pd.DataFrame:
        """Return one row per block, intervals as columns ``recoverable_mean``, ``recoverable_low`` and so on.

        Raises:
            MissingExtraError: Without pandas.
        """
        return frame([_row(block.model_dump()) for block in self.record.blocks], "index")


def audit(
    model: nn.Module | str | Path,
    probe: Probe,
    *,
    budget: float | str = "5m",
    joint_rounds: int = 4,
    alone_rounds: int = 4,
    margin: float | None = None,
    controls: bool = True,
    name: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    progress: Watcher | None = None,
) -> AuditReport:
    """Tell, block by block, how much lower the loss could be, with replacement weights that prove it.

    Args:
        model: a module (left exactly as it was), or what ``peelwise audit`` takes: a folder, a GGUF file.
        probe: the text; see `Probe`.
        budget: wall time, seconds or like ``"5m"``. Whatever is finished by then is reported.
        joint_rounds: most rounds of refining all blocks together.
        alone_rounds: most rounds of refining one block by itself.
        margin: smallest recoverable loss that matters, nats per token; default: the larger of 0.5 % of the
            loss and 0.003.
        controls: whether to run the null controls.
        name: the model's name in the report.
        device: where a folder or file is opened.
        dtype: the number format it is opened in.
        progress: called with a `Progress` at every step.

    Returns:
        The report; print it, or ``save`` it as a certificate.

    Raises:
        PeelwiseError: With one or two lines on what is wrong and what to do.

    Example:
        >>> report = peelwise.audit(model, peelwise.Probe.from_text(text, tokenizer), budget="2m")
    """
    target, own_name, source = open_target(model, device, dtype)
    settings = AuditSettings(parse_seconds(budget), joint_rounds, alone_rounds, margin, controls)
    outcome = run_audit(
        target,
        probe,
        settings,
        name=name or own_name,
        source=source,
        watcher=progress,
    )
    return AuditReport(outcome.record, outcome.witness, outcome.probe)


def _row(block: dict[str, Any]) -> dict[str, Any]:
    plain = {k: v for k, v in block.items() if not isinstance(v, (dict, tuple, list)) and not k.endswith("_nats")}
    for key in ("recoverable", "unique"):
        interval = block[f"{key}_nats"] or {}
        plain |= {f"{key}_{part}": interval.get(part) for part in ("mean", "low", "high")}
    plain |= block["signals"]
    return plain
