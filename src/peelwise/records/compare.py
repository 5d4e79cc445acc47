"""What a comparison of two models of one architecture found. Plain numbers, no torch.

All losses are in nats per token on the report part of the probe. **Signs**: positive always speaks against NEW.
``repairs_nats`` is positive where putting OLD's block back lowers NEW's loss; ``breaks_nats`` is positive where NEW's
block raises OLD's loss; ``damage`` is positive where NEW has the higher loss.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from peelwise.records.base import SCHEMA_VERSION, Interval, ModelRecord, Record, SealedRecord, Value

# How a tensor of NEW came from that of OLD, or what is true of most changed weights of a unit.
KindOfChange = Literal[
    "unchanged",
    "rounding",  # OLD rounded to a floating-point `dtype`
    "zeroed",  # all that changed is zero now
    "copied",  # is that of `block` in OLD
    "duplicated",  # rows or columns of OLD, some of them several times
    "scale",  # `factor`, or factors by row or column
    "sign",  # scale by -1, or by signs
    "transposed",
    "permutation",  # of rows or columns, in groups of `group` (a head's size)
    "lattice",  # quantised: `steps` of even spacing, or `levels`, in groups of `group` along a row
    "truncated",  # NEW itself is of low `rank`
    "low-rank",  # NEW - OLD is of low `rank`
    "re-drawn",  # uncorrelated with OLD, and like independent random numbers
    "replaced",  # uncorrelated with OLD, but not random
    "noise",  # NEW - OLD is like independent random numbers
    "shifted",  # a constant was added
    "config-or-code",  # equal weights that compute something else
    "other",  # structured, such as training
]

Cause = Literal["weights", "config-or-code"]
Unit = Literal["embedding", "block", "norm", "head"]


class TensorChange(Record):
    """One tensor of a unit: ``relative_distance`` is ``|NEW - OLD| / |OLD|`` (Frobenius norms).

    ``repairs_nats`` is what putting this layer of OLD back into NEW repairs by itself; its weight and bias together.
    ``None`` where it was not measured: the block matters little, or the budget ended.
    """

    name: str
    kind_of_change: KindOfChange
    kind_values: dict[str, Value] = Field(default_factory=dict)
    relative_distance: float
    repairs_nats: Interval | None = None


class UnitChange(Record):
    """One part of the model: what its change costs, measured from both ends, and what kind of change it is.

    ``repairs_nats`` = loss(NEW) - loss(NEW with OLD's part); ``breaks_nats`` = loss(OLD with NEW's part) - loss(OLD).
    Both are zero, exactly, where the part computes the same in both models. ``path_from_first_nats`` and
    ``path_from_last_nats`` are the steps of two ways from NEW to OLD that put parts back one by one, beginning at the
    embedding or at the head: on each way the steps of all parts add up to the damage. ``interaction_nats`` is the mean
    of the two steps minus what the part repairs by itself. ``None``: not measured within the budget.

    ``relative_distance`` is that of all its weights, ``output_distance`` how far its output is from OLD's for the
    same inputs (NEW's), relative to what OLD's part adds to them. ``same_weights`` is exact; ``same_code`` says whether
    OLD's code and configuration compute the same with NEW's weights (``None``: cannot be tried). ``old_sha256`` is over
    OLD's tensors of the part, which are the witness of its repair (``None`` in records of old).
    """

    kind_of_change: KindOfChange
    kind_values: dict[str, Value] = Field(default_factory=dict)
    same_weights: bool
    same_code: bool | None = None
    relative_distance: float
    output_distance: float
    repairs_nats: Interval | None = None
    breaks_nats: Interval | None = None
    path_from_first_nats: Interval | None = None
    path_from_last_nats: Interval | None = None
    interaction_nats: float | None = None
    tensors: tuple[TensorChange, ...] = ()
    old_sha256: str | None = None


class BlockChange(UnitChange):
    """One block."""

    index: int
    name: str


class EndChange(UnitChange):
    """A part before or behind the blocks; ``norm`` is all that lies between the last block and the head."""

    unit: Unit


class FirstDifference(Record):
    """The first part, from the input on, that computes something else than in OLD, for the same input.

    ``cause`` is ``config-or-code`` where its weights are equal; ``block`` is ``None`` for the ends.
    """

    unit: Unit
    block: int | None = None
    cause: Cause
    output_distance: float


class CompareLosses(Record):
    """Losses of both models; ``damage`` = NEW - OLD, ``interaction`` is what all repairs do not add up to of it."""

    old: float
    new: float
    damage: Interval
    interaction: float | None = None


class CompareConclusion(Record):
    """What follows from the numbers.

    ``case``: ``identical`` models; ``same-function``: other weights, same loss to rounding; ``worse``, ``better`` or
    ``no-difference`` of NEW against OLD. ``hurt`` are blocks whose repair is above the margin, ``helped`` those whose
    return to OLD costs more than the margin (both adjusted for asking about many, Holm), largest effect first;
    ``hurt_ends`` are embedding, norm and head whose repair is above the margin, asked about likewise; ``changed`` all
    that are not as in OLD, in the order of what they repair; ``unexplained`` those whose code or configuration differs,
    whatever their weights do.
    """

    case: Literal["identical", "same-function", "worse", "better", "no-difference"]
    hurt: tuple[int, ...] = ()
    helped: tuple[int, ...] = ()
    changed: tuple[int, ...] = ()
    unexplained: tuple[int, ...] = ()
    hurt_ends: tuple[Unit, ...] = ()


class Mended(Record):
    """NEW with OLD's tensors of all parts that hurt put back together, on report.

    ``blocks`` and ``ends`` are those parts of ``hurt`` and ``hurt_ends`` whose tensors fit and whose code is the same;
    embedding and head go together where they are one tensor. ``gain`` is what they repair together.
    """

    blocks: tuple[int, ...]
    ends: tuple[Unit, ...] = ()
    loss: float
    gain: Interval


class CompareRecord(SealedRecord):
    """Everything that one comparison found; ``model`` is NEW, ``old`` OLD, whose tensors are the witness.

    ``mended`` is ``None`` where nothing hurt, or nothing that hurt can be put back as tensors.
    """

    kind: Literal["compare"] = "compare"
    conclusion: CompareConclusion
    old: ModelRecord
    loss: CompareLosses
    first_difference: FirstDifference | None
    blocks: tuple[BlockChange, ...]
    ends: tuple[EndChange, ...]
    mended: Mended | None = None


class CompareSeries(Record):
    """Comparisons of checkpoints of one run, each with the one before it."""

    schema_version: int = Field(default=SCHEMA_VERSION, alias="schema")
    kind: Literal["compare-series"] = "compare-series"
    complete: bool
    pairs: tuple[CompareRecord, ...]

    def to_json(self) -> str:
        """Return the series as indented JSON."""
        return self.model_dump_json(by_alias=True, indent=2)
