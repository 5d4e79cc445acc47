"""`compare`: two models of one architecture, or the checkpoints of one run, as people use it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peelwise.api.inputs import Target, open_both, open_target, with_budget
from peelwise.api.report import REPORT_FILE, Certified, WithPage, check_out, frame
from peelwise.engine.clock import Watcher
from peelwise.errors import MissingExtraError
from peelwise.model.checkpoints import gguf_file
from peelwise.model.offloaded import measures_offloaded
from peelwise.model.options import OpenOptions
from peelwise.probe.options import ProbeOptions
from peelwise.probe.probe import Probe
from peelwise.records.compare import CompareRecord, CompareSeries
from peelwise.records.folder import check_free, written_whole
from peelwise.tasks.compare.run import Candidate, run_compare
from peelwise.tasks.compare.series import checkpoint_folders, run_series
from peelwise.tasks.compare.settings import CompareSettings

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor, nn

COMPARE_FILE = "compare.json"


@dataclass(frozen=True, eq=False)
class CompareReport(Certified):
    """What a comparison of two models found; OLD is the witness.

    Attributes:
        record: every number, as in ``certificate.json``.
        probe: the token sequences that were used.
    """

    record: CompareRecord
    probe: Probe = field(repr=False)

    def _proof(self) -> tuple[dict[str, Tensor], Probe | None]:
        return {}, self.probe

    def to_frame(self) -> pd.DataFrame:
        """Return one row per block, intervals as columns ``repairs_mean``, ``repairs_low`` and so on.

        Raises:
            MissingExtraError: Without pandas.
        """
        return frame([_row(block.model_dump()) for block in self.record.blocks], "index")


@dataclass(frozen=True, eq=False)
class CompareSeriesReport(WithPage):
    """What comparisons of the checkpoints of one run found.

    Attributes:
        record: the comparisons, each with the checkpoint before.
    """

    record: CompareSeries

    def save(self, folder: str | Path, *, force: bool = False) -> Path:
        """Write ``compare.json`` and (with matplotlib) ``report.html``; whole or not at all.

        Args:
            folder: must not exist or be empty, unless ``force``.
            force: replace an earlier result.

        Raises:
            OutputError: If the folder is taken or cannot be written.
        """
        path = Path(folder)
        check_free(path, force=force, ours=COMPARE_FILE)
        with written_whole(path) as temporary:
            (temporary / COMPARE_FILE).write_text(self.to_json() + "\n", encoding="utf-8")
            with suppress(MissingExtraError):
                (temporary / REPORT_FILE).write_text(self.to_html(), encoding="utf-8")
        return path

    def to_frame(self) -> pd.DataFrame:
        """Return one row per checkpoint, with what putting each block of the one before back would repair.

        Raises:
            MissingExtraError: Without pandas.
        """
        rows = []
        for one in self.record.pairs:
            repairs = {f"block_{b.index}": b.repairs_nats.mean if b.repairs_nats else None for b in one.blocks}
            rows.append({"checkpoint": one.model.name, "loss": one.loss.new, "change": one.loss.damage.mean} | repairs)
        return frame(rows, "checkpoint")


@measures_offloaded
def compare(
    old: nn.Module | str | Path,
    new: nn.Module | str | Path,
    probe: Probe | ProbeOptions | None = None,
    settings: CompareSettings | None = None,
    *,
    budget: float | str | None = None,
    opening: OpenOptions | None = None,
    out: str | Path | None = None,
    force: bool = False,
    progress: Watcher | None = None,
) -> CompareReport:
    """Tell which part's change from OLD to NEW hurt, which helped, and what kind of change it is.

    Args:
        old: a module (left exactly as it was), a folder or a GGUF file: what NEW was made from.
        new: likewise: after fine-tuning, merging, quantising, converting or a crash.
        probe: the probe, or the text to draw it from with NEW's tokenizer; default: the reference prose.
        settings: budget, margin and how much is measured.
        budget: shorthand for that of ``settings``: wall time, in seconds or like ``"5m"``.
        opening: how folders and files are opened.
        out: folder to save the certificate in; refused before the work if it is taken.
        force: replace an earlier result there.
        progress: called with a `Progress` at every step.

    Returns:
        The report; print it, show it in a notebook, or ``save`` it.

    Raises:
        PeelwiseError: With one or two lines on what is wrong and what to do.

    Example:
        >>> report = peelwise.compare("runs/step-1000", "runs/step-2000")
        >>> report.record.conclusion.hurt
        (7,)
    """
    settings = with_budget(settings or CompareSettings(), budget)
    if out is not None:
        check_out(out, force=force)
    target, drawn = open_both(new, probe, _opening_of(new, old, opening))
    before = _candidate(open_target(old, _opening_of(old, new, opening)))
    report = CompareReport(run_compare(before, _candidate(target), drawn, settings, progress), drawn)
    if out is not None:
        report.save(out, force=force)
    return report


def compare_run(
    folder: str | Path,
    probe: Probe | ProbeOptions | None = None,
    settings: CompareSettings | None = None,
    *,
    budget: float | str | None = None,
    opening: OpenOptions | None = None,
    out: str | Path | None = None,
    force: bool = False,
    progress: Watcher | None = None,
) -> CompareSeriesReport:
    """Compare each checkpoint in a folder with the one before it; arguments as for `compare`.

    Args:
        folder: holds the checkpoints as folders, in the order of the numbers in their names, those without one last.
        probe: the probe, or the text to draw it from with the last checkpoint's tokenizer.
        settings: the budget is that of all pairs together.
        budget: shorthand for that of ``settings``.
        opening: how folders are opened.
        out: folder to save the report in.
        force: replace an earlier result there.
        progress: called with a `Progress` at every step.

    Raises:
        PeelwiseError: With one or two lines on what is wrong and what to do.
    """
    settings = with_budget(settings or CompareSettings(), budget)
    if out is not None:
        check_free(Path(out), force=force, ours=COMPARE_FILE)
    opening = opening or OpenOptions()
    folders = checkpoint_folders(Path(folder), allow_pickle=opening.allow_pickle)
    _, drawn = open_both(folders[-1], probe, opening)
    series = run_series(folders, lambda path: _candidate(open_target(path, opening)), drawn, settings, progress)
    report = CompareSeriesReport(series)
    if out is not None:
        report.save(out, force=force)
    return report


def _opening_of(
    model: nn.Module | str | Path, other: nn.Module | str | Path, opening: OpenOptions | None
) -> OpenOptions | None:
    """Return how one of two models is opened: as stored where it is a GGUF file, whatever the other one is."""
    if opening is None or not opening.as_stored or not isinstance(model, str | Path):
        return opening
    beside_gguf = isinstance(other, str | Path) and gguf_file(other) is not None
    return replace(opening, as_stored=False) if beside_gguf and gguf_file(model) is None else opening


def _candidate(target: Target) -> Candidate:
    return Candidate(target.model, target.name, target.source)


def _row(block: dict[str, Any]) -> dict[str, Any]:
    hidden = ("_nats", "_sha256")
    plain = {k: v for k, v in block.items() if not isinstance(v, (dict, tuple, list)) and not k.endswith(hidden)}
    for key in ("repairs", "breaks", "path_from_first", "path_from_last"):
        interval = block[f"{key}_nats"] or {}
        plain |= {f"{key}_{part}": interval.get(part) for part in ("mean", "low", "high")}
    return plain | {"interaction_nats": block["interaction_nats"]}
