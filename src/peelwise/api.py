"""The library as people use it: audit a model, look at the report, verify and apply a certificate."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peelwise.errors import CertificateError, MissingExtraError, OutputError, PeelwiseError
from peelwise.model.checkpoints import OpenedModel, open_model, save_model
from peelwise.peel_records import PeelRecord
from peelwise.pipeline import certificate as certificates
from peelwise.pipeline.audit import AuditSettings, run_audit
from peelwise.pipeline.certificate import Verification
from peelwise.pipeline.clock import Watcher
from peelwise.pipeline.folder import check_free, written_whole
from peelwise.pipeline.peel.certificate import verify_peel
from peelwise.probes import Probe
from peelwise.recordfile import RECORD_FILE, read_any_record
from peelwise.records import AuditRecord, SealedRecord

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console, ConsoleOptions, RenderResult
    from torch import Tensor, nn

REPORT_FILE = "report.html"
_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True, eq=False)
class Report:
    """A record, the tensors that prove it and the probe; the parent of what `audit` and `peel` return.

    Attributes:
        record: every number, as in ``certificate.json``.
        witness: replacement tensors by name.
        probe: the token sequences that were used.
    """

    record: AuditRecord | PeelRecord
    witness: dict[str, Tensor] = field(repr=False)
    probe: Probe = field(repr=False)

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=110, no_color=True, highlight=False)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from peelwise.show.views import render

        yield render(self.record)

    def to_json(self) -> str:
        """Return the record as JSON text."""
        return self.record.to_json()

    def to_html(self) -> str:
        """Return the report as one self-contained HTML page.

        Raises:
            MissingExtraError: Without matplotlib.
        """
        from peelwise.show.views import render_html

        return render_html(self.record)

    def save(self, folder: str | Path, *, force: bool = False) -> Path:
        """Write certificate, witness, probe and (with matplotlib) the HTML report; whole or not at all.

        Args:
            folder: must not exist or be empty, unless ``force``.
            force: replace an earlier result.

        Raises:
            OutputError: If the folder is taken or cannot be written.
        """
        path = Path(folder)
        check_free(path, force=force, ours=RECORD_FILE)
        certificates.write_certificate(path, self.record, self.witness, self.probe, _pages)
        return path


@dataclass(frozen=True, eq=False)
class AuditReport(Report):
    """What an audit found: the record, and the tensors that prove it.

    Attributes:
        record: every number, as in ``certificate.json``.
        witness: replacement changes by name, ``composed/<map>`` and ``alone/<map>``, ``[d_out, d_in (+1)]``.
        probe: the token sequences that were used.
    """

    record: AuditRecord

    def to_frame(self) -> pd.DataFrame:
        """Return one row per block, intervals as columns ``recoverable_mean``, ``recoverable_low`` and so on.

        Raises:
            MissingExtraError: Without pandas.
        """
        return frame([_row(block.model_dump()) for block in self.record.blocks], "index")


def audit(
    model: nn.Module | str | Path,
    probe: Probe,
    *,
    budget: float | str = "5m",
    joint_rounds: int = 4,
    alone_rounds: int = 4,
    margin: float | None = None,
    controls: bool = True,
    name: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    progress: Watcher | None = None,
) -> AuditReport:
    """Tell, block by block, how much lower the loss could be, with replacement weights that prove it.

    Args:
        model: a module (left exactly as it was), or what ``peelwise audit`` takes: a folder, a GGUF file.
        probe: the text; see `Probe`.
        budget: wall time, seconds or like ``"5m"``. Whatever is finished by then is reported.
        joint_rounds: most rounds of refining all blocks together.
        alone_rounds: most rounds of refining one block by itself.
        margin: smallest recoverable loss that matters, nats per token; default: the larger of 0.5 % of the
            loss and 0.003.
        controls: whether to run the null controls.
        name: the model's name in the report.
        device: where a folder or file is opened.
        dtype: the number format it is opened in.
        progress: called with a `Progress` at every step.

    Returns:
        The report; print it, or ``save`` it as a certificate.

    Raises:
        PeelwiseError: With one or two lines on what is wrong and what to do.

    Example:
        >>> report = peelwise.audit(model, peelwise.Probe.from_text(text, tokenizer), budget="2m")
    """
    target, own_name, source = open_target(model, device, dtype)
    settings = AuditSettings(parse_seconds(budget), joint_rounds, alone_rounds, margin, controls)
    outcome = run_audit(
        target,
        probe,
        settings,
        name=name or own_name,
        source=source,
        watcher=progress,
    )
    return AuditReport(outcome.record, outcome.witness, outcome.probe)


def verify(
    folder: str | Path,
    model: nn.Module | str | Path | None = None,
    *,
    full: bool = False,
    device: str = "auto",
) -> Verification:
    """Recompute the losses that a certificate claims, from its own witness and probe.

    Args:
        folder: the certificate.
        model: the model, or where to open it; default: where it was opened from for the audit.
        full: also recompute the numbers of every block of an audit; a peel has nothing more to recompute.
        device: where to open the model.

    Raises:
        CertificateError: If the folder is no readable certificate.
        ModelError: If the model cannot be opened.
    """
    import torch

    path = Path(folder)
    record = read_any_record(path)
    if not isinstance(model, torch.nn.Module):
        model = _open_for(record, model, device, with_tokenizer=False).model
    if isinstance(record, PeelRecord):
        return verify_peel(path, record, model)
    return certificates.verify_certificate(path, model, full=full)


def apply(folder: str | Path, model: str | Path | None, out: str | Path, *, force: bool = False) -> float:
    """Write a model folder with the composed witness merged, and check that its loss is the certified one.

    Args:
        folder: the certificate.
        model: where the certified model is; default: where it was opened from for the audit.
        out: the new model folder, loadable by transformers.
        force: replace an earlier result.

    Returns:
        The loss of the written model on the certificate's report part, nats per token.

    Raises:
        CertificateError: If the model is not the certified one, or the written one misses the certified loss.
        OutputError: If ``out`` is taken or cannot be written.
    """
    out = Path(out)
    check_free(out, force=force, ours="config.json")
    certificate = certificates.read_certificate(Path(folder))
    opened = _open_for(certificate.record, model, "auto", with_tokenizer=True)
    if Path(opened.source).resolve() == out.resolve():
        raise OutputError(f"{out} is the model itself, which is never replaced. Choose another --out.")
    changed = certificates.merged_model(certificate, opened.model)
    with written_whole(out) as temporary:
        save_model(changed, opened.tokenizer, temporary)
        again = open_model(temporary, dtype=certificate.record.model.dtype, with_tokenizer=False)
        loss = certificates.report_loss(again.model, certificate)
        certified = certificate.record.loss.composed
        tolerance = certificates.tolerance_of(again.model)
        if certified is None or abs(loss - certified) > tolerance:
            raise CertificateError(
                f"The merged model has loss {loss:.5f} on report, certified is {certified}: not written. "
                "In half precision merging rounds the witness away; audit with --dtype float32."
            )
    return loss


def parse_seconds(budget: float | str) -> float:
    """Return seconds from a number or a text like ``90``, ``90s``, ``5m`` or ``1.5h``.

    Raises:
        PeelwiseError: If it is neither, or not positive.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smh]?)\s*", str(budget))
    seconds = float(match[1]) * _UNITS[match[2]] if match else 0.0
    if seconds <= 0:
        raise PeelwiseError(f"A budget is a positive time like 90s, 5m or 1h; got {budget!r}.")
    return seconds


