"""What the functions of the library take: a model or where to open it, and a probe or the text to draw it from."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from peelwise.distributed.sharding import original_class
from peelwise.errors import ModelError
from peelwise.model.checkpoints import open_model, open_tokenizer, require_tokenizer
from peelwise.model.options import OpenOptions
from peelwise.probe.options import ProbeOptions
from peelwise.probe.probe import Probe
from peelwise.tasks.anatomy.settings import AnatomySettings
from peelwise.tasks.audit.settings import AuditSettings
from peelwise.tasks.compare.settings import CompareSettings
from peelwise.tasks.peel.settings import PeelSettings
from peelwise.tasks.quantcheck.settings import QuantcheckSettings

if TYPE_CHECKING:
    from torch import nn


Settings = TypeVar("Settings", AuditSettings, PeelSettings, QuantcheckSettings, CompareSettings, AnatomySettings)


@dataclass(frozen=True, eq=False)
class Target:
    """The module to measure, what it is called, and where it was opened from (``None`` for a module)."""

    model: nn.Module
    name: str
    source: str | None


def open_target(model: nn.Module | str | Path, opening: OpenOptions | None = None) -> Target:
    """Return a module as it is, or open the folder or file that is named.

    Raises:
        ModelError: If it cannot be opened.
    """
    return _opened(model, opening or OpenOptions(), with_tokenizer=False)[0]


def open_both(
    model: nn.Module | str | Path, probe: Probe | ProbeOptions | None, opening: OpenOptions | None = None
) -> tuple[Target, Probe]:
    """Return the module to measure and the probe, drawn with the model's tokenizer unless it is one already.

    Args:
        model: a module, or where to open it.
        probe: the probe, or the text to draw it from; ``None``: the reference prose.
        opening: how the model is opened.

    Raises:
        ProbeError: If the text cannot be read or is too short.
        ModelError: If the model cannot be opened, or there is no tokenizer for the text.
    """
    target, drawn, _ = open_model_and_probe(model, probe, opening)
    return target, drawn


def open_model_and_probe(
    model: nn.Module | str | Path, probe: Probe | ProbeOptions | None, opening: OpenOptions | None = None
) -> tuple[Target, Probe, Any | None]:
    """Return what `open_both` does, and the tokenizer if the model came with one."""
    opening = opening or OpenOptions()
    if isinstance(probe, Probe):
        return open_target(model, opening), probe, None
    options = probe or ProbeOptions()
    documents = options.documents()  # first, since it is quick and may be mistyped
    target, tokenizer = _opened(model, opening, with_tokenizer=True)
    return target, Probe.from_options(options, tokenizer, documents=documents), tokenizer


def with_budget(settings: Settings, budget: float | str | None) -> Settings:
    """Return the settings with another budget if one is given."""
    return settings if budget is None else replace(settings, budget=budget)


def _opened(model: nn.Module | str | Path, opening: OpenOptions, *, with_tokenizer: bool) -> tuple[Target, Any]:
    import torch

    if not isinstance(model, torch.nn.Module):
        opened = open_model(model, with_tokenizer=with_tokenizer, **asdict(opening))
        tokenizer = require_tokenizer(opened) if with_tokenizer else None
        return Target(opened.model, opened.name, opened.source), tokenizer
    if with_tokenizer and opening.tokenizer is None:
        raise ModelError(
            "A module has no tokenizer, and text needs one. Give a Probe, or the tokenizer's folder as "
            "OpenOptions(tokenizer=...)."
        )
    tokenizer = open_tokenizer(opening.tokenizer) if with_tokenizer and opening.tokenizer is not None else None
    return Target(model, original_class(model).__name__, None), tokenizer
