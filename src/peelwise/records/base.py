"""Frozen records of plain numbers: what an audit found, as it stands in ``certificate.json``.

The names of the fields are the keys of the file, and others rely on them: add, do not rename.
All losses are in nats per token (of batches: in the probe's unit) over the ``report`` part of the probe unless a name
says otherwise.
"""

from __future__ import annotations

import hashlib
import json
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from peelwise.records.codes import NoteCode

SCHEMA_VERSION = 1
NATS = "nats per token"  # what losses are in, unless the probe has a loss of its own

Colour = Literal["red", "yellow", "green", "grey", "frozen"]  # the last is none: the block is not asked about
Value = int | float | str


class Record(BaseModel):
    """Base of all records: frozen; unknown keys of a newer writer are kept."""

    model_config = ConfigDict(frozen=True, extra="allow", populate_by_name=True, allow_inf_nan=False)


class Note(Record):
    """A remark: its code and the numbers and names that belong to it.

    ======================  ================================================================================
    ``stopped``             by the user
    ``budget-ended``        before everything was done
    ``low-bit``             ``layers`` that hold codes, of which ``formats``
    ``no-head``             none was found
    ``logits-changed``      behind the head, so that it cannot be re-fitted
    ``not-initialised``     the model cannot be initialised again, so there is no untrained control
    ``few-fit-tokens``      ``tokens`` for the ``inputs`` of ``layer``, ``rank`` of its sum; ``more`` like it
    ``few-expert-tokens``   so many ``matrices`` ``of`` all experts of ``block`` saw fewer fit tokens than they have
                            inputs, ``without`` of them none; ``more`` like it
    ``more-damping``        ``used`` instead of ``damping`` for the ``size`` of ``layer``; ``more`` like it
    ``dense-references``    of low-bit layers that hold ``formats``
    ``no-head-fit``         the head of a peel cannot be re-fitted
    ``head-steps``          every head of a peel got so many ``steps``
    ``map-unfinished``      the budget ended inside ``map``
    ``few-heads``           only so many ``heads`` were fitted, as the vocabulary is large
    ``other-tensors``       ``count`` tensors besides the quantised ones differ, such as ``name``
    ``shared-tensors``      ``count`` parameters that both models of a comparison hold in common
    ``left-out``            ``count`` parameters of blocks with a ``share`` of their numbers, such as ``names``
    ``no-text``             signals of weights alone
    ``no-gradients``        the model cannot be differentiated, so there are no signals of a backward pass
    ``few-blocks``          with ``blocks`` there is no depth to compare with
    ``frozen-layers``       ``layers`` that are not asked about, with a ``share`` of the blocks' numbers; ``blocks``
                            that have no others
    ``untied``              the configuration says that ``embedding`` and ``head`` share a weight, and they do not;
                            ``same``: 1 if their values are equal all the same
    ``checkpoint``          tensors of ``folder`` ``compared`` with the model: so many ``differ``, such as ``names``;
                            ``only_model`` and ``only_file`` are in one of them alone
    ``fake-quant-off``      ``off`` ``of`` the fake quantisers do nothing, such as ``name``
    ``read-as-numbers``     ``layers`` of a folder by ``method`` that no format has the layout of; ``codes``: the others
    ``adapters-on-codes``   ``layers`` of a parent's base, which has adapters beside it, hold codes of few bits
    ``autocast``            the model's own forward computes in ``dtype``
    ``no-curvature``        matrices of the curvature of all layers would not fit into memory
    ``smaller-groups``      no format was given; groups of ``group`` are the largest usual ones that divide all layers
    ``scales-per-channel``  no format was given; no usual group divides all layers
    ``router-collapsed``    the router of ``block`` gives a ``share`` of all tokens to ``experts`` ``of`` so many
    ``dead-experts``        ``count`` ``of`` the experts of ``block`` were given no token, ``even`` each of an even load
    ``copied-experts``      ``pairs`` of experts of ``block`` have the same weights
    ``factor-first``        ``factor`` on what ``part`` of ``block`` writes, in place before the first round of an audit
    ``own-loss``            the probe is of batches with a loss of their own, so what is of next tokens is left out
    ``encoder-left-out``    ``names`` of an encoder-decoder's blocks that are not asked about
    ``stacks-left-out``     ``names`` of lists of blocks that run beside ``stack``, and are not asked about
    ``resumed``             some was measured by an earlier call that did not finish
    ======================  ================================================================================
    """

    code: str  # a NoteCode, or one of a newer writer
    values: dict[str, Value] = {}


def note(code: NoteCode, **values: Value) -> Note:
    """Return a remark with what belongs to it."""
    return Note(code=code, values=values)


class Interval(Record):
    """A mean of paired differences with its 95 % interval, in the units of the differences.

    An audit pairs by sequence (nats per token), a YES bound by sample (its loss); ``sequences`` is how many of
    these units there are. ``skewness`` is that of their residuals as far as the interval allows for it.
    """

    mean: float
    low: float
    high: float
    standard_error: float
    sequences: int
    skewness: float = 0.0
    method: Literal["student-t", "skewness-corrected-t"]


