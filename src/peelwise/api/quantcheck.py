"""`quantcheck`: a quantised model against its full-precision parent, as people use it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from peelwise.api.adapted import open_parent, open_quantised
from peelwise.api.inputs import Target, with_budget
from peelwise.api.report import REPORT_FILE, Result, frame
from peelwise.engine.clock import Watcher
from peelwise.engine.kept import beside
from peelwise.errors import OutputError
from peelwise.model.fingerprint import identify
from peelwise.model.offloaded import measures_offloaded
from peelwise.model.options import OpenOptions
from peelwise.probe.options import ProbeOptions
from peelwise.probe.probe import Probe
from peelwise.records.allocation import AllocationRecord
from peelwise.records.folder import check_free, write_text_file, written_whole
from peelwise.records.quantcheck import QuantcheckRecord
from peelwise.show.allocate.exports import exports
from peelwise.show.quantcheck.report import render_html, render_picture
from peelwise.tasks.allocate.run import check_plannable, run_allocate
from peelwise.tasks.allocate.settings import AllocateSettings
from peelwise.tasks.quantcheck.kept import Kept
from peelwise.tasks.quantcheck.layers import Candidate
from peelwise.tasks.quantcheck.run import run_quantcheck
from peelwise.tasks.quantcheck.settings import QuantcheckSettings

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

RECORD_FILE = "quantcheck.json"
PICTURE_FILE = "layers.svg"
SUFFIX = ".json"


@dataclass(frozen=True, eq=False)
class QuantcheckReport(Result):
    """What a comparison with the full-precision parent found.

    Attributes:
        record: every number, as in ``quantcheck.json``.
    """

    record: QuantcheckRecord

    def to_frame(self) -> pd.DataFrame:
        """Return one row per layer; its errors are shares of the mean squared output of the parent's layer.

        Raises:
            MissingExtraError: Without pandas.
        """
        return frame([_row(layer.model_dump()) for layer in self.record.layers], "name")

    def to_html(self) -> str:
        """Return the report as one self-contained HTML page."""
        return render_html(self.record)

    def save(self, out: str | Path, *, force: bool = False) -> Path:
        """Write the record; whole or not at all.

        Args:
            out: a file whose name ends in ``.json`` for the record alone; any other name is a folder, which also gets
                a page, a picture, and the plan for other tools if one was asked for. It must not exist, unless
                ``force``.
            force: replace an earlier result.

        Raises:
            OutputError: If it exists or cannot be written.
        """
        path = _check_out(out, force=force)
        if path.suffix == SUFFIX:
            write_text_file(path, self.to_json() + "\n")
            return path
        with written_whole(path) as new:
            write_text_file(new / RECORD_FILE, self.to_json() + "\n")
            write_text_file(new / REPORT_FILE, self.to_html())
            write_text_file(new / PICTURE_FILE, render_picture(self.record))
            if self.record.allocation is not None:
                for name, text in exports(self.record.allocation).items():
                    write_text_file(new / name, text)
        return path


@measures_offloaded
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
        quantised: a module (left exactly as it was), a folder or a GGUF file; of a model of PEFT, or the folder of an
            adapter, what its codes and the adapters beside them make together.
        parent: the model that it was made from, likewise; of a model of PEFT, or the folder of an adapter, the model
            with adapters merged, and ``base`` is the one without them. A base of codes is the numbers that they stand
            for.
        probe: the probe, or the text to draw it from with the quantised model's tokenizer; default: the reference
            prose.
        settings: format, effort, budget, and within how many bits a plan is wanted.
        base: the model before a fine-tune (adapters merged) that made ``parent``; then the report says how much of the
            fine-tune survives quantisation, and in which blocks it is lost.
        budget: shorthand for that of ``settings``: wall time, in seconds or like ``"10m"``.
        opening: how folders and files are opened.
        out: folder to save record, page and picture in, or a file whose name ends in ``.json`` for the record alone;
            refused before the work if it exists. Finished blocks are kept beside it until all are: the same call goes
            on where it was interrupted, or where its budget ended.
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
        _check_out(out, force=force)
    target, drawn = open_quantised(quantised, probe, opening)
    above, first, notes = open_parent(parent, base, opening)
    if settings.allocate is not None:
        check_plannable(above.model, drawn, _plan_settings(settings))
    kept = None if out is None else Kept(beside(out), _key(target, above, first, drawn, settings))
    record = run_quantcheck(
        Candidate(target.model, target.name, target.source), above, drawn, settings, progress, first, kept
    )
    record = record.model_copy(update={"notes": (*notes, *record.notes)})
    if settings.allocate is not None:
        record = record.model_copy(update={"allocation": _planned(above, drawn, settings, progress)})
    report = QuantcheckReport(record)
    if out is not None:
        report.save(out, force=force)
        if kept is not None and record.complete:
            kept.done()
    return report


def _key(
    quantised: Target, parent: Candidate, base: Candidate | None, probe: Probe, settings: QuantcheckSettings
) -> dict[str, object]:
    """Return what the findings of a block depend on: neither the budget, nor a plan."""
    plain = {key: value for key, value in settings.plain().items() if key not in ("budget_seconds", "allocate")}
    models = (quantised.model, parent.model, *(() if base is None else (base.model,)))
    return {
        "models": [identify(model).fingerprint for model in models],
        "probe": probe.fingerprint,
        "settings": plain | {"dampings": list(settings.dampings)},
    }


def _planned(
    parent: Candidate, probe: Probe, settings: QuantcheckSettings, progress: Watcher | None
) -> AllocationRecord:
    return run_allocate(parent.model, parent.name, parent.source, probe, _plan_settings(settings), watcher=progress)


def _plan_settings(settings: QuantcheckSettings) -> AllocateSettings:
    return AllocateSettings(settings.allocate or 0.0, micro_batch_tokens=settings.micro_batch_tokens)


def _check_out(out: str | Path, *, force: bool) -> Path:
    path = Path(out)
    if path.suffix != SUFFIX:
        check_free(path, force=force, ours=RECORD_FILE)
        return path
    if path.is_dir():
        raise OutputError(f"{path} is a folder: expected a file to write to. Choose another --out.")
    if path.exists() and not force:
        raise OutputError(f"{path} exists. Choose another --out, or replace it with --force.")
    return path


def _row(layer: dict[str, object]) -> dict[str, object]:
    split = layer.pop("split")
    parts = split if isinstance(split, dict) else {}
    return layer | {key: parts.get(key) for key in ("irreducible", "price_of_precision", "left_on_the_table")}
