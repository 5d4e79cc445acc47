"""`allocate`: which layers get how many bits, as people use it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from peelwise.api.inputs import open_both
from peelwise.api.report import REPORT_FILE, Result, frame
from peelwise.engine.clock import Watcher
from peelwise.engine.kept import begin_anew, beside
from peelwise.errors import OutputError
from peelwise.model.fingerprint import identify
from peelwise.model.offloaded import measures_offloaded
from peelwise.model.options import OpenOptions
from peelwise.probe.options import ProbeOptions
from peelwise.probe.probe import Probe
from peelwise.records.allocation import AllocationRecord
from peelwise.records.folder import check_free, write_text_file, written_whole
from peelwise.show.allocate.exports import exports
from peelwise.show.allocate.report import render_html, render_picture
from peelwise.tasks.allocate.kept import Kept
from peelwise.tasks.allocate.run import run_allocate
from peelwise.tasks.allocate.settings import AllocateSettings

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

RECORD_FILE = "allocation.json"
PICTURE_FILE = "layers.svg"


@dataclass(frozen=True, eq=False)
class AllocationReport(Result):
    """Which layers of a model get how many bits.

    Attributes:
        record: every number, as in ``allocation.json``.
    """

    record: AllocationRecord

    @property
    def plan(self) -> dict[str, str]:
        """The format of every layer, by name; what ``QuantiseSettings(plan=...)`` takes."""
        return self.record.plan

    def exports(self) -> dict[str, str]:
        """Return the plan in the syntax of other tools, by the name of the file that each would stand in."""
        return exports(self.record)

    def to_frame(self) -> pd.DataFrame:
        """Return one row per layer.

        Raises:
            MissingExtraError: Without pandas.
        """
        rows = [one.model_dump() for one in self.record.layers]
        return frame([{k: v for k, v in row.items() if k != "predicted"} | row["predicted"] for row in rows], "name")

    def save(self, folder: str | Path, *, force: bool = False) -> Path:
        """Write ``allocation.json`` and the plan for other tools; whole or not at all.

        Raises:
            OutputError: If the folder is taken or cannot be written.
        """
        folder = Path(folder)
        check_free(folder, force=force, ours=RECORD_FILE)
        with written_whole(folder) as new:
            write_text_file(new / RECORD_FILE, self.record.to_json() + "\n")
            write_text_file(new / REPORT_FILE, render_html(self.record))
            write_text_file(new / PICTURE_FILE, render_picture(self.record))
            for name, text in self.exports().items():
                write_text_file(new / name, text)
        return folder


@measures_offloaded
def allocate(
    model: nn.Module | str | Path,
    probe: Probe | ProbeOptions | None = None,
    settings: AllocateSettings | None = None,
    *,
    opening: OpenOptions | None = None,
    out: str | Path | None = None,
    resume: bool = True,
    force: bool = False,
    progress: Watcher | None = None,
) -> AllocationReport:
    """Tell which layers should get how many bits, so that the model loses least within a budget.

    Args:
        model: a module (left exactly as it was), a folder or a GGUF file.
        probe: the probe, or the text to draw it from with the model's tokenizer; default: the reference prose.
        settings: budget and formats.
        opening: how a folder or file is opened.
        out: folder to save the plan in; refused before the work if it is taken.
        resume: go on where an interrupted run with the same model, text and formats ended; needs ``out``, beside which
            finished blocks are kept until the end.
        force: replace an earlier result there.
        progress: called with a `Progress` at every step.

    Returns:
        The report; print it, show it in a notebook, ``save`` it, or give its ``plan`` to `quantise`.

    Raises:
        PeelwiseError: With one or two lines on what is wrong and what to do.

    Example:
        >>> report = peelwise.allocate("path/to/model", settings=peelwise.AllocateSettings(3.5))
        >>> made = peelwise.quantise("path/to/model", settings=peelwise.QuantiseSettings(plan=report.plan))
    """
    if out is not None:
        check_free(Path(out), force=force, ours=RECORD_FILE)
        if not resume:
            begin_anew(out)
    target, drawn = open_both(model, probe, opening)
    settings, kept = settings or AllocateSettings(), None
    if out is not None and resume:
        # What is kept of a block depends on nothing else; formats that nobody gave follow from the model.
        formats = [form.name for form in settings.parsed_formats()]
        key = {"model": identify(target.model).fingerprint, "probe": drawn.fingerprint, "formats": formats}
        kept = Kept(beside(out), key)
    found = run_allocate(target.model, target.name, target.source, drawn, settings, progress, kept)
    report = AllocationReport(found)
    if out is not None:
        report.save(out, force=force)
        if kept is not None:
            kept.done()
    return report


def read_plan(file: str | Path) -> dict[str, str]:
    """Return the plan of an ``allocation.json`` or ``quantcheck.json``, or of a JSON object of formats by layer.

    Raises:
        OutputError: If the file cannot be read or is neither.
    """
    path = Path(file)
    try:
        if path.is_dir():
            path = next((path / name for name in (RECORD_FILE, "quantcheck.json") if (path / name).is_file()), path)
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OutputError(f"{path} cannot be read as a plan: {error}. Expected {RECORD_FILE} of `allocate`.") from error
    if isinstance(found, dict) and found.get("kind") == "quantcheck":
        found = found.get("allocation")
    layers = found.get("layers") if isinstance(found, dict) else None
    if isinstance(layers, list):
        found = {str(each.get("name")): each.get("format") for each in layers if isinstance(each, dict)}
    if not isinstance(found, dict) or not all(isinstance(form, str) for form in found.values()):
        raise OutputError(f"{path} is no plan: expected {RECORD_FILE}, or a JSON object of formats by layer.")
    return found
