"""What follows from the numbers of a check's record, and whether it agrees with itself. No model, no tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from peelwise.evidence.audit import instead, margin_of, wrong_intervals, wrong_settings
from peelwise.evidence.unlike import LEAST_BLOCKS, RULE, THRESHOLD, named
from peelwise.records.base import Interval
from peelwise.records.check import CheckPart, CheckRecord, GainWitness

_ROUNDING = 1e-5  # nats per token


def contradictions(record: CheckRecord) -> Iterator[str]:
    """Yield, in words, every place where the record contradicts its own numbers."""
    yield from wrong_settings(record)
    if not 1 <= record.rule <= RULE:
        yield f"rule: scores follow by rule {record.rule}; this version knows 1 to {RULE}."
    margin = margin_of(record, record.loss or 0.0)
    if abs(record.margin_nats - margin) > 1e-9:
        yield instead("margin_nats", record.margin_nats, margin)
    if record.informative is not None:
        yield "informative: a check has no controls that could say so."
    if [block.index for block in record.blocks] != list(range(record.model.blocks)):
        yield f"blocks: expected one record for each of {record.model.blocks} blocks, in order."
    else:
        yield from _scores(record)
        yield from _measured(record)
        yield from _matrices(record)
        yield from _witnesses(record)


def wrong_part(part: CheckPart, blocks: int) -> Iterator[str]:
    """Yield where what an audit keeps of its check contradicts itself.

    Args:
        part: what it keeps.
        blocks: of the model.
    """
    if len(part.scores) != blocks:
        yield f"check: it has {len(part.scores)} scores, the model has {blocks} blocks."
    else:
        yield from _wrong_names("check", part.scores, part.threshold, [(u.block, u.score) for u in part.unlike])


def _scores(record: CheckRecord) -> Iterator[str]:
    scores = [block.score for block in record.blocks if block.score is not None]
    if record.unlike is None:
        if scores or len(record.blocks) >= LEAST_BLOCKS:
            yield f"unlike: it is missing, and {len(record.blocks)} blocks have a depth to compare with."
    elif len(scores) < len(record.blocks):
        yield "blocks: some have no score, though it is said which are unlike their neighbours."
    else:
        yield from _wrong_names("unlike", scores, record.threshold, [(u.block, u.score) for u in record.unlike])


def _wrong_names(where: str, scores: list[float] | tuple[float, ...], threshold: float, said: object) -> Iterator[str]:
    """Yield what is wrong with which blocks are named, and from which score on."""
    if threshold != THRESHOLD:
        yield f"{where}: blocks are named from a score of {threshold:g} on; this version knows {THRESHOLD:g}."
    follows = [(block, scores[block]) for block in named(np.asarray(scores), threshold)]
    if said != follows:
        yield f"{where}: the blocks with their scores are not those that follow from all scores."


def _measured(record: CheckRecord) -> Iterator[str]:
    """What is measured with text, and of which blocks."""
    with_text = record.loss is not None
    if with_text != (record.probe is not None):
        yield "loss: a loss and the text it was measured on stand together or not at all."
    most = record.settings.get("most_witnesses")
    worst = [unlike.block for unlike in record.unlike or ()][: most if isinstance(most, int) else None]
    ablated = [block.index for block in record.blocks if block.ablation is not None]
    if with_text and ablated != sorted(worst):
        yield "ablation: it is measured for the blocks that are named, and stands at others, or is missing at one."
    if not with_text and (ablated or record.gain_witnesses or record.composed_gain):
        yield "loss: it is missing, and gains of it are certified."
    if record.probe is not None:
        yield from wrong_intervals(_named_intervals(record), record.probe.report_sequences)


def _named_intervals(record: CheckRecord) -> Iterator[tuple[str, Interval]]:
    found = {f"{block.name} ablation": block.ablation for block in record.blocks}
    found |= {f"{w.layer} x {w.factor:g}, witness {i}": w.gain for i, w in enumerate(record.gain_witnesses)}
    found["composed_gain"] = record.composed_gain
    yield from ((name, interval) for name, interval in found.items() if interval is not None)


def _matrices(record: CheckRecord) -> Iterator[str]:
    """Signals of a linear layer stand in its block's list too."""
    for matrix in record.matrices:
        if not 0 <= matrix.block < len(record.blocks):
            yield f"{matrix.name[:80]}: there is no block {matrix.block}."
            continue
        block = record.blocks[matrix.block]
        for signal, value in matrix.signals.items():
            if block.signals.get(f"{signal}.{matrix.part}") != value:
                yield f"{matrix.name[:80]}: its {signal} is not the one that stands at its block."


def _witnesses(record: CheckRecord) -> Iterator[str]:
    composed = [witness for witness in record.gain_witnesses if witness.composed]
    if bool(composed) != (record.composed_loss is not None) or bool(composed) != (record.composed_gain is not None):
        yield "The record does not say what its composed factors gain together, or says it of none."
    elif record.composed_loss is not None and record.composed_gain is not None:
        found = (record.loss or 0.0) - record.composed_loss
        if abs(found - record.composed_gain.mean) > _ROUNDING:
            yield instead("composed_gain.mean", record.composed_gain.mean, found, "loss - composed_loss")
    for witness in record.gain_witnesses:
        yield from _wrong_witness(record, witness)


def _wrong_witness(record: CheckRecord, witness: GainWitness) -> Iterator[str]:
    where = witness.layer[:80]
    if not 0 <= witness.block < len(record.blocks):
        yield f"{where}: there is no block {witness.block}."
    elif not witness.layer.startswith(f"{record.blocks[witness.block].name}."):
        yield f"{where} is not in block {witness.block}."
    if not math.isfinite(witness.factor):
        yield f"{where}: its factor is no finite number."
    if record.loss is not None and witness.gain.mean > record.loss + _ROUNDING:
        yield f"{where}: {witness.gain.mean:.6f} was certified, more than the whole loss."
