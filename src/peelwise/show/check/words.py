"""What a check found, in sentences, made from its numbers and codes."""

from __future__ import annotations

from collections.abc import Sequence

from peelwise.records.base import NATS, Interval
from peelwise.records.check import BlockCheck, CheckPart, CheckRecord, GainWitness, SignalReason, UnlikeBlock
from peelwise.records.signals import SIGNALS, title_of
from peelwise.show.words import behind, nats, note_words, significant

ATTENTION, MLP = "attention", "mlp"
MOST_LISTED = 6  # blocks that a sentence names
_BRANCHES = {ATTENTION: "attention", MLP: "the MLP"}
_INNER = {f"{ATTENTION}.inner": "attention's inner channels", f"{MLP}.inner": "the MLP's inner channels"}
_SLOPES = ("gain_slope", "gain_t")  # above 0, less of the part would lower the loss; below, more

UNLIKE = (
    "Unlike is not wrong: healthy models have blocks unlike the others too, at both ends above all. A score proves "
    "nothing; a gain witness proves that one factor lowers the loss."
)
NOT_EXCLUDED = (
    "This does not exclude a fault that all blocks share, one that these signals do not see, or blocks that are "
    "under-trained alike, which peelwise audit measures."
)
_OF_EXPERTS = ("router-collapsed", "dead-experts", "copied-experts")  # come first, as no score sees them
_WEIGHTS_ALONE = "Only weights were looked at, not what the model does with a text."


def conclusion(record: CheckRecord) -> str:
    """Return in a few sentences which blocks are unlike their neighbours and why, and no more than that."""
    experts = [note_words(each) for each in record.notes if getattr(each, "code", "") in _OF_EXPERTS]
    if record.unlike is None:
        few = blocks_words(len(record.blocks))
        none = f"{few} have no depth to compare with, so none is named. The signals stand for themselves."
        return " ".join([*experts, none])
    if not record.unlike:
        return " ".join(filter(None, (*experts, _nothing(record), _limits(record), NOT_EXCLUDED)))
    first, most = record.unlike[0], max(shown_witnesses(record), key=_gained, default=None)
    elsewhere = most if most is not None and most.block != first.block else None
    together = record.composed_gain if sum(w.composed for w in record.gain_witnesses) > 1 else None
    parts = (
        *experts,
        _named(record),
        *([f"Block {first.block} first:"] if len(record.unlike) > 1 else []),
        *story(record, first),
        "" if elsewhere is None else f"In block {elsewhere.block}, m{witness_words(elsewhere, behind(record))[1:]}",
        "" if together is None else f"Multiplying by the best factors together {_lowers(together, behind(record))}.",
        _limits(record),
    )
    return " ".join(filter(None, parts))


def story(record: CheckRecord, unlike: UnlikeBlock) -> list[str]:
    """Return a sentence for each reason, and for what factors and ablation say of a block that is named."""
    lines = list(map(reason_words, unlike.reasons))
    ablation = ablation_of(record, unlike.block)
    if ablation is not None:  # then factors were tried too
        best = best_witness(record, unlike.block)
        lines.append(
            "No factor on a part of it is shown to lower the loss."
            if best is None
            else witness_words(best, behind(record))
        )
        lines.append(ablation_words(ablation))
    return lines


def reason_words(reason: SignalReason) -> str:
    """Return what one signal says of a block, its value beside that of the neighbours."""
    of = f" of {part_words(reason.part)}" if reason.part else ""
    subject, value = f"The {title_of(reason.signal)}{of}", significant(reason.value)
    if reason.signal in _SLOPES:  # needs no neighbour: 0 is where nothing would be gained
        return f"{subject} is {value}: {'less' if reason.value > 0 else 'more'} of it would lower the loss."
    if reason.typical is None:
        return f"{subject} is {value}."
    typical = significant(reason.typical)
    signal = SIGNALS.get(reason.signal)
    if signal is not None and signal.quotient and reason.value > 0 and reason.typical > 0:
        return f"{subject} is {_times(reason.value / reason.typical)} its neighbours' ({value} against {typical})."
    return f"{subject} is {value}, its neighbours' {typical}."


def witness_words(witness: GainWitness, unit: str = f" {NATS}") -> str:
    """Return what a factor does to the loss on text that it was not chosen on; ``unit`` stands behind the number."""
    what = f"what {part_words(witness.part)} gives" if witness.part in _BRANCHES else part_words(witness.part)
    if witness.head is not None:
        what = f"head {witness.head} of {part_words(witness.part)}"
    return f"Multiplying {what} by {witness.factor:.3g} {_lowers(witness.gain, unit)}."


def ablation_words(ablation: Interval) -> str:
    """Return what skipping a block does to the loss."""
    ends = f"({min_max(ablation)})"
    if ablation.low > 0:
        return f"Skipping the block raises the loss by {ablation.mean:.3f} {ends}."
    if ablation.high < 0:
        return f"Skipping the block lowers the loss by {-ablation.mean:.3f} ({min_max(ablation, -1)})."
    return f"Skipping the block changes the loss by {ablation.mean:+.3f} {ends}, not distinguishable from nothing."


