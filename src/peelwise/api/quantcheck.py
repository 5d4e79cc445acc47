"""`quantcheck`: a quantised model against its full-precision parent, as people use it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from peelwise.api.inputs import open_target, parse_seconds
from peelwise.engine.clock import Watcher
from peelwise.formats.table import parse_format
from peelwise.probe.probe import Probe
from peelwise.records.quantcheck import QuantcheckRecord
from peelwise.tasks.quantcheck.layers import Candidate, QuantcheckSettings
from peelwise.tasks.quantcheck.run import run_quantcheck

if TYPE_CHECKING:
    from torch import nn


def quantcheck(
    quantised: nn.Module | str | Path,
    parent: nn.Module | str | Path,
    probe: Probe,
    *,
    form: str | None = None,
    budget: float | str = "10m",
    device: str = "auto",
    dtype: str = "auto",
    progress: Watcher | None = None,
) -> QuantcheckRecord:
    """Tell which part of a quantised model's damage its bits explain, and which better codes would win back.

    Args:
        quantised: a module (left exactly as it was), a folder or a GGUF file.
        parent: the model that it was made from, likewise.
        probe: the text; see `Probe`.
        form: the format of plain weights that were quantised and saved as such, such as ``"int3:group=32"``.
        budget: wall time, seconds or like ``"10m"``.
        device, dtype: where and how folders and files are opened.
        progress: called with a `Progress` at every step.

    Raises:
        PeelwiseError: With one or two lines on what is wrong and what to do.

    Example:
        >>> record = peelwise.quantcheck("out/int3", "out/full", probe)
        >>> record.loss.split.left_on_the_table
        0.021
    """
    settings = QuantcheckSettings(parse_seconds(budget), parse_format(form) if form else None)
    ours, theirs = (Candidate(*open_target(each, device, dtype)) for each in (quantised, parent))
    return run_quantcheck(ours, theirs, probe, settings, progress)
