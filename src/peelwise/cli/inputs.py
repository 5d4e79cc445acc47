"""Open the model and the text that a command names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from peelwise.cli.terminal import quiet_warnings, status

if TYPE_CHECKING:
    from peelwise.model.checkpoints import OpenedModel
    from peelwise.probe.probe import Probe


def documents_of(paths: list[str] | None, field: str) -> tuple[list[str], str]:
    """Return the texts of files and what they are called; the reference prose if there are none."""
    from peelwise.probe.texts import read_texts, reference_prose

    if not paths:
        return reference_prose(), "Python reference prose (pydoc_data.topics)"
    return read_texts(paths, field=field), ", ".join("standard input" if p == "-" else Path(p).name for p in paths)


def open_both(
    model: str, text: list[str] | None, field: str, draw: dict[str, Any], how: dict[str, Any]
) -> tuple[OpenedModel, Probe]:
    """Open the model as ``how`` says and draw a probe from the text as ``draw`` says."""
    from peelwise.model.checkpoints import open_model, require_tokenizer
    from peelwise.probe.probe import Probe

    documents, source = documents_of(text, field)  # first, since it is quick and may be mistyped
    with quiet_warnings(), status(f"Opening {model} ..."):
        opened = open_model(model, **how)
        return opened, Probe.from_text(documents, require_tokenizer(opened), source=source, **draw)
