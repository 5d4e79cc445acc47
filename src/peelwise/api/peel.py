"""Peel maps as people use them: what a stack of layer-wise references reaches, map by map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from peelwise.api.inputs import open_target, parse_seconds
from peelwise.api.report import Report, frame
from peelwise.engine.clock import Watcher
from peelwise.errors import MapError
from peelwise.probe.probe import Probe
from peelwise.records.peel import PeelRecord
from peelwise.references.maps import StationMap
from peelwise.tasks.peel.run import PeelSettings, Start, run_peel

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

Maps = Literal["auto"] | Sequence[Sequence[int]]


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


def peel(
    model: nn.Module | str | Path,
    probe: Probe,
    *,
    maps: Maps = "auto",
    start: Start = "warm",
    budget: float | str = "10m",
    weighted: bool = True,
    rounds: int | None = None,
    steps: bool = True,
    dense_references: bool = False,
    beam_width: int = 4,
    controls: bool = True,
    margin: float | None = None,
    name: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    progress: Watcher | None = None,
) -> PeelReport:
    """Fit stacks of reference blocks along station maps and tell what they reach (arXiv:2605.02853).

    For a map sigma, block after block is a block of the same architecture fitted to the trained model's station:

        A_l = B'_l(A_{l-1}),    B'_l = argmin  mean_j (H_sigma(l),j - A_l,j)^2 / Var(H_sigma(l),j),    A_0 = H_0

    earlier ones frozen; a light head with cross-entropy goes on top. The bound is the best map's loss.

    Args:
        model: a module (left exactly as it was), or what ``peelwise peel`` takes: a folder, a GGUF file.
        probe: the text; see `Probe`.
        maps: ``"auto"``: all of them up to 6 blocks, beyond that the named families and a beam search; or a list
            such as ``[[3, 3, 3, 4]]``, one station from 1 to L per block.
        start: ``"warm"``: a reference starts from the block's own weights; ``"cold"``: from initialisation.
        budget: wall time, seconds or like ``"5m"``. Whatever is finished by then is reported.
        weighted: weight each coordinate of a station by its inverse variance; false is the plain squared error.
        rounds: most rounds of solves and steps per reference.
        steps: also move the maps that have no closed form.
        dense_references: let references of low-bit maps leave their formats; by default they are codes and scales of
            the same formats. The difference of the two bounds is the price of precision of the stack.
        beam_width: how many of the best maps are searched around beyond 6 blocks.
        controls: whether to run the null controls.
        margin: smallest difference that matters, nats per token; default: the larger of 0.5 % of the loss and 0.003.
        name: the model's name in the report.
        device: where a folder or file is opened.
        dtype: the number format it is opened in.
        progress: called with a `Progress` at every step.

    Returns:
        The report; print it, or ``save`` it as a certificate.

    Raises:
        MapError: If a map has the wrong length, decreases or points backwards.
        PeelwiseError: For anything else that is wrong, with one or two lines on what to do.

    Example:
        >>> report = peelwise.peel(model, probe, maps=[[1, 2, 3, 4], [3, 3, 3, 4]], budget="2m")
    """
    settings = PeelSettings(
        budget_seconds=parse_seconds(budget),
        maps=checked_maps(maps),
        start=start,
        weighted=weighted,
        rounds=rounds,
        steps=steps,
        dense_references=dense_references,
        beam_width=beam_width,
        controls=controls,
        margin_nats=margin,
    )
    target, own_name, source = open_target(model, device, dtype)
    outcome = run_peel(
        target,
        probe,
        settings,
        name=name or own_name,
        source=source,
        watcher=progress,
    )
    return PeelReport(outcome.record, outcome.witness, outcome.probe)


def checked_maps(maps: Maps) -> tuple[StationMap, ...] | None:
    """Return maps as tuples, ``None`` for ``"auto"``; their stations are checked against the model later.

    Raises:
        MapError: If it is neither ``"auto"`` nor a list of lists of integers.
    """
    if isinstance(maps, str):
        if maps == "auto":
            return None
        raise MapError(f'maps: expected "auto" or a list of maps such as [[3, 3, 3, 4]], got {maps!r}.')
    rows = list(maps)
    if not rows or not all(isinstance(row, Sequence) and not isinstance(row, str) for row in rows):
        raise MapError(f"maps: expected a list of maps such as [[3, 3, 3, 4]], got {rows!r}. Put the map in a list.")
    return tuple(tuple(row) for row in rows)


def parse_maps(text: str) -> Maps:
    """Return the maps that the command line names: ``auto``, or like ``3,3,3,4 4,4,4,4``.

    Raises:
        MapError: If it is neither.
    """
    if text.strip() == "auto":
        return "auto"
    try:
        return [[int(station) for station in one.split(",")] for one in text.replace(";", " ").split()]
    except ValueError as error:
        raise MapError(f'--maps: expected "auto" or maps like "3,3,3,4 4,4,4,4", got {text!r}.') from error
