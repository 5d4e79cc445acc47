"""Recheck a certificate, and merge its witness into a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peelwise.certificate import audit as certificates
from peelwise.certificate.base import Verification, read_probe, tolerance_of
from peelwise.certificate.check import scaled_model, verify_check
from peelwise.certificate.compare import mended_model, verify_compare
from peelwise.certificate.own_text import Text
from peelwise.certificate.peel import verify_peel
from peelwise.errors import CertificateError, ModelError, OptionError, OutputError, PeelwiseError, ProbeError
from peelwise.model.checkpoints import OpenedModel, open_model, open_tokenizer, require_tokenizer, save_model
from peelwise.model.offloaded import measures_offloaded
from peelwise.model.options import OpenOptions
from peelwise.probe.examples import Loss
from peelwise.probe.options import ProbeOptions
from peelwise.probe.probe import Probe
from peelwise.records.audit import AuditRecord
from peelwise.records.base import ModelRecord, ProbeRecord, SealedRecord
from peelwise.records.check import CheckRecord
from peelwise.records.compare import CompareRecord
from peelwise.records.files import check_unchanged, read_any_record, read_record, what_changed
from peelwise.records.folder import check_free, written_whole
from peelwise.records.peel import PeelRecord

if TYPE_CHECKING:
    from torch import nn


@measures_offloaded
def verify(
    folder: str | Path,
    model: nn.Module | str | Path | None = None,
    *,
    old: nn.Module | str | Path | None = None,
    full: bool = False,
    replay: bool = False,
    text: str | Path | Sequence[str | Path] | ProbeOptions | None = None,
    tokens: int | None = None,
    loss: Loss | None = None,
    opening: OpenOptions | None = None,
) -> Verification:
    """Recompute the losses that a certificate claims, from its own witness and probe; and try it on your own text.

    With ``model`` and ``text`` nothing of whoever made the certificate is believed but that the witness is a file of
    weights: it is evaluated on text that they did not choose.

    Args:
        folder: the certificate.
        model: the model (of a comparison: NEW), or where to open it; default: where it was opened from for the audit.
        old: of a comparison OLD, or where to open it; default: where it was opened from.
        full: also recompute the numbers of every block of an audit, or make a whole check or comparison again; a peel
            has nothing more to recompute.
        replay: also make the witness again from the fit and select parts, and compare; as long as the audit or the peel
            took. What was fitted to the report part does not come out again.
        text: files of your own text, or how a probe would be drawn from them; cut like the certificate's probe, and
            sequences that it has are left out.
        tokens: of your text to use at most; default: that of `ProbeOptions`.
        loss: of a certificate on batches, the function that `Probe.from_batches` was given, which no file holds.
        opening: where and how the model is opened; its dtype and stored codes are the record's. A module needs its
            ``tokenizer`` for a text.

    Returns:
        What holds; ``own`` is what was found on your text.

    Raises:
        CertificateError: If the folder is no readable certificate.
        ModelError: If the model cannot be opened, or has no tokenizer for the text.
        OptionError: If tokens are given without a text, or a loss that the certificate does not need.
        ProbeError: If the text cannot be read, or too little of it is new to the certificate.

    Example:
        >>> found = peelwise.verify("out/theirs", "path/to/model", text="mine.txt")
        >>> found.own.found.low > found.own.margin
    """
    path = Path(folder)
    record = read_any_record(path)
    changed = what_changed(path, record)
    if changed:  # before anything that it names is opened
        return Verification("does not hold", changed)
    options = _own_text(text, tokens)
    _check_batches(path, record, loss, text=options is not None)
    documents = options.documents() if options is not None else []  # first, since it is quick and may be mistyped
    texts = [document for document in documents if isinstance(document, str)]
    if len(texts) < len(documents):
        raise ProbeError(
            "A certificate is tried on text of your own, not on conversations: name a field that holds text."
        )
    opened, source, tokenizer = _model_and_tokenizer(record, model, opening, with_tokenizer=options is not None)
    own = None
    if options is not None:
        own = Text(texts, tokenizer, options.tokens, options.source, options.in_distribution, options.seed)
    with _one_line(path):
        if isinstance(record, PeelRecord):
            return verify_peel(path, record, opened, replay=replay, text=own, source=source)
        if isinstance(record, CheckRecord | CompareRecord) and replay:
            raise CertificateError(
                f"A {record.kind} has no fitted witness to make again: run peelwise {record.kind} instead."
            )
        if isinstance(record, CheckRecord):
            return verify_check(path, record, opened, full=full, text=own, source=source, loss=loss)
        if isinstance(record, CompareRecord):
            before, origin = _old_model(record, old, opening)
            return verify_compare(
                path, record, before, opened, full=full, text=own, sources=(origin, source), loss=loss
            )
        return certificates.verify_certificate(
            path, opened, full=full, replay=replay, text=own, source=source, loss=loss
        )


@measures_offloaded
def apply(
    folder: str | Path,
    model: str | Path | None,
    out: str | Path,
    *,
    old: nn.Module | str | Path | None = None,
    force: bool = False,
    opening: OpenOptions | None = None,
) -> float:
    """Write a model folder with the composed witness merged, and check that its loss is the certified one.

    Of a check, its composed gain witnesses: factors on layers. Of a comparison, OLD's tensors of all parts that hurt.

    Args:
        folder: the certificate.
        model: where the certified model is; default: where it was opened from for the audit.
        out: the new model folder, loadable by transformers.
        old: of a comparison OLD, or where to open it; default: where it was opened from.
        force: replace an earlier result.
        opening: where and how the model is opened; its dtype and stored codes are the record's.

    Returns:
        The loss of the written model on the certificate's report part, nats per token.

    Raises:
        CertificateError: If the model is not the certified one, or the written one misses the certified loss.
        OutputError: If ``out`` is taken or cannot be written.
    """
    out = Path(out)
    check_free(out, force=force, ours="config.json")
    path = Path(folder)
    record = read_any_record(path)
    if isinstance(record, PeelRecord):
        record = read_record(path)  # says what is expected
    check_unchanged(path, record)
    if record.probe is not None and record.probe.loss is not None:
        raise CertificateError(f"Not yet: {path} is about batches, and apply writes language models of transformers.")
    opened = _open_for(record.model, model, opening, with_tokenizer=True)
    if Path(opened.source).resolve() == out.resolve():
        raise OutputError(f"{out} is the model itself, which is never replaced. Choose another --out.")
    with _one_line(path):
        if isinstance(record, CompareRecord):
            before, origin = _old_model(record, old, opening)
            if origin is not None and Path(origin).resolve() == out.resolve():
                raise OutputError(f"{out} is OLD itself, which is never replaced. Choose another --out.")
            changed, probe = mended_model(path, record, before, opened.model), read_probe(path, record)
            certified = record.mended.loss if record.mended is not None else None
        else:
            changed, certified, probe = _merged(path, record, opened.model)
    with written_whole(out) as temporary:
        save_model(changed, opened.tokenizer, temporary)
        again = open_model(temporary, dtype=record.model.dtype, with_tokenizer=False)
        loss = certificates.report_loss(again.model, probe)
        tolerance = tolerance_of(again.model)
        if certified is None or not abs(loss - certified) <= tolerance:  # NaN too
            raise CertificateError(
                f"The merged model has loss {loss:.5f} on report, certified is {certified}: not written. "
                "In half precision merging rounds the witness away; audit with --dtype float32."
            )
    return loss


def _merged(path: Path, record: AuditRecord | CheckRecord, model: nn.Module) -> tuple[nn.Module, float | None, Probe]:
    """Return a copy of the model with what was certified merged, its certified loss, and the probe it was found on."""
    if isinstance(record, CheckRecord):
        return scaled_model(path, record, model), record.composed_loss, read_probe(path, record)
    certificate = certificates.read_certificate(path)
    certificates.check_certified(path, certificate, model)
    return certificates.merged_model(certificate, model), record.loss.composed, certificate.probe


def _check_batches(folder: Path, record: SealedRecord, loss: Loss | None, *, text: bool) -> None:
    """Refuse what does not go together with the probe of a certificate: a loss with text, text with batches."""
    probe: ProbeRecord | None = record.probe  # a check may have none
    kind = None if probe is None else probe.loss
    if loss is not None and kind != "given":
        raise OptionError("loss: the losses of this certificate are of no function of yours. Leave it out.")
    if text and kind is not None:
        raise CertificateError(f"{folder} is about batches, and its witness cannot be tried on text.")


def _own_text(text: str | Path | Sequence[str | Path] | ProbeOptions | None, tokens: int | None) -> ProbeOptions | None:
    if text is None:
        if tokens is not None:
            raise OptionError("tokens: how many of your text to use, and no text was given (--text).")
        return None
    if not isinstance(text, ProbeOptions):
        text = ProbeOptions([text] if isinstance(text, str | Path) else tuple(text))
    return text if tokens is None else replace(text, tokens=tokens)


def _model_and_tokenizer(
    record: SealedRecord, model: Any, opening: OpenOptions | None, *, with_tokenizer: bool
) -> tuple[nn.Module, str | None, Any]:
    """Return the model, where it was opened from (``None`` for a module) and the tokenizer for a text."""
    import torch

    if not isinstance(model, torch.nn.Module):
        opened = _open_for(record.model, model, opening, with_tokenizer=with_tokenizer)
        return opened.model, str(opened.source), require_tokenizer(opened) if with_tokenizer else None
    if not with_tokenizer:
        return model, None, None
    if opening is None or opening.tokenizer is None:
        raise ModelError("A module has no tokenizer, and text needs one: OpenOptions(tokenizer=FOLDER).")
    return model, None, open_tokenizer(opening.tokenizer)


@contextmanager
def _one_line(folder: Path) -> Iterator[None]:
    """Say in one line what a certificate does that no audit wrote: its numbers are anybody's."""
    try:
        yield
    except (ArithmeticError, LookupError, TypeError, ValueError, MemoryError, RuntimeError) as error:
        if isinstance(error, PeelwiseError):
            raise
        reason = (str(error).splitlines() or [""])[0][:200]
        raise CertificateError(f"{folder} cannot be checked: {type(error).__name__}: {reason}") from error


def _old_model(record: CompareRecord, old: Any, opening: OpenOptions | None) -> tuple[nn.Module, str | None]:
    """Return OLD of a comparison, and where it was opened from (``None`` for a module)."""
    import torch

    if isinstance(old, torch.nn.Module):
        return old, None
    opened = _open_for(record.old, old, opening, option="--old", with_tokenizer=False)
    return opened.model, str(opened.source)


def _open_for(
    said: ModelRecord,
    model: Any,
    opening: OpenOptions | None,
    *,
    with_tokenizer: bool,
    option: str = "--model",
) -> OpenedModel:
    source = model if model is not None else said.source
    if source is None:
        raise OutputError(f"The certificate does not say where {said.name[:80]} is. Name it with {option}.")
    how = asdict(opening or OpenOptions()) | {"dtype": said.dtype, "as_stored": said.as_stored}
    return open_model(source, with_tokenizer=with_tokenizer, **how)
