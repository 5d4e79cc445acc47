"""Read a record from the folder of a certificate. No torch: the report is rendered from this alone.

Whoever made the folder may have put anything there, so sizes and kinds of files are looked at before they are read.
"""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from peelwise.errors import CertificateError
from peelwise.records.audit import AuditRecord
from peelwise.records.base import SCHEMA_VERSION, SealedRecord
from peelwise.records.check import CheckRecord
from peelwise.records.compare import CompareRecord
from peelwise.records.peel import PeelRecord
from peelwise.records.plain_text import clean

RECORD_FILE, WITNESS_FILE, PROBE_FILE = "certificate.json", "witness.safetensors", "probe.safetensors"
RECORD_BYTES = 64 * 2**20  # far above what models of hundreds of blocks need
# What takes long is to make objects of numbers: that many are read in some ten seconds.
_MOST_VALUES, _LONGEST_LIST = 1_000_000, 100_000
HEADER_BYTES = 64 * 2**20  # of a safetensors file
_MOST_ENTRIES, PROBE_ENTRIES = 500_000, 1_000  # of such a header: each tensor has four
PROBE_BYTES = 256 * 2**20
PARTS = ("fit", "select", "report")
_LARGEST_INTEGER = 2**63 - 1
_LARGEST = 1e100  # squares and cubes of it are still numbers
_LARGEST_NATS = 1e9  # of an interval
CertifiedRecord = AuditRecord | PeelRecord | CheckRecord | CompareRecord
_KINDS: dict[str, type[AuditRecord] | type[PeelRecord] | type[CheckRecord] | type[CompareRecord]] = {
    "audit": AuditRecord,
    "peel": PeelRecord,
    "check": CheckRecord,
    "compare": CompareRecord,
}


def read_record(folder: Path) -> AuditRecord:
    """Read the ``certificate.json`` of an audit.

    Raises:
        CertificateError: If it is missing, no JSON, of a newer schema, lacks something, or is of another kind.
    """
    record = read_any_record(folder)
    if not isinstance(record, AuditRecord):
        raise CertificateError(f"{folder} is the certificate of a {record.kind}, expected one of an audit.")
    return record


def read_any_record(folder: Path) -> CertifiedRecord:
    """Read ``certificate.json``, whatever was measured.

    Raises:
        CertificateError: If it is missing, no JSON, of no or a newer schema, of an unknown kind, or lacks something.
    """
    path = folder / RECORD_FILE
    try:
        check_file(path, RECORD_BYTES)
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a NUL byte in the name
        raise CertificateError(f"No certificate at {path}: {getattr(error, 'strerror', error)}.") from error
    kind = _checked_kind(path, text)
    try:
        return _KINDS[kind].model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole file"
        raise CertificateError(f"{path} is not a valid certificate: {clean(where)}: {clean(first['msg'])}.") from error


def _checked_kind(path: Path, text: str) -> str:
    """Return the kind of a record, refusing one of no schema or of one that is not known.

    Asked first: a newer certificate may well lack what this version expects, and then that is the reason. What
    else is wrong, validation as an audit finds.
    """
    if sum(map(text.count, ",[{")) > _MOST_VALUES:
        raise CertificateError(f"{path} holds more than {_MOST_VALUES} values, which no model has.")
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
    try:
        wrong = next(_implausible(content, ""), None)
    except RecursionError:
        wrong = "it is nested too deeply"
    if wrong:
        raise CertificateError(f"{path} is not a valid certificate: {clean(wrong)}.")
    schema, kind = content["schema"], content.get("kind", "audit")
    if type(schema) is int and not 1 <= schema <= SCHEMA_VERSION:
        remedy = "Update peelwise." if schema > SCHEMA_VERSION else "Use the file as it was written."
        raise CertificateError(f"{path} has schema {schema}; this version reads up to {SCHEMA_VERSION}. {remedy}")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise CertificateError(
            f"{path} is of kind {str(kind)[:40]!r}; this version reads {', '.join(_KINDS)}. Update peelwise."
        )
    return kind


