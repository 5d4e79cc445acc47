"""Read a record from the folder of a certificate. No torch: the report is rendered from this alone."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from peelwise.errors import CertificateError
from peelwise.records import SCHEMA_VERSION, AuditRecord

RECORD_FILE = "certificate.json"


def read_record(folder: Path) -> AuditRecord:
    """Read ``certificate.json``.

    Raises:
        CertificateError: If it is missing, no JSON, of a of no or a newer schema, or lacks something.
    """
    path = folder / RECORD_FILE
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CertificateError(f"No certificate at {path}: {getattr(error, 'strerror', error)}.") from error
    _check_schema(path, text)
    try:
        return AuditRecord.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole file"
        raise CertificateError(f"{path} is not a valid certificate: {where}: {first['msg']}.") from error


def _check_schema(path: Path, text: str) -> None:
    """Refuse a record of no schema or of one that is not known; what else is wrong, validation finds.

    Asked first: a newer certificate may well lack what this version expects, and then that is the reason.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return
    if not isinstance(content, dict):
        return
    if "schema" not in content:
        raise CertificateError(
            f"{path} does not say which schema it follows, so its numbers cannot be read safely. "
            f'Expected "schema": {SCHEMA_VERSION}. Use the file as it was written.'
        )
    schema = content["schema"]
    if type(schema) is int and not 1 <= schema <= SCHEMA_VERSION:
        remedy = "Update peelwise." if schema > SCHEMA_VERSION else "Use the file as it was written."
        raise CertificateError(f"{path} has schema {schema}; this version reads up to {SCHEMA_VERSION}. {remedy}")
