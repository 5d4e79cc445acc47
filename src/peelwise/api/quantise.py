"""`quantise`: a model in a low-bit format without training, as people use it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from peelwise.api.inputs import open_model_and_probe
from peelwise.api.report import REPORT_FILE, Result, frame
from peelwise.engine.clock import Watcher
from peelwise.engine.kept import begin_anew, beside
from peelwise.errors import OptionError, OutputError
from peelwise.formats.base import Encoded, Format
from peelwise.model.checkpoints import gguf_file, save_model
from peelwise.model.fingerprint import identify
from peelwise.model.layers import LinearLayer, linear_layers
from peelwise.model.offloaded import brought, measures_offloaded
from peelwise.model.options import OpenOptions
from peelwise.model.spill import copied
from peelwise.model.torchao_writer import check_torchao, write_torchao
from peelwise.model.weights.gguf_writer import kind_of, write_gguf
from peelwise.nn.files import hold_in, note_formats
from peelwise.probe.options import ProbeOptions
from peelwise.probe.probe import Probe
from peelwise.records.folder import check_free, write_text_file, written_whole
from peelwise.records.quantise import QuantiseRecord
from peelwise.show.quantise.report import render_html, render_picture
from peelwise.tasks.quantise.kept import Kept
from peelwise.tasks.quantise.run import run_quantise
from peelwise.tasks.quantise.settings import QuantiseSettings

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

RECORD_FILE = "quantise.json"
PICTURE_FILE = "layers.svg"
GGUF_FILE, GGUF_FORMAT = "model.gguf", "int4:group=32"
To = Literal["folder", "gguf", "torchao"]


@dataclass(frozen=True, eq=False)
class QuantiseReport(Result):
    """A model in a low-bit format, and what that cost.

    Attributes:
        record: every number, as in ``quantise.json``.
        codes: format and codes of every quantised layer, by name.
        model: the parent, as it was.
        tokenizer: its tokenizer, if it came with one.
    """

    record: QuantiseRecord
    codes: dict[str, tuple[Format, Encoded]] = field(repr=False)
    model: nn.Module = field(repr=False)
    tokenizer: Any | None = field(default=None, repr=False)

    def quantised(self) -> nn.Module:
        """Return a copy of the parent whose layers are those of `peelwise.nn` and compute with the codes found.

        Experts, which are parts of a parameter, get the floats that their codes stand for.
        """
        with brought(self.model):
            made = copied(self.model)
        experts = _experts(made)
        for name, (form, encoded) in self.codes.items():
            if name in experts:
                experts[name].weight().copy_(form.decode(encoded))
            else:
                hold_in(made, name, form, encoded)
        note_formats(made)
        return made

    def save(self, folder: str | Path, *, to: To = "folder", force: bool = False) -> Path:
        """Write the quantised model, and the record as ``quantise.json`` beside it; whole or not at all.

        Args:
            folder: must not exist, unless ``force`` and it holds an earlier result.
            to: ``"folder"``: a folder that peelwise opens with its low-bit layers, and transformers with the floats
                they stand for. ``"gguf"``: the ``.gguf`` file that the model was opened from, with other codes.
                ``"torchao"``: a folder with torchao's integer weights, which transformers opens by itself.
            force: replace an earlier result.

        Raises:
            OutputError: If the folder is taken or cannot be written, or the model cannot be written so.
            FormatError: If the format is none of GGUF's.
        """
        folder = Path(folder)
        check_free(folder, force=force, ours=RECORD_FILE)
        with written_whole(folder) as new, brought(self.model):
            if to == "gguf":
                write_gguf(_source(self.record.model.source), new / GGUF_FILE, self.model, self.codes)
            elif to == "torchao":
                write_torchao(self.model, self.tokenizer, self.codes, new)
            else:
                save_model(self.quantised(), self.tokenizer, new)
            write_text_file(new / RECORD_FILE, self.to_json() + "\n")
            write_text_file(new / REPORT_FILE, render_html(self.record))
            write_text_file(new / PICTURE_FILE, render_picture(self.record))
        return folder

    def to_frame(self) -> pd.DataFrame:
        """Return one row per layer.

        Raises:
            MissingExtraError: Without pandas.
        """
        rows = [one.model_dump() for one in self.record.layers]
        return frame([{k: v for k, v in row.items() if k != "steps"} | row["steps"] for row in rows], "name")


@measures_offloaded
def quantise(
    model: nn.Module | str | Path,
    probe: Probe | ProbeOptions | None = None,
    settings: QuantiseSettings | None = None,
    *,
    opening: OpenOptions | None = None,
    out: str | Path | None = None,
    to: To = "folder",
    resume: bool = True,
    force: bool = False,
    progress: Watcher | None = None,
) -> QuantiseReport:
    """Put the linear layers of a model's blocks into a low-bit format, without training.

    Layers are solved one after the other, for the inputs that they really get from those before them.

    Args:
        model: a module (left exactly as it was), a folder or a GGUF file.
        probe: the probe, or the text to draw it from with the model's tokenizer; default: the reference prose.
        settings: format and effort.
        opening: how a folder or file is opened.
        out: folder to save the quantised model in; refused before the work if it is taken.
        to: what is written there; see `QuantiseReport.save`.
        resume: go on where an interrupted run with the same model, text and settings ended; needs ``out``, beside which
            finished blocks are kept until the end.
        force: replace an earlier result there.
        progress: called with a `Progress` at every step.

    Returns:
        The report; print it, show it in a notebook, or ``save`` the model.

    Raises:
        PeelwiseError: With one or two lines on what is wrong and what to do.

    Example:
        >>> report = peelwise.quantise("path/to/model", settings=peelwise.QuantiseSettings("int4:group=64"), out="out")
        >>> report.record.loss.damage.mean
        0.043
    """
    settings = settings or QuantiseSettings()
    if to not in get_args(To):
        raise OptionError(f"to: expected one of {', '.join(get_args(To))}, got {to!r}.")
    if out is not None:
        check_free(Path(out), force=force, ours=RECORD_FILE)
        if not resume:
            begin_anew(out)
    target, drawn, tokenizer = open_model_and_probe(model, probe, opening)
    if to == "gguf":
        _source(target.source)
        settings = settings if settings.format is not None else replace(settings, format=GGUF_FORMAT)
    if to != "folder":
        _check_formats(settings, kind_of if to == "gguf" else check_torchao)
        parts = {name.rpartition(".")[0] for name in _experts(target.model)}
        settings = replace(settings, skip=(*settings.skip, *sorted(parts.difference(settings.skip))))
    kept = None
    if out is not None and resume:
        key = {
            "model": identify(target.model).fingerprint,
            "probe": drawn.fingerprint,
            "settings": settings.plain() | {"plan": dict(settings.plan)},
        }
        kept = Kept(beside(out), key)
    found = run_quantise(target.model, target.name, target.source, drawn, settings, progress, kept)
    report = QuantiseReport(found.record, found.codes, target.model, tokenizer)
    if out is not None:
        report.save(out, to=to, force=force)
        if kept is not None:
            kept.done()
    return report


def _experts(model: nn.Module) -> dict[str, LinearLayer]:
    """Return the matrices of all experts by name."""
    return {linear.name: linear for linear in linear_layers(model, "") if linear.is_expert}


def _source(source: str | None) -> Path:
    file = gguf_file(source)
    if file is None:
        raise OutputError(
            "A .gguf file is written from the one that the model was opened from, with its names and vocabulary: "
            f"expected a .gguf file, got {source or 'a module'}. Convert the model to GGUF in full precision first."
        )
    return file


def _check_formats(settings: QuantiseSettings, check: Callable[[Format], object]) -> None:
    """Refuse formats that what is to be written does not have, before any work."""
    for form in (settings.parsed_format(), *settings.parsed_plan().values()):
        if form is not None and not form.name.startswith("dense"):
            check(form)