def check_file(path: Path, most: int | None = None) -> int:
    """Return the size in bytes of a file of a certificate, looked at before anything is read.

    Raises:
        OSError: If it is missing.
        CertificateError: If it is a folder, a pipe or a device, or larger than ``most`` bytes.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise CertificateError(f"{path} is no regular file: expected one that peelwise wrote.")
    if most is not None and found.st_size > most:
        raise CertificateError(f"{path} has {found.st_size} bytes, and at most {most} are plausible here.")
    return found.st_size


def what_changed(folder: Path, record: SealedRecord) -> str | None:
    """Return what was changed in the folder after it was written, or ``None``.

    Raises:
        CertificateError: If the witness is missing, no regular file, or no safetensors file.
    """
    if record.digest != record.computed_digest():
        return f"{RECORD_FILE} was changed after it was written (its digest does not match)."
    path = folder / WITNESS_FILE
    try:
        size = check_file(path)
        check_header(path)  # before the rest is read, however much there is
        same = record.witness is not None and size == record.witness.bytes and sha256(path) == record.witness.sha256
    except OSError as error:
        raise CertificateError(f"{path} cannot be read: {error.strerror}.") from error
    return None if same else f"{WITNESS_FILE} was changed after it was written (its SHA-256 does not match)."


def check_header(path: Path, entries: int = _MOST_ENTRIES) -> None:
    """Refuse a safetensors file whose header promises what the file cannot hold, before anything is made by it.

    Args:
        path: of the file.
        entries: that the header may have; a tensor has four.

    Raises:
        OSError: If it cannot be read.
        CertificateError: If it is damaged.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(path.stat().st_size - 8, HEADER_BYTES):
            raise CertificateError(f"{path} is damaged: its header is longer than the file, or missing.")
        text = file.read(length)
        if text.count(b":") > entries:
            raise CertificateError(f"{path} is damaged: its header has more than {entries} entries.")
        try:
            header = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CertificateError(f"{path} is damaged: its header is no JSON.") from error
    if not isinstance(header, dict):
        raise CertificateError(f"{path} is damaged: its header is no list of tensors.")


def check_unchanged(folder: Path, record: SealedRecord) -> None:
    """Refuse a folder that is not as it was written: nothing is shown or made from it.

    Raises:
        CertificateError: With what was changed.
    """
    changed = what_changed(folder, record)
    if changed:
        raise CertificateError(f"{folder} does not hold: {changed}")
    if record.probe is not None and _probe_fingerprint(folder / PROBE_FILE) != record.probe.fingerprint:
        raise CertificateError(f"{folder} does not hold: {PROBE_FILE} is not the probe that was certified.")


def _probe_fingerprint(path: Path) -> str | None:
    """Return the fingerprint of a stored probe as `Probe.fingerprint` does; ``None`` of any other file.

    Raises:
        CertificateError: If it is missing, no regular file, or no safetensors file.
    """
    import numpy as np
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    digest = hashlib.sha256()
    try:
        check_file(path, PROBE_BYTES)
        check_header(path, PROBE_ENTRIES)
        tensors = load_file(path)
        if any(".column." in key for key in tensors):
            return _examples_fingerprint(tensors)
        for part in PARTS:
            ids, lengths = tensors[f"{part}.ids"], tensors[f"{part}.lengths"]
            if (
                ids.ndim != 2
                or lengths.shape != ids.shape[:1]
                or not {ids.dtype.kind, lengths.dtype.kind} <= {"i", "u"}
            ):
                return None
            if not (ids.size and int(lengths.min()) >= 2 and int(lengths.max()) <= ids.shape[1]):
                return None
            mask = np.arange(ids.shape[1]) < lengths[:, None]
            digest.update(f"{part} {mask.shape}\n".encode())
            asked = [tensors[key] * mask for key in [f"{part}.asked"] if key in tensors]
            for values in (ids * mask, mask, *asked, *(tensors[k] for k in [f"{part}.documents"] if k in tensors)):
                digest.update(np.ascontiguousarray(values, dtype="<i8").tobytes())
    except OSError as error:
        raise CertificateError(f"{path} cannot be read: {error.strerror}.") from error
    except (SafetensorError, KeyError, ValueError, TypeError, OverflowError, MemoryError):
        return None
    return digest.hexdigest()


def _examples_fingerprint(tensors: Mapping[str, Any]) -> str:
    """Return the fingerprint of stored examples, NumPy arrays by ``<part>.column.<name>``."""
    digest = hashlib.sha256()
    for part in PARTS:
        start = f"{part}.column."
        columns = {key.removeprefix(start): tensors[key] for key in sorted(tensors) if key.startswith(start)}
        count = len(next(iter(columns.values()))) if columns else 0
        digest.update(f"{part} {count}\n".encode())
        for name, column in columns.items():
            digest.update(f"{name} {column.dtype.name} {column.shape}\n".encode())
            digest.update(column.tobytes())
    return digest.hexdigest()


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _implausible(value: Any, where: str) -> Iterator[str]:
    """Yield where JSON holds numbers that no audit or peel can have found, and arithmetic would fail on."""
    if isinstance(value, dict):
        if "standard_error" in value:
            yield from (
                f"{where}{key} is beyond {_LARGEST_NATS:g}"
                for key, number in value.items()
                if isinstance(number, int | float) and not abs(number) <= _LARGEST_NATS
            )
        for key, inner in value.items():
            yield from _implausible(inner, f"{where}{key[:80]}.")
    elif isinstance(value, list):
        if len(value) > _LONGEST_LIST:
            yield f"{where.rstrip('.')} is a list of {len(value)}"
        for place, inner in enumerate(value):
            yield from _implausible(inner, f"{where}{place}.")
    elif isinstance(value, int) and abs(value) > _LARGEST_INTEGER:
        yield f"{where.rstrip('.')} is an integer beyond 64 bits"
    elif isinstance(value, float) and not abs(value) <= _LARGEST:
        yield f"{where.rstrip('.')} is beyond {_LARGEST:g}"
