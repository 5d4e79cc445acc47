"""Read a record from the folder of a certificate. No torch: the report is rendered from this alone."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from peelwise.errors import CertificateError
from peelwise.records.audit import AuditRecord
from peelwise.records.base import SCHEMA_VERSION
from peelwise.records.peel import PeelRecord

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
        CertificateError: If it is missing, no JSON, of no or a newer schema, of an unknown kind, or lacks something.
    """
    path = folder / RECORD_FILE
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CertificateError(f"No certificate at {path}: {getattr(error, 'strerror', error)}.") from error
    kind = _checked_kind(path, text)
    try:
        return _KINDS[kind].model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole file"
        raise CertificateError(f"{path} is not a valid certificate: {where}: {first['msg']}.") from error


def _checked_kind(path: Path, text: str) -> str:
    """Return the kind of a record, refusing one of no schema or of one that is not known.

    Asked first: a newer certificate may well lack what this version expects, and then that is the reason. What
    else is wrong, validation as an audit finds.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return "audit"
    if not isinstance(content, dict):
        return "audit"
    if "schema" not in content:
        raise CertificateError(
            f"{path} does not say which schema it follows, so its numbers cannot be read safely. "
            f'Expected "schema": {SCHEMA_VERSION}. Use the file as it was written.'
        )
    schema, kind = content["schema"], content.get("kind", "audit")
    if type(schema) is int and not 1 <= schema <= SCHEMA_VERSION:
        remedy = "Update peelwise." if schema > SCHEMA_VERSION else "Use the file as it was written."
        raise CertificateError(f"{path} has schema {schema}; this version reads up to {SCHEMA_VERSION}. {remedy}")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise CertificateError(f"{path} is of kind {kind!r}; this version reads {', '.join(_KINDS)}. Update peelwise.")
    return kind
