"""A record of an anatomy as it could have been found: block 3 hurts, others tell something of one kind of matrix."""

from __future__ import annotations

from peelwise.evidence.anatomy import better_without, correlations
from peelwise.records.anatomy import (
    ABLATIONS,
    AnatomyRecord,
    Bent,
    BestScale,
    BlockAnatomy,
    Explained,
    Predictability,
    Recovery,
    Retrained,
)
from peelwise.records.base import CostRecord, Interval, StageCost, note

from .compare_sample import record as compared

COSTS = (2.1, 0.4, 0.3, -0.25, 0.02, 0.6, 0.1, 0.9)


def interval(mean: float, half: float = 0.01) -> Interval:
    return Interval(
        mean=mean, low=mean - half, high=mean + half, standard_error=half / 2, sequences=30, method="student-t"
    )


def _block(index: int, cost: float) -> BlockAnatomy:
    return BlockAnatomy(
        index=index,
        name=f"model.layers.{index}",
        ablation={way: interval(cost * (1 - 0.1 * place)) for place, way in enumerate(ABLATIONS)},
        predicted=interval(cost),
        bent=(
            Bent(kind="scale-down", strengths=(0.9, 0.8), costs=(interval(0.001, 0.001),), tolerated=0.9),
            Bent(kind="signs", strengths=(0.001, 0.003), costs=(interval(0.3),), tolerated=None),
            Bent(kind="low-rank", strengths=(0.1, 0.25), costs=(interval(0.0), interval(0.3)), tolerated=0.1),
        ),
        best_scale=BestScale(factor=0.925, gain=interval(0.0123)),
        recovery=Recovery(
            damage=interval(0.5),
            left=interval(0.3),
            share=0.4,
            retrained=Retrained(
                steps=None if index == 2 else 35,
                best_step=20,
                tokens=20_000,
                most_steps=100,
                left=interval(0.2),
                share=0.6,
            ),
        ),
        signals={"stable_rank.mlp.up_proj": cost * 3, "score": 1.0 * index},
    )


def record(*, measured: bool = True, complete: bool = True) -> AnatomyRecord:
    """Return the record; without ``measured`` the one of a budget that ended at once."""
    other = compared()
    blocks = [
        _block(i, cost) if measured else BlockAnatomy(index=i, name=f"model.layers.{i}") for i, cost in enumerate(COSTS)
    ]
    told = Predictability(
        part="mlp.gate_proj",
        explained=Explained(mean=0.5, neighbours=0.6, ridge=0.7),
        independent=Explained(mean=-0.14, neighbours=-0.6, ridge=0.0),
        neighbours_shuffled=(0.5, 0.45, 0.55),
        deltas=-0.3,
        deltas_shuffled=(-0.5, -0.53, -0.47),
        deltas_independent=-0.5,
    )
    untold = told.model_copy(
        update={"part": "self_attn.q_proj", "explained": Explained(mean=-0.14, neighbours=-0.6, ridge=0.001)}
    )
    return AnatomyRecord(
        created="2026-11-27T12:00:00+00:00",
        complete=complete and measured,
        margin_nats=0.0161,
        model=other.model,
        probe=other.probe,
        loss=3.2,
        blocks=tuple(blocks),
        predictability=(told, untold) if measured else (),
        better_without=better_without(blocks),
        correlations=correlations(blocks),
        cost=CostRecord(
            forward_equivalents=90.0,
            wall_seconds=61.0,
            peak_bytes=2**30,
            stages=(StageCost(name="bending", wall_seconds=40.0, forward_equivalents=60.0),),
        ),
        notes=() if measured else (note("budget-ended"),),
        settings={"budget_seconds": 60.0},
        seed=0,
        versions={"torch": "2"},
    )
