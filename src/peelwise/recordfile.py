"""Read a record from the folder of a certificate. No torch: the report is rendered from this alone."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, Field, ValidationError

from peelwise.errors import CertificateError
from peelwise.records import SCHEMA_VERSION, AuditRecord

RECORD_FILE = "certificate.json"


def read_record(folder: Path) -> AuditRecord:
    """Read ``certificate.json``.

    Raises:
        CertificateError: If it is missing, no JSON, of a newer schema, or lacks something.
    """
    path = folder / RECORD_FILE
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CertificateError(f"No certificate at {path}: {getattr(error, 'strerror', error)}.") from error
    schema = _schema(text)
    # Asked first: a newer certificate may well lack what this version expects, and then that is the reason.
    if schema > SCHEMA_VERSION:
        raise CertificateError(
            f"{path} has schema {schema}; this version reads up to {SCHEMA_VERSION}. Update peelwise."
        )
    try:
        return AuditRecord.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole file"
        raise CertificateError(f"{path} is not a valid certificate: {where}: {first['msg']}.") from error


def _schema(text: str) -> int:
    """Return the schema that the text claims, 0 where it claims none; whatever else is wrong, validation finds."""
    try:
        return _Claim.model_validate_json(text).claimed
    except ValidationError:
        return 0


class _Claim(BaseModel):
    claimed: int = Field(default=0, alias="schema")
