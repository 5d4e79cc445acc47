"""Recheck a certificate, and merge its witness into a model."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peelwise.certificate import audit as certificates
from peelwise.certificate.base import Verification, tolerance_of
from peelwise.certificate.peel import verify_peel
from peelwise.errors import CertificateError, OutputError
from peelwise.model.checkpoints import OpenedModel, open_model, save_model
from peelwise.model.options import OpenOptions
from peelwise.records.base import SealedRecord
from peelwise.records.files import read_any_record
from peelwise.records.folder import check_free, written_whole
from peelwise.records.peel import PeelRecord

if TYPE_CHECKING:
    from torch import nn


def verify(
    folder: str | Path,
    model: nn.Module | str | Path | None = None,
    *,
    full: bool = False,
    opening: OpenOptions | None = None,
) -> Verification:
    """Recompute the losses that a certificate claims, from its own witness and probe.

    Args:
        folder: the certificate.
        model: the model, or where to open it; default: where it was opened from for the audit.
        full: also recompute the numbers of every block of an audit; a peel has nothing more to recompute.
        opening: where and how the model is opened; its dtype and stored codes are the record's.

    Raises:
        CertificateError: If the folder is no readable certificate.
        ModelError: If the model cannot be opened.
    """
    import torch

    path = Path(folder)
    record = read_any_record(path)
    if not isinstance(model, torch.nn.Module):
        model = _open_for(record, model, opening, with_tokenizer=False).model
    if isinstance(record, PeelRecord):
        return verify_peel(path, record, model)
    return certificates.verify_certificate(path, model, full=full)


def apply(
    folder: str | Path,
    model: str | Path | None,
    out: str | Path,
    *,
    force: bool = False,
    opening: OpenOptions | None = None,
) -> float:
    """Write a model folder with the composed witness merged, and check that its loss is the certified one.

    Args:
        folder: the certificate.
        model: where the certified model is; default: where it was opened from for the audit.
        out: the new model folder, loadable by transformers.
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
    certificate = certificates.read_certificate(Path(folder))
    opened = _open_for(certificate.record, model, opening, with_tokenizer=True)
    if Path(opened.source).resolve() == out.resolve():
        raise OutputError(f"{out} is the model itself, which is never replaced. Choose another --out.")
    changed = certificates.merged_model(certificate, opened.model)
    with written_whole(out) as temporary:
        save_model(changed, opened.tokenizer, temporary)
        again = open_model(temporary, dtype=certificate.record.model.dtype, with_tokenizer=False)
        loss = certificates.report_loss(again.model, certificate)
        certified = certificate.record.loss.composed
        tolerance = tolerance_of(again.model)
        if certified is None or abs(loss - certified) > tolerance:
            raise CertificateError(
                f"The merged model has loss {loss:.5f} on report, certified is {certified}: not written. "
                "In half precision merging rounds the witness away; audit with --dtype float32."
            )
    return loss


def _open_for(record: SealedRecord, model: Any, opening: OpenOptions | None, *, with_tokenizer: bool) -> OpenedModel:
    source = model if model is not None else record.model.source
    if source is None:
        raise OutputError("The certificate does not say where its model is. Name it with --model.")
    how = asdict(opening or OpenOptions()) | {"dtype": record.model.dtype, "as_stored": record.model.as_stored}
    return open_model(source, with_tokenizer=with_tokenizer, **how)