class SplitRecord(Record):
    """Three parts that add up to what there is now: an error, or a loss.

    Of a loss, ``irreducible`` is the lowest that a witness reached without the format; ``price_of_precision``, the
    **quantisation gap (upper bound)**, what the best one found inside it is above that; ``left_on_the_table`` what it
    gains, certified: what is **recoverable at the same bit width**.
    """

    irreducible: float
    price_of_precision: float
    left_on_the_table: float


class StageCost(Record):
    """Wall time and work of one stage of the audit; ``name`` is a `codes.Stage`, in records of old a sentence."""

    name: str
    wall_seconds: float
    forward_equivalents: float


class CostRecord(Record):
    """The whole cost; one forward equivalent is one forward pass of the model over all probe tokens."""

    forward_equivalents: float
    wall_seconds: float
    peak_bytes: int
    stages: tuple[StageCost, ...] = ()


class ModelRecord(Record):
    """The audited model; ``fingerprint`` is SHA-256 over names, shapes, dtypes and bytes of its tensors, and
    ``configuration``.

    ``configuration`` is what changes the function besides the saved tensors: rotary base, epsilon, activation and the
    like, and figures of the buffers that are not saved. ``None`` in records of old, whose fingerprint is over the
    tensors alone. ``as_stored`` says that the codes of a GGUF file were audited, not the floating-point weights they
    stand for.
    """

    name: str
    fingerprint: str
    parameters: int
    blocks: int
    architecture: str
    dtype: str
    source: str | None = None
    as_stored: bool = False
    configuration: dict[str, bool | int | float | str | None] | None = None


class ProbeRecord(Record):
    """The text that was used, split by sequence; ``fingerprint`` is SHA-256 over token ids and splits.

    The fields ``pool_..`` say what the sequences were drawn from, so that their split can be computed
    again (`probe.split`); ``None`` in records of old. ``documents`` is how many were split, where that was by document.

    Of batches (`Probe.from_batches`) an example counts as one sequence of one token. All losses are then in ``unit``
    per example, and ``loss`` says where they come from: ``"labels"``, the cross-entropy of the batches' labels, or
    ``"given"``, a function that no file holds.
    """

    fingerprint: str
    source: str
    sequence_length: int
    fit_tokens: int
    select_tokens: int
    report_tokens: int
    fit_sequences: int
    select_sequences: int
    report_sequences: int
    in_distribution: bool
    pool_sequences: int | None = None
    pool_sha256: str | None = None
    pool_left_out: int | None = None
    documents: int | None = None
    unit: str = NATS
    loss: Literal["labels", "given"] | None = None


class WitnessRecord(Record):
    """The file of replacement weights that belongs to this record."""

    file: str
    sha256: str
    bytes: int
    dtype: str


class SealedRecord(Record):
    """What every certificate says, whatever was measured: about what, how, at which cost, and its seal.

    ``complete`` is false if the budget or the user stopped the work early. ``informative`` is ``None`` until the
    null controls have been run. ``conclusion`` and ``notes`` are data and codes; `show` makes the sentences. Records
    of old hold sentences in their place, which count for their seal and for nothing else. ``digest`` is the SHA-256
    of the rest, so that a changed number shows; it protects against accidents, not against whoever recomputes it.
    """

    schema_version: int = Field(default=SCHEMA_VERSION, alias="schema")
    kind: str
    created: str
    conclusion: Record | str | None = None
    complete: bool
    margin_nats: float
    informative: bool | None
    model: ModelRecord
    probe: ProbeRecord
    cost: CostRecord
    witness: WitnessRecord | None = None
    notes: tuple[Note | str, ...] = ()
    settings: dict[str, bool | int | float | str | None]
    seed: int
    versions: dict[str, str]
    digest: str | None = None

    def to_json(self) -> str:
        """Return the record as indented JSON, with the key ``schema`` that readers look for."""
        return self.model_dump_json(by_alias=True, indent=2)

    def computed_digest(self) -> str:
        """Return the SHA-256 of the record without its digest, over JSON with sorted keys.

        Fields at their defaults do not count, so a field that a later version adds leaves earlier seals whole.
        """
        plain = self.model_dump(mode="json", by_alias=True, exclude={"digest"}, exclude_defaults=True)
        plain |= {"schema": self.schema_version, "kind": self.kind}  # their defaults change with the version
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()

    def sealed(self) -> Self:
        """Return the record with its digest."""
        return self.model_copy(update={"digest": self.computed_digest()})


def unit_of(record: SealedRecord) -> str:
    """Return what the losses of a record are in."""
    probe: ProbeRecord | None = record.probe  # a check may have none
    return NATS if probe is None else probe.unit
