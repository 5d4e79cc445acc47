"""What certificates of every kind share: writing, sealing, reading tensors, and the result of a recheck."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peelwise.errors import CertificateError, OutputError, ProbeError, UnsupportedModelError
from peelwise.evidence.compare import Effect
from peelwise.model.architectures import find_blocks
from peelwise.model.configuration import configuration, other_configuration
from peelwise.model.fingerprint import over_both, tensors_sha256
from peelwise.model.layers import Block, context_length, parameter_count, unwrapped, vocabulary_size
from peelwise.probe.examples import Loss
from peelwise.probe.limits import check_context, check_vocabulary
from peelwise.probe.probe import Probe
from peelwise.probe.split import Pool
from peelwise.records.base import Colour, Interval, ModelRecord, ProbeRecord, SealedRecord, WitnessRecord
from peelwise.records.compare import CompareLosses
from peelwise.records.files import (
    HEADER_BYTES,
    PROBE_BYTES,
    PROBE_ENTRIES,
    PROBE_FILE,
    RECORD_FILE,
    WITNESS_FILE,
    check_file,
    check_header,
    sha256,
    what_changed,
)
from peelwise.records.folder import written_whole
from peelwise.records.plain_text import clean

_PIECE = 1 << 24
_DTYPES = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
}
# Two witnesses of every weight at eight bytes each: more than any format takes.
_BYTES_PER_PARAMETER = 16

# Nats per token that a recomputed loss may be off: other threads, batches, machines. Half precision is the most.
_TOLERANCE, _HALF_TOLERANCE = 3e-4, 5e-3
_USUAL_NATS = 3.0  # of a language model: losses in other units may be off by the same share


LOSSES_HOLD: Literal["losses hold, verdicts not rechecked"] = "losses hold, verdicts not rechecked"
Status = Literal["holds", "losses hold, verdicts not rechecked", "does not hold", "not the same model or data"]
NOT_THE_MODEL = "The model's tensors are not those that were certified."
SomeRecord = TypeVar("SomeRecord", bound=SealedRecord)


@dataclass(frozen=True)
class Check:
    """One number of the certificate, as recorded and as found again."""

    name: str
    recorded: float
    found: float
    holds: bool


@dataclass(frozen=True)
class OwnBlock:
    """One block on the text of whoever checks, beside what was certified; gains in nats per token.

    ``certified`` and ``found`` are colours, ``gains`` the solo gain certified and found; of a comparison, what the
    block's change did, and what putting it back repairs.
    """

    name: str
    certified: Colour | Effect
    found: Colour | Effect
    gains: tuple[Interval | None, Interval | None]


@dataclass(frozen=True)
class OwnText:
    """What a witness is worth on text that whoever made it did not choose.

    Attributes:
        source: of the text.
        sequences, tokens: evaluated.
        overlapping: sequences left out because the certificate's own probe has their text.
        loss: of the model there, nats per token.
        margin: smallest gain that counts there, nats per token.
        certified: gain of the composed witness on the author's text; ``None`` if there is none.
        found: the same on this text.
        blocks: solo gains and verdicts.
        holds: whether a gain that was certified as above the margin is so here with its whole interval, and no block is
            refuted: red and green here, or below the margin and its own weights gain more here.
        reason: of that, in words.
    """

    source: str
    sequences: int
    tokens: int
    overlapping: int
    loss: float
    margin: float
    certified: Interval | None
    found: Interval | None
    blocks: tuple[OwnBlock, ...] = field(repr=False, default=())
    holds: bool = True
    reason: str = ""


@dataclass(frozen=True)
class Replay:
    """What came out when the witness was made again from fit and select.

    Attributes:
        tensors: of the witness that were compared.
        differing: of them, not the same bit for bit.
        left_out: in words, what was not made again.
        holds: whether the bits or at least the gains are those of the certificate.
        reason: of that, in words.
    """

    tensors: int
    differing: int
    left_out: tuple[str, ...] = ()
    holds: bool = True
    reason: str = ""


@dataclass(frozen=True)
class Verification:
    """The outcome of `verify_certificate`: what is true of the certificate, and the numbers compared.

    A recheck of an audit that leaves out its blocks ends with "losses hold, verdicts not rechecked".

    ``rechecked`` and ``not_rechecked`` say in words what was established here and what still rests on the word of
    whoever made the certificate; both are empty where the check ended before any loss was computed.

    Attributes:
        status: whether it holds; of one that holds on the author's text, but not on the own one, ``does not hold``.
        reason: why, in one line.
        checks: the numbers compared.
        tolerance: nats per token that a number may be off.
        rechecked, not_rechecked: in words.
        margin: smallest gain that counts as evidence here, nats per token.
        model: what was opened, and from where.
        split: how sequences were assigned to the parts, in words.
        own: what the witness is worth on the text that was given.
        replay: what came out when the witness was made again.
    """

    status: Status
    reason: str
    checks: tuple[Check, ...] = ()
    tolerance: float = 0.0
    rechecked: tuple[str, ...] = ()
    not_rechecked: tuple[str, ...] = ()
    margin: float | None = None
    model: str | None = None
    split: str | None = None
    own: OwnText | None = None
    replay: Replay | None = None

    @property
    def holds(self) -> bool:
        """Whether every number that was compared was found again."""
        return self.status in ("holds", LOSSES_HOLD)


def write_certificate(
    folder: Path,
    record: SomeRecord,
    witness: Mapping[str, Tensor],
    probe: Probe | None,
    pages: Callable[[SomeRecord], Mapping[str, str]] = lambda record: {},
) -> SomeRecord:
    """Write the folder whole or not at all, and return the record as written (sealed, with its witness).

    Args:
        folder: replaced if it exists; check first.
        record: what was found.
        witness: tensors by name.
        probe: token ids of the three parts, so that anybody can check without the text; ``None`` where there is none.
        pages: makes further text files by name, such as the report, from the sealed record.
    """
    with written_whole(folder) as temporary:
        save_file(dict(witness), temporary / WITNESS_FILE)
        if probe is not None:
            _write_probe(probe, temporary / PROBE_FILE)
        sealed = record.model_copy(update={"witness": _witness_record(temporary / WITNESS_FILE, witness)}).sealed()
        (temporary / RECORD_FILE).write_text(sealed.to_json() + "\n", encoding="utf-8")
        for file in temporary.glob("*.safetensors"):
            file.chmod(0o644)  # the library writes them for their owner alone
        for name, text in pages(sealed).items():
            (temporary / name).write_text(text, encoding="utf-8")
    return sealed


def _write_probe(probe: Probe, path: Path) -> None:
    save_file(probe.to_tensors(), path)
    size = path.stat().st_size
    if size > PROBE_BYTES:  # images may be many
        raise OutputError(
            f"The probe takes {size} bytes, a certificate's at most {PROBE_BYTES}. Give fewer or smaller examples."
        )


def tolerance_of(model: nn.Module, unit_loss: float | None = None) -> float:
    """Return how far a recomputed loss may be off, in nats per token, in the dtype that ``model`` runs in.

    Args:
        model: the model.
        unit_loss: a certified loss in another unit, whose size the tolerance then goes by.
    """
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    nats = _TOLERANCE if dtypes <= {torch.float32, torch.float64} else _HALF_TOLERANCE
    return nats if unit_loss is None else nats * unit_loss / _USUAL_NATS


def unit_loss(record: SealedRecord) -> float | None:
    """Return the certified loss of a record on batches (of two models the lower one), ``None`` of any other."""
    probe: ProbeRecord | None = record.probe  # a check may have none
    loss = getattr(record, "loss", None)
    current = min(loss.old, loss.new) if isinstance(loss, CompareLosses) else getattr(loss, "current", loss)
    return float(current) if probe is not None and probe.loss is not None and current is not None else None


def _witness_record(path: Path, witness: Mapping[str, Tensor]) -> WitnessRecord:
    dtypes = {str(t.dtype).removeprefix("torch.") for t in witness.values()}
    return WitnessRecord(
        file=path.name,
        sha256=sha256(path),
        bytes=path.stat().st_size,
        dtype=", ".join(sorted(dtypes)) or "none",
    )


def read_probe(folder: Path, record: SealedRecord, loss: Loss | None = None) -> Probe:
    """Read the probe of a certificate.

    Args:
        folder: the certificate.
        record: its record.
        loss: of batches whose loss is a function, that function.

    Raises:
        CertificateError: If it is missing or damaged, or its loss is a function and none is given.
    """
    said, pool = record.probe, None
    if said.loss == "given" and loss is None:
        raise CertificateError(
            f"{folder} is about losses of a function, which no file holds: check it from Python with "
            "peelwise.verify(folder, model, loss=..)."
        )
    if said.pool_sequences is not None and said.pool_sha256 is not None:
        pool = Pool(said.pool_sequences, said.pool_sha256, said.pool_left_out or 0, said.documents)
    try:
        return Probe.from_tensors(
            load_tensors(folder / PROBE_FILE, PROBE_BYTES, PROBE_ENTRIES),
            source=said.source,
            in_distribution=said.in_distribution,
            seed=record.seed,
            pool=pool,
            loss=loss,
            unit=said.unit,
        )
    except ProbeError as error:
        raise CertificateError(f"{folder / PROBE_FILE}: {error}") from error


def not_as_certified(folder: Path, record: SealedRecord, probe: Probe, model: nn.Module) -> Verification | None:
    """Return what there is to say where the files, the probe or the model are not those of the record, or ``None``.

    Raises:
        ProbeError: If the probe's tokens do not fit the model's vocabulary, or its sequences the context.
    """
    changed = what_changed(folder, record)
    if changed:
        return Verification("does not hold", changed)
    if probe.fingerprint != record.probe.fingerprint:
        return Verification("not the same model or data", f"{PROBE_FILE} is not the probe that was certified.")
    other = other_model(record.model, model)
    if other:
        return Verification("not the same model or data", other)
    if probe.examples is None:
        size, limit = vocabulary_size(model), context_length(model)
        if size is not None:
            check_vocabulary(probe, size)
        if limit is not None:
            check_context(probe, limit)
    wrong = next(_wrong_facts(record, probe, model), None) or probe.split_faults()
    tolerance = tolerance_of(model, unit_loss(record))
    return Verification("does not hold", wrong, tolerance=tolerance) if wrong else None


def begun(folder: Path, record: SealedRecord, probe: Probe, model: nn.Module, source: str | None) -> Verification:
    """Return what a verification begins with: tolerance, margin, model and split, and what is not as certified.

    Raises:
        ProbeError: If the probe's tokens do not fit the model's vocabulary, or its sequences the context.
    """
    opened, tolerance = opened_words(model, source), tolerance_of(model, unit_loss(record))
    other = not_as_certified(folder, record, probe, model)
    if other is not None:
        return replace(other, model=opened)
    margin = max(record.margin_nats, tolerance)
    return Verification("holds", "", tolerance=tolerance, margin=margin, model=opened, split=split_words(record))


def refused(*found: OwnText | Replay | None) -> str | None:
    """Return why the first of these does not hold, or ``None``."""
    return next((each.reason for each in found if each is not None and not each.holds), None)


def other_model(said: ModelRecord, model: nn.Module) -> str | None:
    """Say why a model is not the one that was certified, or ``None``: by its tensors and by its configuration."""
    certified, tensors = said.configuration, tensors_sha256(model)
    if certified is None:  # a record of old, whose fingerprint is over the tensors alone
        return None if tensors == said.fingerprint else NOT_THE_MODEL
    other = other_configuration(certified, configuration(model))
    if over_both(tensors, certified) != said.fingerprint:
        also = f" (its {other})" if other else ""
        return f"The model's tensors or configuration are not those that were certified{also}."
    return f"The model computes something else with the certified tensors: its {other}." if other else None


def blocks_of(record: SealedRecord, model: nn.Module) -> tuple[Block, ...]:
    """Return the blocks of a model that a record is about: those of the list that it names, if there is one."""
    said = getattr(record, "blocks", ())
    try:
        return find_blocks(model, said[0].name.rpartition(".")[0] if said else None)
    except UnsupportedModelError:  # whoever compares names says so
        return find_blocks(model)


def _wrong_facts(record: SealedRecord, probe: Probe, model: nn.Module) -> Iterator[str]:
    """Yield, in words, what the record says of its probe or its model that is not so."""
    found = probe.record()
    facts: list[tuple[str, object, object]] = [
        (f"probe.{key}", getattr(record.probe, key), getattr(found, key)) for key in type(found).model_fields
    ]
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    blocks = blocks_of(record, model)
    facts.append(("model.dtype", record.model.dtype, dtype))
    facts.append(("model.architecture", record.model.architecture, type(unwrapped(model)).__name__))
    facts.append(("model.parameters", record.model.parameters, parameter_count(model)))
    facts.append(("model.blocks", record.model.blocks, len(blocks)))
    for name, recorded, actual in facts:
        if recorded != actual:
            yield f"{name}: {recorded} was certified, {actual} was found."
    for said, block in zip(getattr(record, "blocks", ()), blocks, strict=False):
        if said.name != block.name:
            yield f"Block {block.index}: {said.name} was certified, {block.name} was found."


def split_words(record: SealedRecord) -> str:
    """Say how the sequences of a probe were assigned to its parts, after `not_as_certified` found no fault in it."""
    probe = record.probe
    drawn = probe.fit_sequences + probe.select_sequences + probe.report_sequences
    if probe.pool_sequences is None:
        return (
            f"not rechecked: this certificate does not say what its {drawn} sequences were drawn from "
            "(it is older, or its probe was put together by hand)"
        )
    what, of = ("sequences", "the text") if probe.loss is None else ("examples", "the batches")
    unit = f"{probe.documents} documents" if probe.documents is not None else what
    return (
        f"rechecked: {drawn} {what} drawn from {probe.pool_sequences} of {of}, {unit} assigned to fit, select "
        f"and report by hashes of their content and seed {record.seed}"
    )


def opened_words(model: nn.Module, source: str | None) -> str:
    """Say which model was checked and where it was opened from."""
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return f"{type(unwrapped(model)).__name__}, {dtype}, {source if source is not None else 'as it was handed over'}"


def identity_words(record: SealedRecord) -> tuple[str, tuple[str, ...]]:
    """Say what of the model was found to be the certified one, and what of model and split was not looked at."""
    unknown = []
    probe: ProbeRecord | None = record.probe  # a check may have none
    if probe is not None and probe.pool_sequences is None:
        unknown.append(
            "how sequences were assigned to the parts (this certificate does not say what they are drawn from)"
        )
    if record.model.configuration is None:
        return "the model's tensors", (
            "the model's configuration (this certificate is older and does not have it)",
            *unknown,
        )
    return "the model's tensors, configuration and unsaved buffers", tuple(unknown)


def witness_bytes(model: nn.Module) -> int:
    """Return how large a witness of a model can be at most, so that nothing larger is read."""
    numbers = sum(p.numel() for p in model.parameters()) + 8 * sum(b.numel() for b in model.buffers())
    return HEADER_BYTES + _BYTES_PER_PARAMETER * numbers


def load_tensors(path: Path, most: int | None = None, entries: int | None = None) -> dict[str, Tensor]:
    """Read a safetensors file of the folder.

    Args:
        path: of the file.
        most: bytes that it may have.
        entries: that its header may have, if fewer than of a witness.

    Raises:
        CertificateError: If it is missing, damaged, no regular file, larger than ``most``, or holds complex numbers,
            NaN or Inf.
    """
    try:
        check_file(path, most)
        check_header(path, *([] if entries is None else [entries]))
        tensors = load_file(path)
    except (OSError, SafetensorError, ValueError, OverflowError, MemoryError, RuntimeError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise CertificateError(f"{path} is missing or damaged: {reason}.") from error
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise CertificateError(f"{path}: {clean(name[:80])} is of {tensor.dtype}, which no certificate holds.")
        if tensor.is_floating_point() and not all(
            bool(p.isfinite().all()) for p in torch.split(tensor.flatten(), _PIECE)
        ):
            raise CertificateError(f"{path}: {clean(name[:80])} holds NaN or Inf.")
    return tensors
