"""What a comparison of a quantised model with its full-precision parent found. Plain numbers, no torch.

Losses are in nats per token on the report part. Errors of layers are parts of the mean squared output of the parent's
layer.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from peelwise.records.allocation import AllocationRecord
from peelwise.records.base import (
    SCHEMA_VERSION,
    CostRecord,
    Interval,
    ModelRecord,
    Note,
    ProbeRecord,
    Record,
    SplitRecord,
)


class LayerCheck(Record):
    """One linear layer: its output error against the parent's, for the parent's inputs.

    ``split`` is ``None`` where the budget ended before it was solved; ``error`` is what its parts add up to.
    ``rounded`` is the error of rounding the parent's weights to nearest with the format's own rule, ``flipped`` the
    share of codes that the best weights found have otherwise, and ``damping`` that of the sums they were found in, in
    units of their mean diagonal. Errors are on the report part, so what is recoverable at the same bit width can be a
    little below 0. ``codes`` is false where none are looked for: the layer's layout is none of our formats, or it is an
    expert that no token reaches.
    ``inputs`` is the error that rounding its inputs adds, with the weights as they are, in the units of ``error``.
    ``fine_tune`` is how much a fine-tune changed the layer's output, in the units of ``error``, if a base was given.
    ``predicted`` is what its weights cost, nats per token to second order: half of the output error weighed with the
    squared gradient of the parent's loss. ``share`` is its part of the sum over all layers.
    """

    name: str
    block: int
    format: str
    bits_per_weight: float
    error: float
    rounded: float | None = None
    flipped: float | None = None
    damping: float | None = None
    split: SplitRecord | None = None
    codes: bool = True
    fine_tune: float | None = None
    inputs: float | None = None
    predicted: float | None = None
    share: float | None = None
    parameter: str | None = None  # of an expert, the one that holds the matrices of all


class FineTunedBlock(Record):
    """What the fine-tuned model loses if one block alone gets the quantised weights.

    ``noise`` is the mean over its layers of the quantisation error in units of what the fine-tune changed.
    """

    index: int
    lost: Interval
    noise: float | None = None


class FineTuneRecord(Record):
    """How much of a fine-tune the quantised model keeps: ``survives`` is ``kept / gained``, with ``low`` and ``high``.

    They are ``None`` where the fine-tune is not shown to gain anything on this text.
    """

    base: ModelRecord
    loss: float
    gained: Interval
    kept: Interval
    survives: float | None = None
    low: float | None = None
    high: float | None = None
    blocks: tuple[FineTunedBlock, ...] = ()


class QuantLosses(Record):
    """The three losses and their paired differences.

    ``best`` is the quantised model with the best weights found inside its formats. ``left`` is the gain from the
    present codes to those, ``price`` what they are still above the parent, ``damage`` both together. ``split`` adds up
    to ``quantised``. ``kept`` is false if the better weights did not lower the loss on select, so that ``best`` is the
    model as it stands.

    Where inputs of layers are quantised when the model runs, all of this is with floating-point inputs, ``as_run`` is
    the loss with quantised ones, and ``activations`` what that costs: a fourth part, all four adding up to ``as_run``.
    """

    parent: float
    quantised: float
    as_run: float | None = None
    activations: Interval | None = None
    best: float
    damage: Interval
    left: Interval
    price: Interval
    split: SplitRecord
    kept: bool


class QuantcheckConclusion(Record):
    """What follows from the losses: is there damage, and do other codes of the same formats win some of it back?"""

    case: Literal["no-damage", "recoverable", "none-found"]


class QuantcheckRecord(Record):
    """Everything that one comparison found."""

    schema_version: int = Field(default=SCHEMA_VERSION, alias="schema")
    kind: Literal["quantcheck"] = "quantcheck"
    created: str
    conclusion: QuantcheckConclusion
    complete: bool
    quantised: ModelRecord
    parent: ModelRecord
    probe: ProbeRecord
    loss: QuantLosses
    layers: tuple[LayerCheck, ...]
    fine_tune: FineTuneRecord | None = None
    activations: str | None = None  # formats of the layers' inputs, where these are quantised when the model runs
    allocation: AllocationRecord | None = None  # a plan for the parent's layers, if one was asked for
    cost: CostRecord
    notes: tuple[Note, ...] = ()
    settings: dict[str, bool | int | float | str | None]
    seed: int
    versions: dict[str, str]

    @property
    def model(self) -> ModelRecord:
        """The model that the record is about: the quantised one."""
        return self.quantised

    def to_json(self) -> str:
        """Return the record as indented JSON."""
        return self.model_dump_json(by_alias=True, indent=2)
