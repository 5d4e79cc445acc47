"""`quantcheck`: a quantised model against its full-precision parent, as people use it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from peelwise.api.inputs import Target, open_both, open_target, with_budget
from peelwise.api.report import Result, frame
from peelwise.engine.clock import Watcher
from peelwise.errors import OutputError
from peelwise.model.options import OpenOptions
from peelwise.probe.options import ProbeOptions
from peelwise.probe.probe import Probe
from peelwise.records.folder import write_text_file
from peelwise.records.quantcheck import QuantcheckRecord
from peelwise.tasks.quantcheck.layers import Candidate
from peelwise.tasks.quantcheck.run import run_quantcheck
from peelwise.tasks.quantcheck.settings import QuantcheckSettings

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn


@dataclass(frozen=True, eq=False)
class QuantcheckReport(Result):
    """What a comparison with the full-precision parent found.

    Attributes:
        record: every number, as in the JSON file.
    """

    record: QuantcheckRecord

    def to_frame(self) -> pd.DataFrame:
        """Return one row per layer; its errors are shares of the mean squared output of the parent's layer.

        Raises:
            MissingExtraError: Without pandas.
        """
        return frame([_row(layer.model_dump()) for layer in self.record.layers], "name")

    def save(self, file: str | Path, *, force: bool = False) -> Path:
        """Write the record as a JSON file; whole or not at all.

        Args:
            file: must not exist, unless ``force``.
            force: replace an earlier result.

        Raises:
            OutputError: If the file exists or cannot be written.
        """
        path = _check_file(file, force=force)
        write_text_file(path, self.to_json() + "\n")
        return path


def quantcheck(
    quantised: nn.Module | str | Path,
    parent: nn.Module | str | Path,
    probe: Probe | ProbeOptions | None = None,
    settings: QuantcheckSettings | None = None,
    *,
    base: nn.Module | str | Path | None = None,
    budget: float | str | None = None,
    opening: OpenOptions | None = None,
    out: str | Path | None = None,
    force: bool = False,
    progress: Watcher | None = None,
) -> QuantcheckReport:
    """Tell which part of a quantised model's damage its bits explain, and which better codes would recover.

    Args:
        quantised: a module (left exactly as it was), a folder or a GGUF file.
        parent: the model that it was made from, likewise.
        probe: the probe, or the text to draw it from with the quantised model's tokenizer; default: the reference
            prose.
        settings: format, effort, budget.
        base: the model before a fine-tune (adapters merged) that made ``parent``; then the report says how much of the
            fine-tune survives quantisation, and in which blocks it is lost.
        budget: shorthand for that of ``settings``: wall time, in seconds or like ``"10m"``.
        opening: how folders and files are opened.
        out: JSON file to save the record in; refused before the work if it exists.
        force: replace an earlier result there.
        progress: called with a `Progress` at every step.

    Returns:
        The report; print it, show it in a notebook, or ``save`` it as JSON.

    Raises:
        PeelwiseError: With one or two lines on what is wrong and what to do.

    Example:
        >>> report = peelwise.quantcheck("out/int3", "out/full", probe)
        >>> report.record.loss.split.left_on_the_table
        0.021
    """
    settings = with_budget(settings or QuantcheckSettings(), budget)
    if out is not None:
        _check_file(out, force=force)
    target, drawn = open_both(quantised, probe, opening)
    pair = _candidate(target), _candidate(open_target(parent, opening))
    first = None if base is None else _candidate(open_target(base, opening))
    report = QuantcheckReport(run_quantcheck(*pair, drawn, settings, progress, first))
    if out is not None:
        report.save(out, force=force)
    return report


def _candidate(target: Target) -> Candidate:
    return Candidate(target.model, target.name, target.source)


def _check_file(file: str | Path, *, force: bool) -> Path:
    path = Path(file)
    if path.is_dir():
        raise OutputError(f"{path} is a folder: expected a file to write to. Choose another --out.")
    if path.exists() and not force:
        raise OutputError(f"{path} exists. Choose another --out, or replace it with --force.")
    return path


def _row(layer: dict[str, object]) -> dict[str, object]:
    split = layer.pop("split")
    parts = split if isinstance(split, dict) else {}
    return layer | {key: parts.get(key) for key in ("irreducible", "price_of_precision", "left_on_the_table")}
