"""Records as an audit would write them: a whole one, one stopped early, one with hostile strings."""

from __future__ import annotations

import itertools
import math

from peelwise.records.audit import AuditRecord, BlockRecord, HeadRecord, LossRecord, MatrixRecord, RoundRecord
from peelwise.records.base import (
    Colour,
    CostRecord,
    Interval,
    ModelRecord,
    Note,
    ProbeRecord,
    SplitRecord,
    StageCost,
    WitnessRecord,
    note,
)
from peelwise.records.codes import Reason

MATRICES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
HOSTILE = "<script>alert('x')</script> & \"quotes\" $x_{ [red]b[/red] \x1b[31m \u202e end"


def interval(mean: float, half: float) -> Interval:
    return Interval(
        mean=mean,
        low=mean - half,
        high=mean + half,
        standard_error=half / 2,
        sequences=48,
        method="student-t",
    )


def _verdict(index: int) -> tuple[Colour, Reason]:
    if index == 15:
        return "red", "above-margin"
    if index in (12, 13):
        return "yellow", "foreign-text"
    if index in (0, 5, 22):
        return "grey", "more-tokens"
    return "green", "nothing-above-margin"


def block(index: int, *, low_bit: bool = False) -> BlockRecord:
    colour, reason = _verdict(index)
    wobble = math.sin(3.1 * index) / 2
    alone = {"red": 0.0612, "yellow": 0.0334, "green": 0.0085, "grey": 0.0171}[colour] + 0.002 * wobble
    unique = {"red": 0.0213, "yellow": 0.0042, "green": 0.0012, "grey": 0.0030}[colour] + 0.001 * wobble
    unique = -0.0121 if index == 14 else unique
    shares = [1.5 + math.sin(index + 2.2 * place) for place in range(len(MATRICES))]
    matrices = tuple(
        MatrixRecord(name=name, share=part / sum(shares), damping=0.1, step_weight=1.0)
        for name, part in zip(MATRICES, shares, strict=True)
    )
    energy = 8.0 if index == 0 else (0.31 * math.exp(-index / 18) + (0.62 if index == 15 else 0.0))
    return BlockRecord(
        index=index,
        name=f"model.layers.{index}",
        verdict=colour,
        reason_code=reason,
        recoverable_nats=interval(alone, 0.012 if colour == "grey" else 0.0038),
        unique_nats=interval(unique, 0.011 if colour == "grey" else 0.0038),
        rounds=4,
        energy=energy,
        held_out_energy=energy * 0.62,
        natural_energy=energy * 1.3,
        gradient_norm=0.4 + 0.3 * math.cos(index / 4),
        tokens_needed=96_000 if colour == "grey" else None,
        matrices=matrices,
        split=SplitRecord(irreducible=0.02, price_of_precision=0.013, left_on_the_table=0.004 + 0.0002 * index)
        if low_bit
        else None,
    )


def _stages() -> tuple[StageCost, ...]:
    return (
        StageCost(name="losses", wall_seconds=9.8, forward_equivalents=1.0),
        StageCost(name="solo-rounds", wall_seconds=141.0, forward_equivalents=22.4),
        StageCost(name="joint-rounds", wall_seconds=62.5, forward_equivalents=11.3),
        StageCost(name="leave-one-out", wall_seconds=98.2, forward_equivalents=17.6),
        StageCost(name="shuffled-control", wall_seconds=44.0, forward_equivalents=8.1),
    )


def _rounds() -> tuple[RoundRecord, ...]:
    losses = (2.8790, 2.8021, 2.7702, 2.7561, 2.7490)
    return tuple(
        RoundRecord(
            direction="input-whitened" if place < 2 else "two-sided",
            step=0.08 / (place + 1),
            output_change=0.031 / (place + 1),
            select_before=before,
            select_after=after,
        )
        for place, (before, after) in enumerate(itertools.pairwise(losses))
    )


def _probe() -> ProbeRecord:
    return ProbeRecord(
        fingerprint="b7" * 32,
        source="wikitext-2, training split",
        sequence_length=256,
        fit_tokens=24_576,
        select_tokens=6_144,
        report_tokens=12_288,
        fit_sequences=96,
        select_sequences=24,
        report_sequences=48,
        in_distribution=True,
    )


