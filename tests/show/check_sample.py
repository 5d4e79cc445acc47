"""Records as a check would write them: one block that stands out, none, few blocks, no text, hostile strings."""

from __future__ import annotations

import math

from peelwise.records.base import Note, StageCost, note
from peelwise.records.check import BlockCheck, CheckRecord, GainWitness, MatrixCheck, SignalReason, UnlikeBlock
from show.sample import HOSTILE, MATRICES, interval, whole

NAMED = 15
REASONS = (
    SignalReason(signal="weight_rms", part="mlp.down_proj", value=0.0021, typical=0.07, deviation=-41.0),
    SignalReason(signal="gain_t", part="mlp", value=12.3, typical=0.0, deviation=12.3),
    SignalReason(signal="linear_cka", part="", value=0.41, typical=0.93, deviation=-9.2),
)


def checked(blocks: int = 30, *, named: tuple[int, ...] = (NAMED,), text: bool = True) -> CheckRecord:
    """Return a finished check in which the named blocks stand out; without text, weights alone."""
    base = whole(blocks)
    rows = tuple(_block(index, index in named, text=text) for index in range(blocks))
    scored = blocks >= 5
    return CheckRecord(
        created=base.created,
        model=base.model,
        probe=base.probe if text else None,
        margin_nats=0.0144,
        loss=2.8741 if text else None,
        composed_loss=1.5741 if text and named else None,
        composed_gain=interval(1.3, 0.2) if text and named else None,
        threshold=6.0,
        blocks=rows if scored else tuple(row.model_copy(update={"score": None}) for row in rows),
        matrices=tuple(
            MatrixCheck(name=f"{row.name}.{part}", block=row.index, part=part, signals={"weight_rms": 0.07})
            for row in rows
            for part in MATRICES
        ),
        unlike=tuple(UnlikeBlock(block=index, score=12.3, reasons=REASONS) for index in named) if scored else None,
        gain_witnesses=_witnesses(named[0]) if text and named else (),
        cost=base.cost.model_copy(
            update={"stages": (StageCost(name="weight-signals", wall_seconds=9.8, forward_equivalents=0.0),)}
        ),
        notes=(*([] if text else [note("no-text")]), *([] if scored else [note("few-blocks", blocks=blocks)])),
        settings={"signals": None, "most_witnesses": 3},
        seed=0,
        versions={"peelwise": "0.1.0"},
    )


def hostile_check() -> CheckRecord:
    """Return a record whose every free string tries to break out of the page or the terminal."""
    record = checked(6, named=(3,))
    reason = SignalReason(signal=HOSTILE, part=HOSTILE, value=1.0, typical=2.0, deviation=3.0)
    known = SignalReason(signal="weight_rms", part=HOSTILE, value=1.0, typical=None, deviation=1e30)
    return record.model_copy(
        update={
            "created": HOSTILE,
            "blocks": tuple(
                row.model_copy(
                    update={"name": HOSTILE, "signals": row.signals | {HOSTILE: 1.0, f"weight_rms.{HOSTILE}": 2.0}}
                )
                for row in record.blocks
            ),
            "matrices": (MatrixCheck(name=HOSTILE, block=0, part=HOSTILE, signals={HOSTILE: 1.0}),),
            "unlike": (
                UnlikeBlock(block=3, score=1e30, reasons=(reason, known)),
                UnlikeBlock(block=99, score=7.0, reasons=()),
            ),
            "gain_witnesses": tuple(
                one.model_copy(update={"part": HOSTILE, "layer": HOSTILE}) for one in record.gain_witnesses
            ),
            "model": record.model.model_copy(
                update=dict.fromkeys(("name", "fingerprint", "architecture", "dtype", "source"), HOSTILE)
            ),
            "notes": (HOSTILE, Note(code=HOSTILE, values={HOSTILE: HOSTILE})),
            "settings": {HOSTILE: HOSTILE},
            "versions": {HOSTILE: HOSTILE},
        }
    )


def _block(index: int, named: bool, *, text: bool) -> BlockCheck:
    wobble = math.sin(3.1 * index)
    signals = {f"weight_rms.{part}": 0.07 + 0.002 * wobble for part in MATRICES}
    signals |= {"gain_rms.input_layernorm": 1.0, "neuron_mismatch.mlp": 0.6 + 0.05 * wobble}
    if text:
        signals |= {"linear_cka": 0.93 + 0.01 * wobble, "gain_t.mlp": 0.4 * wobble, "gain_t.mlp.inner": 0.3 * wobble}
        if index:
            signals["successive_cosine"] = 0.1 * wobble  # the first block has none
    if named:
        signals |= {"weight_rms.mlp.down_proj": 0.0021} | ({"linear_cka": 0.41, "gain_t.mlp": 12.3} if text else {})
    return BlockCheck(
        index=index,
        name=f"model.layers.{index}",
        score=12.3 if named else 1.5 + wobble,
        signals=signals,
        ablation=interval(-0.21, 0.04) if named and text else None,
    )


def _witnesses(block: int) -> tuple[GainWitness, ...]:
    layer = f"model.layers.{block}"
    return (
        GainWitness(
            block=block,
            part="mlp",
            layer=f"{layer}.mlp.down_proj",
            factor=-0.9,
            gain=interval(1.3, 0.2),
            select_gain=1.31,
            composed=True,
        ),
        GainWitness(
            block=block,
            part="self_attn.o_proj",
            layer=f"{layer}.self_attn.o_proj",
            head=3,
            head_dim=64,
            factor=0.0,
            gain=interval(0.02, 0.01),
            select_gain=0.03,
            composed=True,
        ),
        GainWitness(
            block=block,
            part="mlp.up_proj",
            layer=f"{layer}.mlp.up_proj",
            factor=1.1,
            gain=interval(0.0, 0.01),
            select_gain=0.001,
        ),
    )
