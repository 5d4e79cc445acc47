"""What quantising a model without training cost and saved. Plain numbers, no torch.

Losses are in nats per token on the report part, which nothing was fitted or chosen on.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from peelwise.records.base import SCHEMA_VERSION, CostRecord, Interval, ModelRecord, Note, ProbeRecord, Record


class QuantisedLayer(Record):
    """One linear layer and how its codes were found.

    ``steps`` is what each step came to: how much larger ``E|W x - W' z|^2`` is on report with its codes ``W'`` than
    with the parent's weights ``W``, in parts of ``E|W z|^2``, for inputs ``x`` in the parent and ``z`` in the model
    quantised up to this layer. It is negative where the codes make up for more than they lose. ``damping`` is that
    of error feedback, ``target_damping`` and ``target_share`` say how far the layer makes up for what those before it
    lost, and ``flipped`` is the share of codes other than those of rounding to nearest. Steps are measured on the first
    2,048 tokens of report, or all where it is shorter; an expert that is given none there has no steps. ``fit_tokens``
    are those of fit that a layer is given, and ``parameter`` is the one that holds the matrices of all experts.
    """

    name: str
    parameter: str | None = None
    block: int
    format: str
    bits_per_weight: float
    weights: int
    steps: dict[str, float]
    damping: float
    target_damping: float
    target_share: float
    flipped: float
    fit_tokens: int | None = None


class QuantisedBlock(Record):
    """Squared distance between the stations behind a block in both models, in parts of the variance there.

    On the same tokens as the steps of layers.
    """

    index: int
    error: float


class QuantiseLosses(Record):
    """The losses on report and their paired differences.

    ``rounded`` is the parent with all weights rounded to nearest, ``quantised`` with the codes found. ``damage`` is
    what the codes found cost, ``rounding_damage`` what rounding costs, ``recovered`` the difference.
    """

    parent: float
    rounded: float
    quantised: float
    damage: Interval
    rounding_damage: Interval
    recovered: Interval


class QuantiseConclusion(Record):
    """What follows from the losses: what is left of the parent, and whether that is better than rounding."""

    case: Literal["no-damage", "better-than-rounding", "no-better"]


class QuantiseRecord(Record):
    """Everything that was found while a model was quantised."""

    schema_version: int = Field(default=SCHEMA_VERSION, alias="schema")
    kind: Literal["quantise"] = "quantise"
    created: str
    conclusion: QuantiseConclusion
    model: ModelRecord
    probe: ProbeRecord
    format: str
    bits_per_weight: float
    loss: QuantiseLosses
    layers: tuple[QuantisedLayer, ...]
    blocks: tuple[QuantisedBlock, ...]
    skipped: tuple[str, ...] = ()
    cost: CostRecord
    notes: tuple[Note, ...] = ()
    settings: dict[str, bool | int | float | str | None]
    seed: int
    versions: dict[str, str]

    def to_json(self) -> str:
        """Return the record as indented JSON."""
        return self.model_dump_json(by_alias=True, indent=2)
