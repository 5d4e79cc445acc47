"""What certificates of every kind share: writing, sealing, reading tensors, and the result of a recheck."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peelwise.errors import CertificateError
from peelwise.model.fingerprint import fingerprint
from peelwise.probe.probe import Probe
from peelwise.records.base import SealedRecord, WitnessRecord
from peelwise.records.files import RECORD_FILE
from peelwise.records.folder import written_whole

WITNESS_FILE, PROBE_FILE = "witness.safetensors", "probe.safetensors"


# Nats per token that a recomputed loss may be off: other threads, batches, machines. Half precision is the most.
_TOLERANCE, _HALF_TOLERANCE = 3e-4, 5e-3


SomeRecord = TypeVar("SomeRecord", bound=SealedRecord)


@dataclass(frozen=True)
class Check:
    """One number of the certificate, as recorded and as found again."""

    name: str
    recorded: float
    found: float
    holds: bool


@dataclass(frozen=True)
class Verification:
    """The outcome of `verify_certificate`: what is true of the certificate, and the numbers compared.

    ``rechecked`` and ``not_rechecked`` say in words what was established here and what still rests on the word of
    whoever made the certificate; both are empty where the check ended before any loss was computed.
    """

    status: Literal["holds", "does not hold", "not the same model or data"]
    reason: str
    checks: tuple[Check, ...] = ()
    tolerance: float = 0.0
    rechecked: tuple[str, ...] = ()
    not_rechecked: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether every number was found again."""
        return self.status == "holds"


def write_certificate(
    folder: Path,
    record: SomeRecord,
    witness: Mapping[str, Tensor],
    probe: Probe,
    pages: Callable[[SomeRecord], Mapping[str, str]] = lambda record: {},
) -> SomeRecord:
    """Write the folder whole or not at all, and return the record as written (sealed, with its witness).

    Args:
        folder: replaced if it exists; check first.
        record: what was found.
        witness: tensors by name.
        probe: token ids of the three parts, so that anybody can check without the text.
        pages: makes further text files by name, such as the report, from the sealed record.
    """
    with written_whole(folder) as temporary:
        save_file(dict(witness), temporary / WITNESS_FILE)
        save_file(probe.to_tensors(), temporary / PROBE_FILE)
        sealed = record.model_copy(update={"witness": _witness_record(temporary / WITNESS_FILE, witness)}).sealed()
        (temporary / RECORD_FILE).write_text(sealed.to_json() + "\n", encoding="utf-8")
        for file in (WITNESS_FILE, PROBE_FILE):
            (temporary / file).chmod(0o644)  # the library writes them for their owner alone
        for name, text in pages(sealed).items():
            (temporary / name).write_text(text, encoding="utf-8")
    return sealed


def tolerance_of(model: nn.Module) -> float:
    """Return how far a recomputed loss may be off, in nats per token, in the dtype that ``model`` runs in."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return _TOLERANCE if dtypes <= {torch.float32, torch.float64} else _HALF_TOLERANCE


def what_changed(folder: Path, record: SealedRecord) -> str | None:
    """Return what was changed in the folder after it was written, or ``None``."""
    if record.digest != record.computed_digest():
        return f"{RECORD_FILE} was changed after it was written (its digest does not match)."
    if record.witness is None or _sha256(folder / WITNESS_FILE) != record.witness.sha256:
        return f"{WITNESS_FILE} was changed after it was written (its SHA-256 does not match)."
    return None


def _witness_record(path: Path, witness: Mapping[str, Tensor]) -> WitnessRecord:
    dtypes = {str(t.dtype).removeprefix("torch.") for t in witness.values()}
    return WitnessRecord(
        file=path.name,
        sha256=_sha256(path),
        bytes=path.stat().st_size,
        dtype=", ".join(sorted(dtypes)) or "none",
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_probe(folder: Path, record: SealedRecord) -> Probe:
    """Read the probe of a certificate.

    Raises:
        CertificateError: If it is missing or damaged.
    """
    return Probe.from_tensors(
        load_tensors(folder / PROBE_FILE),
        source=record.probe.source,
        in_distribution=record.probe.in_distribution,
        seed=record.seed,
    )


def not_as_certified(folder: Path, record: SealedRecord, probe: Probe, model: nn.Module) -> Verification | None:
    """Return what there is to say where the files, the probe or the model are not those of the record, or ``None``."""
    changed = what_changed(folder, record)
    if changed:
        return Verification("does not hold", changed)
    if probe.fingerprint != record.probe.fingerprint:
        return Verification("not the same model or data", f"{PROBE_FILE} is not the probe that was certified.")
    if fingerprint(model) != record.model.fingerprint:
        return Verification("not the same model or data", "The model's tensors are not those that were certified.")
    return None


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file of the folder.

    Raises:
        CertificateError: If it is missing or damaged.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CertificateError(f"{path} is missing or damaged: {error}.") from error