def whole(blocks: int = 30, *, low_bit: bool = False) -> AuditRecord:
    """A finished audit: block 15 certified, block 14 negative when left out, three undecided."""
    return AuditRecord(
        created="2026-03-14T09:26:53Z",
        complete=True,
        margin_nats=0.0144,
        informative=True,
        model=ModelRecord(
            name="HuggingFaceTB/SmolLM2-135M",
            fingerprint="4f" * 32,
            parameters=134_515_008,
            blocks=blocks,
            architecture="LlamaForCausalLM",
            dtype="bfloat16",
            source="/models/smollm2-135m",
        ),
        probe=_probe(),
        loss=LossRecord(
            current=2.8741,
            composed=2.7433,
            head_control=2.8503,
            shuffled=2.8790,
            untrained=9.9132,
            untrained_start=10.8214,
            composed_gain=interval(0.1308, 0.0061),
            shuffled_gain=interval(-0.0049, 0.0052),
        ),
        blocks=tuple(block(index, low_bit=low_bit) for index in range(blocks)),
        head=HeadRecord(
            current=2.8611,
            achieved=2.8322,
            relaxed=2.8309,
            penalty=0.0021,
            steps=34,
            recoverable_nats=interval(0.0238, 0.0031),
        ),
        rounds=_rounds(),
        cost=CostRecord(forward_equivalents=60.4, wall_seconds=355.5, peak_bytes=1_932_735_283, stages=_stages()),
        witness=WitnessRecord(file="witness.safetensors", sha256="9c" * 32, bytes=212_336_640, dtype="bfloat16"),
        notes=(note("more-damping", layer="model.layers.0.mlp.up_proj", size=576, damping=0.1, used=1.0),),
        settings={
            "budget_seconds": 600,
            "damping": 0.1,
            "rounds": 4,
            "in_distribution": True,
            "device": "cpu",
            "checkpoint": None,
        },
        seed=0,
        versions={"peelwise": "0.1.0", "torch": "2.13.0", "python": "3.12.3"},
    )


def partial() -> AuditRecord:
    """An audit whose budget ended after two blocks: no unique values, no controls, no head, no witness."""
    record = whole(6)
    blocks = tuple(
        one.model_copy(update={"unique_nats": None})
        if one.index < 2
        else BlockRecord(index=one.index, name=one.name, verdict="grey", reason_code="not-refined")
        for one in record.blocks
    )
    return record.model_copy(
        update={
            "complete": False,
            "informative": False,
            "blocks": blocks,
            "loss": LossRecord(current=2.8741),
            "head": None,
            "rounds": (),
            "witness": None,
            "notes": (),
        }
    )


def unmeasured() -> AuditRecord:
    """An audit stopped before its first block."""
    record = partial()
    blocks = tuple(
        BlockRecord(index=one.index, name=one.name, verdict="grey", reason_code="not-refined") for one in record.blocks
    )
    return record.model_copy(update={"blocks": blocks})


def hostile() -> AuditRecord:
    """A record whose every free string tries to break out of the page or the terminal."""
    record = whole(3)
    matrices = (MatrixRecord(name=HOSTILE, share=0.7), MatrixRecord(name="名前.$\\frac", share=0.3))
    blocks = tuple(
        one.model_copy(update={"name": HOSTILE, "reason_code": None, "matrices": matrices}) for one in record.blocks
    )
    return record.model_copy(
        update={
            "conclusion": HOSTILE,
            "created": HOSTILE,
            "blocks": blocks,
            "model": record.model.model_copy(
                update=dict.fromkeys(("name", "fingerprint", "architecture", "dtype", "source"), HOSTILE)
            ),
            "probe": record.probe.model_copy(update={"fingerprint": HOSTILE, "source": HOSTILE}),
            "rounds": tuple(one.model_copy(update={"direction": HOSTILE}) for one in record.rounds),
            "cost": record.cost.model_copy(
                update={"stages": (StageCost(name=HOSTILE, wall_seconds=1, forward_equivalents=1),)}
            ),
            "witness": WitnessRecord(file=HOSTILE, sha256=HOSTILE, bytes=1, dtype=HOSTILE),
            "notes": (HOSTILE, Note(code=HOSTILE, values={HOSTILE: HOSTILE}), note("map-unfinished", map=HOSTILE)),
            "settings": {HOSTILE: HOSTILE},
            "versions": {HOSTILE: HOSTILE},
        }
    )
