"""`anatomy`: how much each block matters and how far it can be bent, as people use it."""

from __future__ import annotations

import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peelwise.api.inputs import open_both, with_budget
from peelwise.api.report import REPORT_FILE, WithPage, frame
from peelwise.engine.clock import Watcher
from peelwise.errors import MissingExtraError
from peelwise.model.offloaded import measures_offloaded
from peelwise.model.options import OpenOptions
from peelwise.probe.options import ProbeOptions
from peelwise.probe.probe import Probe
from peelwise.records.anatomy import AnatomyRecord, BlockAnatomy
from peelwise.records.folder import check_free, written_whole
from peelwise.tasks.anatomy.run import run_anatomy
from peelwise.tasks.anatomy.settings import AnatomySettings
from peelwise.tasks.anatomy.unfinished import FOUND

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

ANATOMY_FILE = "anatomy.json"
UNFINISHED = ".unfinished"  # behind the name of the folder


@dataclass(frozen=True, eq=False)
class AnatomyReport(WithPage):
    """What an anatomy found.

    Attributes:
        record: every number, as in ``anatomy.json``.
    """

    record: AnatomyRecord

    def save(self, folder: str | Path, *, force: bool = False) -> Path:
        """Write ``anatomy.json`` and (with matplotlib) ``report.html``; whole or not at all.

        Args:
            folder: must not exist or be empty, unless ``force``.
            force: replace an earlier result.

        Raises:
            OutputError: If the folder is taken or cannot be written.
        """
        path = Path(folder)
        check_free(path, force=force, ours=ANATOMY_FILE)
        with written_whole(path) as temporary:
            (temporary / ANATOMY_FILE).write_text(self.to_json() + "\n", encoding="utf-8")
            with suppress(MissingExtraError):
                (temporary / REPORT_FILE).write_text(self.to_html(), encoding="utf-8")
        return path

    def to_frame(self) -> pd.DataFrame:
        """Return one row per block: costs with their intervals, what it tolerates, recovery and signals.

        Raises:
            MissingExtraError: Without pandas.
        """
        return frame([_row(block) for block in self.record.blocks], "index")


@measures_offloaded
def anatomy(
    model: nn.Module | str | Path,
    probe: Probe | ProbeOptions | None = None,
    settings: AnatomySettings | None = None,
    *,
    budget: float | str | None = None,
    opening: OpenOptions | None = None,
    out: str | Path | None = None,
    force: bool = False,
    progress: Watcher | None = None,
) -> AnatomyReport:
    """Tell how much each block matters, what other blocks tell of its weights, and how far these can be bent.

    Ablation five ways; weights predicted from other blocks' beside null controls; scaling, noise, low rank, rounding
    and flipped signs up to the margin; how much of a damage one closed-form round takes back; and the signals of a
    check, with rank correlations (questions of arXiv:2603.19348). Costs are in nats per token, with intervals.
    With ``out``, what is finished is kept in ``OUT.unfinished`` until everything is: a call that was killed, or whose
    budget ended, goes on from there.

    Args:
        model: a module (left exactly as it was), or what ``peelwise anatomy`` takes: a folder, a GGUF file.
        probe: the probe, or the text to draw it from with the model's tokenizer; default: the reference prose.
        settings: budget, studies and margin.
        budget: shorthand for that of ``settings``: wall time, in seconds or like ``"5m"``.
        opening: how a folder or file is opened.
        out: folder to save the report in; refused before the work if it is taken by a finished one.
        force: replace an earlier result there, and unfinished pieces of another model or text.
        progress: called with a `Progress` at every step.

    Returns:
        The report; print it, show it in a notebook, or ``save`` it.

    Raises:
        PeelwiseError: With one or two lines on what is wrong and what to do.

    Example:
        >>> report = peelwise.anatomy("path/to/model", budget="5m")
        >>> [(b.index, b.ablation["skipped"].mean) for b in report.record.blocks]
        [(0, 6.1), (1, 0.41)]
    """
    settings = with_budget(settings or AnatomySettings(), budget)
    unfinished = Path(f"{out}{UNFINISHED}") if out is not None else None
    replace = force or (unfinished is not None and (unfinished / FOUND).is_file())
    if out is not None:
        check_free(Path(out), force=replace, ours=ANATOMY_FILE)
    target, drawn = open_both(model, probe, opening)
    record = run_anatomy(target.model, drawn, settings, name=target.name, source=target.source, watcher=progress,
                         unfinished=unfinished, force=force)  # fmt: skip
    report = AnatomyReport(record)
    if out is not None:
        report.save(out, force=replace)
    if unfinished is not None and record.complete:
        shutil.rmtree(unfinished, ignore_errors=True)
    return report


def _row(block: BlockAnatomy) -> dict[str, Any]:
    costs: dict[str, Any] = dict(block.ablation) | {"predicted": block.predicted}
    if block.best_scale is not None:
        costs["best_scale_gain"] = block.best_scale.gain
    row: dict[str, Any] = {"index": block.index, "name": block.name}
    for name, interval in costs.items():
        if interval is not None:
            row |= {f"{name}_{end}": getattr(interval, end) for end in ("mean", "low", "high")}
    row |= {f"{way}_perplexity_ratio": ratio for way, ratio in block.perplexity_ratios.items()}
    row |= {f"tolerated_{bent.kind}": bent.tolerated for bent in block.bent}
    if block.best_scale is not None:
        row["best_scale"] = block.best_scale.factor
    if block.recovery is not None:
        row["recovered_share"] = block.recovery.share
        if block.recovery.retrained is not None:
            row |= {
                f"retrained_{key}": getattr(block.recovery.retrained, key) for key in ("steps", "best_step", "share")
            }
    return row | block.signals