def part_sentences(check: CheckPart) -> list[str]:
    """Return what an audit's check says: one line for each block that is unlike its neighbours, or that none is."""
    if not check.unlike:
        highest = max(range(len(check.scores)), key=lambda i: check.scores[i])
        return [
            f"No block is unlike its neighbours (highest score {score_words(check.scores[highest])}, block {highest}; "
            f"named from {score_words(check.threshold)})."
        ]
    return [
        f"Block {each.block} is unlike its neighbours (score {score_words(each.score)}). "
        + " ".join(map(reason_words, each.reasons))
        for each in check.unlike
    ]


def part_words(part: str) -> str:
    """Return what a part is called within a sentence."""
    return (_BRANCHES | _INNER).get(part, part)


def best_witness(record: CheckRecord, block: int) -> GainWitness | None:
    """Return the factor of a block with the largest gain that is shown, if there is one."""
    shown = [witness for witness in shown_witnesses(record) if witness.block == block]
    return max(shown, key=_gained, default=None)


def shown_witnesses(record: CheckRecord) -> list[GainWitness]:
    """Return the factors that are shown to lower the loss, those that gain most first."""
    return [witness for witness in record.gain_witnesses if witness.gain.low > 0]


def ablation_of(record: CheckRecord, block: int) -> Interval | None:
    """Return what skipping a block costs, if that was measured."""
    found = _block(record, block)
    return None if found is None else found.ablation


def named_blocks(record: CheckRecord) -> list[int]:
    """Return the blocks that are named, the most unlike first."""
    return [each.block for each in record.unlike or ()]


def share_of_bar(score: float | None, threshold: float) -> float:
    """Return how full the bar of a score is: 1 for twice the score from which a block is named, and above."""
    if score is None:
        return 0.0
    return max(0.0, min(1.0, score / (2 * threshold))) if threshold > 0 else 1.0


def reason_cells(reason: SignalReason) -> tuple[str, str, str, str, str]:
    """Return signal, part, value, that of the neighbours and the robust z, for a table."""
    return (
        title_of(reason.signal),
        part_words(reason.part),
        significant(reason.value),
        "–" if reason.typical is None else significant(reason.typical),
        deviation_words(reason.deviation),
    )


def score_words(score: float | None) -> str:
    """Return a score in at most four characters."""
    if score is None:
        return "–"
    if score < 9.95:
        return f"{score:.1f}"
    return f"{score:.0f}" if score < 999.5 else "1k+"


def deviation_words(deviation: float) -> str:
    """Return how many robust standard deviations a value is away, without the digits of what is far beyond."""
    away = abs(deviation)
    return f"{away:.1f}" if away < 999.95 else f"{away:.0e}"


def rest_words(count: int) -> str:
    """Return what is said of factors whose gain is not shown."""
    return f"Of {count} more factor{'' if count == 1 else 's'} the gain may be nothing; they are in the record."


def blocks_words(count: int) -> str:
    """Return a number of blocks."""
    return f"{count} block{'' if count == 1 else 's'}"


def listed(blocks: Sequence[int]) -> str:
    """Return indices of blocks with commas between them; of many the first few."""
    return ", ".join(map(str, blocks[:MOST_LISTED])) + (", ..." if len(blocks) > MOST_LISTED else "")


def min_max(interval: Interval, sign: int = 1) -> str:
    """Return the ends of an interval as ``1.100 to 1.500``, turned around where the sign is."""
    low, high = sorted((sign * interval.low, sign * interval.high))
    return f"{low:z.3f} to {high:z.3f}"


def _block(record: CheckRecord, index: int) -> BlockCheck | None:
    return next((block for block in record.blocks if block.index == index), None)


def _named(record: CheckRecord) -> str:
    named = named_blocks(record)
    score = record.unlike[0].score if record.unlike else 0.0
    rule = f"(score {score_words(score)}; named from {score_words(record.threshold)})"
    if len(named) == 1:
        return f"Block {named[0]} is unlike its neighbours {rule}."
    return f"{len(named)} of {blocks_words(len(record.blocks))} are unlike their neighbours: {listed(named)}."


def _nothing(record: CheckRecord) -> str:
    scored = [(block.score, block.index) for block in record.blocks if block.score is not None]
    if not scored:
        return "Nothing unlike its neighbours."
    score, index = max(scored)
    return (
        f"Nothing unlike its neighbours: the highest score is {score_words(score)} (block {index}), and a block is "
        f"named from {score_words(record.threshold)}."
    )


def _limits(record: CheckRecord) -> str:
    return _WEIGHTS_ALONE if record.probe is None else ""


def _gained(witness: GainWitness) -> tuple[float, bool]:
    """Return what a factor gains; of a branch and a layer in it with the same gain, the branch says more."""
    return round(witness.gain.mean, 3), witness.part in _BRANCHES


def _lowers(gain: Interval, unit: str) -> str:
    if gain.high < 0:
        return f"raises the loss by {-gain.mean:.3f}{unit} ({min_max(gain, -1)})"
    if gain.low <= 0:
        return f"changes the loss by {nats(-gain.mean, signed=True)}{unit}, which may be nothing"
    return f"lowers the loss by {gain.mean:.3f}{unit} ({min_max(gain)})"


def _times(ratio: float) -> str:
    if ratio < 1e-3:
        return "less than 0.001 of"
    if ratio > 1e3:
        return "more than 1,000 times"
    return f"{ratio:.2g} of" if ratio < 1 else f"{ratio:.3g} times"
