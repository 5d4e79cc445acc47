"""The two models of a comparison as they are given: modules, folders, files, and bases with adapters of PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from peelwise.api.inputs import Target, open_both, open_target
from peelwise.model.adapters import adapter_base, is_adapted, merged_and_bare, merged_beside_codes, with_adapter
from peelwise.model.options import OpenOptions
from peelwise.probe.options import ProbeOptions
from peelwise.probe.probe import Probe
from peelwise.records.base import Note, note
from peelwise.tasks.quantcheck.layers import Candidate

if TYPE_CHECKING:
    from torch import nn

    Source = nn.Module | str | Path


def open_quantised(
    quantised: Source, probe: Probe | ProbeOptions | None, opening: OpenOptions | None
) -> tuple[Target, Probe]:
    """Return the quantised model and the probe; of adapters beside codes, what both make together.

    Raises:
        ModelError: If it cannot be opened, or its adapters cannot be merged.
        ProbeError: If the text cannot be read or is too short.
    """
    below = _base_of(quantised)
    target, drawn = open_both(below or quantised, probe, opening)
    target = target if below is None else _adapted(target, Path(str(quantised)))
    if is_adapted(target.model):
        target = Target(merged_beside_codes(target.model), target.name, target.source)
    return target, drawn


def open_parent(
    parent: Source, base: Source | None, opening: OpenOptions | None
) -> tuple[Candidate, Candidate | None, tuple[Note, ...]]:
    """Return the parent, the model before its fine-tune if there is one, and what to say of them.

    Of a parent with adapters both are made from it.

    Raises:
        ModelError: If one cannot be opened, or adapters cannot be merged.
    """
    below = _base_of(parent)
    target = open_target(below or parent, opening)
    target = target if below is None else _adapted(target, Path(str(parent)))
    first = None if base is None else _candidate(open_target(base, opening))
    if not is_adapted(target.model):
        return _candidate(target), first, ()
    made = merged_and_bare(target.model)
    said = (note("adapters-on-codes", layers=made.codes),) if made.codes else ()
    return (
        Candidate(made.merged, target.name, target.source),
        first or Candidate(made.bare, below or "its base"),
        said,
    )


def _base_of(source: Source) -> str | None:
    return adapter_base(Path(source)) if isinstance(source, str | Path) else None


def _adapted(base: Target, folder: Path) -> Target:
    return Target(with_adapter(base.model, folder), folder.name, str(folder))


def _candidate(target: Target) -> Candidate:
    return Candidate(target.model, target.name, target.source)
