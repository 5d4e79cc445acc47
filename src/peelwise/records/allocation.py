"""Which layers of a model get how many bits, and what that costs. Plain numbers, no torch.

Losses are in nats per token on the report part unless a name says otherwise.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from peelwise.records.base import SCHEMA_VERSION, CostRecord, Interval, ModelRecord, Note, ProbeRecord, Record


class AllocatedLayer(Record):
    """One linear layer: the format that it gets, and what each format is predicted to cost there.

    ``group`` is the same for layers that share their input, which decide together. ``predicted`` is by format, nats per
    token: half of the squared output error weighed with the squared gradient, on fit, times what measuring the whole
    block says about such predictions. ``share`` is this layer's part of the predicted damage of the plan. An expert has
    the ``parameter`` that holds the matrices of all, which decide together. ``fit_tokens`` are those that it was given.
    """

    name: str
    parameter: str | None = None
    block: int
    group: int
    format: str
    bits_per_weight: float
    weights: int
    predicted: dict[str, float]
    share: float
    fit_tokens: int | None = None


class CurvePoint(Record):
    """A model in low bits: what it takes and what it costs; ``kind`` says how its formats were chosen."""

    kind: Literal["uniform", "allocated"]
    name: str
    bits_per_weight: float
    loss: float
    damage: Interval


class Interaction(Record):
    """Damages of single blocks on select, each with the rest in full precision, against that of all together.

    Those of a block whose layers have several formats are predictions, corrected by what these cost when measured.
    """

    sum_of_single: float
    joint: float


class AllocationRecord(Record):
    """Everything that one allocation found."""

    schema_version: int = Field(default=SCHEMA_VERSION, alias="schema")
    kind: Literal["allocation"] = "allocation"
    created: str
    model: ModelRecord
    probe: ProbeRecord
    budget_bits: float
    bits_per_weight: float
    chosen: str
    formats: tuple[str, ...]
    parent_loss: float
    damage: Interval
    layers: tuple[AllocatedLayer, ...]
    curve: tuple[CurvePoint, ...]
    better_than: dict[str, Interval]
    interaction: Interaction
    cost: CostRecord
    notes: tuple[Note, ...] = ()
    settings: dict[str, bool | int | float | str | None]
    seed: int
    versions: dict[str, str]

    @property
    def stored(self) -> tuple[AllocatedLayer, ...]:
        """The layers, with all experts of one parameter as one layer of its name: damages, shares and tokens add up."""
        of_name: dict[str, list[AllocatedLayer]] = {}
        for layer in self.layers:
            of_name.setdefault(layer.parameter or layer.name, []).append(layer)
        return tuple(_one(name, layers) if layers[0].parameter else layers[0] for name, layers in of_name.items())

    @property
    def plan(self) -> dict[str, str]:
        """The format of every layer, by name."""
        return {layer.name: layer.format for layer in self.layers}

    def to_json(self) -> str:
        """Return the record as indented JSON."""
        return self.model_dump_json(by_alias=True, indent=2)


def _one(parameter: str, experts: list[AllocatedLayer]) -> AllocatedLayer:
    first = experts[0]
    return first.model_copy(
        update={
            "name": parameter,
            "weights": sum(each.weights for each in experts),
            "predicted": {form: sum(each.predicted[form] for each in experts) for form in first.predicted},
            "share": sum(each.share for each in experts),
            "fit_tokens": sum(each.fit_tokens or 0 for each in experts),
        }
    )
