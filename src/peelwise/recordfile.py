"""Read a record from the folder of a certificate. No torch: the report is rendered from this alone."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, Field, ValidationError

from peelwise.errors import CertificateError
from peelwise.peel_records import PeelRecord
from peelwise.records import SCHEMA_VERSION, AuditRecord

RECORD_FILE = "certificate.json"


_KINDS: dict[str, type[AuditRecord] | type[PeelRecord]] = {"audit": AuditRecord, "peel": PeelRecord}


def read_record(folder: Path) -> AuditRecord:
    """Read the ``certificate.json`` of an audit.

    Raises:
        CertificateError: If it is missing, no JSON, of a newer schema, lacks something, or is of another kind.
    """
    record = read_any_record(folder)
    if not isinstance(record, AuditRecord):
        raise CertificateError(f"{folder} is the certificate of a {record.kind}, expected one of an audit.")
    return record


def read_any_record(folder: Path) -> AuditRecord | PeelRecord:
    """Read ``certificate.json``, whatever was measured.

    Raises:
        CertificateError: If it is missing, no JSON, of a newer schema or an unknown kind, or lacks something.
    """
    path = folder / RECORD_FILE
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CertificateError(f"No certificate at {path}: {getattr(error, 'strerror', error)}.") from error
    schema, kind = _claim(text)
    # Asked first: a newer certificate may well lack what this version expects, and then that is the reason.
    if schema > SCHEMA_VERSION:
        raise CertificateError(
            f"{path} has schema {schema}; this version reads up to {SCHEMA_VERSION}. Update peelwise."
        )
    if kind not in _KINDS:
        raise CertificateError(f"{path} is of kind {kind!r}; this version reads {', '.join(_KINDS)}. Update peelwise.")
    try:
        return _KINDS[kind].model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole file"
        raise CertificateError(f"{path} is not a valid certificate: {where}: {first['msg']}.") from error


def _claim(text: str) -> tuple[int, str]:
    """Return schema and kind that the text claims, 0 and audit where it claims none; validation finds the rest."""
    try:
        claim = _Claim.model_validate_json(text)
    except ValidationError:
        return 0, "audit"
    return claim.claimed, claim.kind


class _Claim(BaseModel):
    claimed: int = Field(default=0, alias="schema")
    kind: str = "audit"