def open_target(model: nn.Module | str | Path, device: str, dtype: str) -> tuple[nn.Module, str, str | None]:
    """Return the module to measure, what to call it, and where it was opened from (``None`` for a module)."""
    import torch

    if isinstance(model, torch.nn.Module):
        return model, type(model).__name__, None
    opened = open_model(model, device=device, dtype=dtype, with_tokenizer=False)
    return opened.model, opened.name, opened.source


def _open_for(record: SealedRecord, model: Any, device: str, *, with_tokenizer: bool) -> OpenedModel:
    source = model if model is not None else record.model.source
    if source is None:
        raise OutputError("The certificate does not say where its model is. Name it with --model.")
    return open_model(
        source,
        device=device,
        dtype=record.model.dtype,
        with_tokenizer=with_tokenizer,
        as_stored=record.model.as_stored,
    )


def frame(rows: list[dict[str, Any]], index: str) -> pd.DataFrame:
    """Return rows as a pandas data frame.

    Raises:
        MissingExtraError: Without pandas.
    """
    try:
        import pandas as pd
    except ImportError as error:
        raise MissingExtraError("A data frame", "frame") from error
    return pd.DataFrame(rows).set_index(index)


def _pages(record: AuditRecord | PeelRecord) -> dict[str, str]:
    """Return the files that show the record; none without matplotlib."""
    from peelwise.show.views import render_html

    try:
        return {REPORT_FILE: render_html(record)}
    except MissingExtraError:
        return {}


def _row(block: dict[str, Any]) -> dict[str, Any]:
    plain = {k: v for k, v in block.items() if not isinstance(v, (dict, tuple, list)) and not k.endswith("_nats")}
    for key in ("recoverable", "unique"):
        interval = block[f"{key}_nats"] or {}
        plain |= {f"{key}_{part}": interval.get(part) for part in ("mean", "low", "high")}
    return plain
