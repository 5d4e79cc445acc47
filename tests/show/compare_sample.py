"""A record of a comparison as it could have been found: block 4 negated, block 9 trained, block 12 of other code."""

from __future__ import annotations

from typing import Any

from peelwise.evidence.compare import conclusion
from peelwise.records.base import CostRecord, Interval, ModelRecord, ProbeRecord, StageCost, note
from peelwise.records.compare import (
    BlockChange,
    CompareLosses,
    CompareRecord,
    CompareSeries,
    EndChange,
    FirstDifference,
    TensorChange,
)

MARGIN = 0.0161


def interval(mean: float, half: float = 0.01) -> Interval:
    return Interval(
        mean=mean, low=mean - half, high=mean + half, standard_error=half / 2, sequences=17, method="student-t"
    )


NOTHING = interval(0.0, 0.0)


def _unchanged() -> dict[str, Any]:
    keys = ("repairs_nats", "breaks_nats", "path_from_first_nats", "path_from_last_nats")
    return {
        "kind_of_change": "unchanged",
        "same_weights": True,
        "same_code": True,
        "relative_distance": 0.0,
        "output_distance": 0.0,
        "interaction_nats": 0.0,
    } | dict.fromkeys(keys, NOTHING)


def _changed(kind: str, effect: float, **other: Any) -> dict[str, Any]:
    return _unchanged() | {
        "kind_of_change": kind,
        "same_weights": False,
        "relative_distance": 0.4,
        "output_distance": 0.7,
        "repairs_nats": interval(effect),
        "breaks_nats": interval(1.1 * effect),
        "path_from_first_nats": interval(0.9 * effect),
        "path_from_last_nats": interval(effect),
        "interaction_nats": -0.05 * effect,
        **other,
    }


def _block(index: int) -> BlockChange:
    said = {
        4: _changed("sign", 0.8213, tensors=_tensors()),
        9: _changed("other", -0.1034, relative_distance=0.021),
        12: _changed("config-or-code", 0.0031, same_weights=True, same_code=False, relative_distance=0.0),
    }
    return BlockChange(index=index, name=f"model.layers.{index}", **said.get(index, _unchanged()))


def _tensors() -> tuple[TensorChange, ...]:
    return (
        TensorChange(
            name="self_attn.o_proj.weight", kind_of_change="sign", relative_distance=2.0, repairs_nats=interval(0.31)
        ),
        TensorChange(
            name="mlp.down_proj.weight", kind_of_change="sign", relative_distance=2.0, repairs_nats=interval(0.52)
        ),
        TensorChange(name="mlp.up_proj.weight", kind_of_change="unchanged", relative_distance=0.0),
    )


def _model(name: str) -> ModelRecord:
    return ModelRecord(
        name=name,
        fingerprint="0" * 64,
        parameters=134_515_008,
        blocks=16,
        architecture="LlamaForCausalLM",
        dtype="float32",
    )


def record(old: str = "base", new: str = "tuned <b>", **changes: Any) -> CompareRecord:
    blocks = tuple(map(_block, range(16)))
    ends = tuple(EndChange(unit=unit, **_unchanged()) for unit in ("embedding", "norm", "head"))
    loss = CompareLosses(old=3.2154, new=3.9301, damage=interval(0.7147, 0.09), interaction=-0.0063)
    probe = ProbeRecord(
        fingerprint="1" * 64,
        source="prose",
        sequence_length=128,
        fit_tokens=3200,
        select_tokens=896,
        report_tokens=2176,
        fit_sequences=25,
        select_sequences=7,
        report_sequences=17,
        in_distribution=False,
    )
    made = CompareRecord(
        created="2026-11-26T10:00:00+00:00",
        conclusion=conclusion(loss, blocks, ends, MARGIN),
        complete=True,
        margin_nats=MARGIN,
        informative=None,
        model=_model(new),
        old=_model(old),
        probe=probe,
        loss=loss,
        first_difference=FirstDifference(unit="block", block=4, cause="weights", output_distance=0.7),
        blocks=blocks,
        ends=ends,
        cost=CostRecord(
            forward_equivalents=21.0,
            wall_seconds=93.0,
            peak_bytes=2**31,
            stages=(StageCost(name="repairs", wall_seconds=12.0, forward_equivalents=4.0),),
        ),
        notes=(note("shared-tensors", count=2),),
        settings={"budget_seconds": 300.0, "layers_of": 3},
        seed=0,
        versions={"python": "3.11"},
    )
    return made.model_copy(update=changes)


def series() -> CompareSeries:
    return CompareSeries(complete=True, pairs=(record("step-100", "step-200"), record("step-200", "step-300")))
