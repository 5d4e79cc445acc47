"""Peel maps as people use them: what a stack of layer-wise references reaches, map by map."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from peelwise.api.inputs import open_both, with_budget
from peelwise.api.report import Report, check_out, frame
from peelwise.engine.clock import Watcher
from peelwise.model.offloaded import measures_offloaded
from peelwise.model.options import OpenOptions
from peelwise.probe.options import ProbeOptions
from peelwise.probe.probe import Probe
from peelwise.records.peel import PeelRecord
from peelwise.tasks.peel.run import run_peel
from peelwise.tasks.peel.settings import PeelSettings

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn


@dataclass(frozen=True, eq=False)
class PeelReport(Report):
    """What a peel found: the record, and the reference stack that proves its bound.

    Attributes:
        record: every number, as in ``certificate.json``.
        witness: ``stack/<parameter>``: changes of the blocks' own parameters; ``stack/<map>.codes``, ``.scales`` and so
            on: what low-bit maps hold; ``head/bound`` and ``head/control``: changes of the output head ``[v, d]``.
        probe: the token sequences that were used.
    """

    record: PeelRecord

    def to_frame(self) -> pd.DataFrame:
        """Return one row per map, best first, with losses and gains (nats per token) as columns.

        Raises:
            MissingExtraError: Without pandas.
        """
        rows = []
        for one in self.record.maps:
            loss = one.loss or one.own_head
            row = {"map": " ".join(map(str, one.stations)), "name": one.name, "fitted_head": one.loss is not None}
            row |= {"fit": loss.fit, "select": loss.select, "report": loss.report}
            for key, value in (("over_model", one.gain_over_model), ("over_head", one.gain_over_head)):
                row |= {f"{key}_{part}": getattr(value, part, None) for part in ("mean", "low", "high")}
            rows.append(row | {"seconds": one.wall_seconds})
        return frame(rows, "map")


@measures_offloaded
def peel(
    model: nn.Module | str | Path,
    probe: Probe | ProbeOptions | None = None,
    settings: PeelSettings | None = None,
    *,
    budget: float | str | None = None,
    opening: OpenOptions | None = None,
    name: str | None = None,
    out: str | Path | None = None,
    force: bool = False,
    progress: Watcher | None = None,
) -> PeelReport:
    """Fit stacks of reference blocks along station maps and tell what they reach (arXiv:2605.02853).

    For a map sigma, block after block is a block of the same architecture fitted to the trained model's station:

        A_l = B'_l(A_{l-1}),    B'_l = argmin  mean_j (H_sigma(l),j - A_l,j)^2 / Var(H_sigma(l),j),    A_0 = H_0

    earlier ones frozen; a light head with cross-entropy goes on top. The bound is the best map's loss.

    Args:
        model: a module (left exactly as it was), or what ``peelwise peel`` takes: a folder, a GGUF file.
        probe: the probe, or the text to draw it from with the model's tokenizer; default: the reference prose.
        settings: maps, start, rounds, margin, controls, budget. With low-bit layers, references keep their formats
            unless ``dense_references``; the difference of the two bounds is the quantisation gap of the stack.
        budget: shorthand for that of ``settings``: wall time, in seconds or like ``"10m"``.
        opening: how a folder or file is opened.
        name: the model's name in the report.
        out: folder to save the report in; refused before the work if it is taken.
        force: replace an earlier result there.
        progress: called with a `Progress` at every step.

    Returns:
        The report; print it, show it in a notebook, or ``save`` it as a certificate.

    Raises:
        MapError: If a map has the wrong length, decreases or points backwards.
        PeelwiseError: For anything else that is wrong, with one or two lines on what to do.

    Example:
        >>> settings = peelwise.PeelSettings(maps=[[1, 2, 3, 4], [3, 3, 3, 4]])
        >>> report = peelwise.peel(model, probe, settings, budget="2m")
    """
    settings = with_budget(settings or PeelSettings(), budget)
    if out is not None:
        check_out(out, force=force)
    target, drawn = open_both(model, probe, opening)
    outcome = run_peel(target.model, drawn, settings, name=name or target.name, source=target.source, watcher=progress)
    report = PeelReport(outcome.record, outcome.witness, outcome.probe)
    if out is not None:
        report.save(out, force=force)
    return report
