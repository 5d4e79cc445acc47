"""The words, letters, shapes and formats of numbers that every view shares, so that no two views disagree.

Here are the words of the codes of `peelwise.records.codes`; records hold none.

A verdict is shown in three ways: by letter, by shape and by colour (hue *and* lightness), because about
one reader in twenty cannot tell red from green, and a printed page often has no colour at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from peelwise.records.audit import AuditRecord, BlockRecord
from peelwise.records.base import NATS, Colour, Interval, Note, ProbeRecord, SealedRecord, unit_of
from peelwise.records.codes import INTERACTS, Baseline
from peelwise.records.plain_text import clean

NOT_MEASURED = "not measured"
NOT_IN_BUDGET = "not measured within the budget"
INTERACTION = "interaction with neighbours"
INTERACTION_MEANING = (
    "the marginal gain is significantly negative. Refined together, the block and its neighbours take the same step "
    "twice, so none of them can be judged by itself; it never means that nothing is there"
)

BASELINES: Mapping[Baseline, str] = MappingProxyType(
    {
        "unigram": "one who only counts tokens",
        "without-blocks": "a new head on the embedding without any block",
    }
)
SHARED = (
    "training itself (learning rate, optimiser, not finished) or what lies outside of the linear layers (rotary base, "
    "tokenizer, positions, norms, order of the blocks)"
)
UNDAMAGED = "does not mean undamaged: only other weights of linear layers were tried."

# The tables below have a line for every code of `records.codes`; a test says so.
REASONS: Mapping[str, str] = MappingProxyType(
    {
        "above-margin": "certified under-optimised",
        "still-falling": "recoverable, still training",
        "within-progress": "still training: the loss soon falls by more than it could recover",
        "foreign-text": "recoverable on this text; adaptation and under-training are not distinguishable without "
        "training text",
        "own-above-margin": "certified under-optimised: beside all others it still gains more than the margin",
        "nothing-of-its-own": "nothing of its own found: what it gains by itself, its neighbours gain too",
        "nothing-above-margin": "nothing above the margin found",
        "screened": "nothing above the margin to be found along its direction, by the slope there",
        "more-tokens": "undecided: more probe tokens needed",
        "not-refined": "undecided: its solo gain was not measured within the budget",
        "marginal-only": "undecided: its marginal gain is above the margin, its solo gain was not measured within the "
        "budget",
        "run-at-fault": "undecided: something is wrong with the whole run (see its events), or its loss is above that "
        "of no blocks at all; what is not found then says nothing",
        "frozen": "not asked about: training does not change its linear layers",
    }
)
_INTERACTS = "; it interacts with its neighbours: together, they do better without its changes"

STAGES: Mapping[str, str] = MappingProxyType(
    {
        "self-checks": "self-checks of the model",
        "losses": "losses of the model as it stands",
        "statistics": "statistics of all blocks",
        "ablation": "ablation (blocks skipped one at a time)",
        "joint-rounds": "refining all blocks together",
        "joint-rounds-dense": "refining all blocks together, without the low-bit formats",
        "leave-one-out": "leaving each block out of the composed witness",
        "solo-rounds": "refining each block by itself",
        "head": "re-fitting the output head",
        "head-control": "control: re-fitting the output head",
        "maps": "peel maps",
        "map-heads": "output heads of the best maps",
        "shuffled-control": "control: shuffled targets",
        "untrained-control": "control: untrained",
        "best-weights": "best weights of every layer",
        "best-weights-losses": "losses with the best weights",
        "fine-tune": "what survives of the fine-tune",
        "quantised-inputs": "loss with quantised inputs",
        "curvature": "curvature of the loss in every layer's outputs",
        "codes": "codes of every layer, block by block",
        "codes-losses": "losses with these codes, and rounded to nearest",
        "weight-signals": "signals of the weights",
        "pass-signals": "signals of a pass forward and back",
        "gain-witnesses": "gain witnesses: factors on parts of blocks that stand out",
        "changes": "kinds of change, tensor by tensor",
        "outputs": "what each part computes in both models",
        "repairs": "putting OLD's parts into NEW",
        "breaks": "putting NEW's parts into OLD",
        "block-formats": "what each block costs in each format",
        "layers": "layers of the blocks that matter most",
        "swap-path": "putting parts back one after another",
        "mended": "putting back together all that hurt",
        "predictability": "weights predicted from other blocks'",
        "bending": "bending each block's weights",
        "recovery": "damaging each block and refining it alone",
    }
)

NOTES: Mapping[str, str] = MappingProxyType(
    {
        "stopped": "Stopped by the user; what was finished by then is reported.",
        "budget-ended": "The budget ended before everything was measured. A larger --budget measures the rest.",
        "low-bit": "{layers} linear layers hold low-bit codes ({formats}). The witness gives them other codes and "
        "scales of the same formats. The quantisation gap comes from a dense witness, which is not kept.",
        "no-head": "No output head was found, so there is no head control.",
        "logits-changed": "The model changes its logits behind the head, so there is no head control.",
        "not-initialised": "The model cannot be initialised again (no configuration and no reset_parameters), so there "
        "is no untrained control.",
        "few-fit-tokens": "{layer}: {tokens} fit tokens for {inputs} inputs make its [{inputs}, {inputs}] sum rank "
        "deficient (rank {rank}). Damping keeps the result valid; more fit tokens would sharpen it.",
        "few-expert-tokens": "{block}: {matrices} of {of} matrices of experts saw fewer fit tokens than they have "
        "inputs, {without} of them none. Damping keeps the result valid; more fit tokens would sharpen it.",
        "more-damping": "{layer}: its [{size}, {size}] sum is rank deficient or badly conditioned at damping "
        "{damping:g}, so {used:g} was used instead. The result is valid; more fit tokens would sharpen it.",
        "dense-references": "Low-bit layers hold {formats}. Their references are dense, so what they gain is not at "
        "the same bit width.",
        "no-head-fit": "The output head cannot be re-fitted (none was found, or the logits are changed behind it). "
        "Bounds are with the model's own head, and there is no head control.",
        "head-steps": "Every head was given {steps} steps, which is what the budget allows.",
        "map-unfinished": "The budget ended inside map {map}. A larger --budget finishes it.",
        "few-heads": "The vocabulary is large, so heads were fitted for the {heads} best maps only; the others are "
        "shown with the model's own head.",
        "other-tensors": "{count} other tensors differ too, such as {name} (embedding, norms, head). What they cost "
        "counts as quantisation gap.",
        "shared-tensors": "Both models hold {count} parameters in common (the same tensors, not copies), which cannot "
        "differ.",
        "left-out": "{count} parameters of the blocks ({share:.1%} of their numbers) are in no linear layer that is "
        "called, so they are neither refined nor judged: {names}. Nothing is said of them.",
        "no-text": "Without text there are signals of the weights alone: no slopes, no ablation, no gain witnesses.",
        "no-gradients": "The model cannot be differentiated, so the signals of the backward pass are missing: gain "
        "slopes and all that is made from gradients.",
        "few-blocks": "A model of {blocks} blocks has no depth to compare with: at least five are needed for a score.",
        "frozen-layers": "{layers} linear layers ({share:.1%} of the blocks' numbers) are frozen and were left as they "
        "are; {blocks} blocks have no others. Option refine: all asks about them too.",
        "untied": "The configuration says that {embedding} and {head} share one weight; in memory each has its own "
        "(values equal: {same:d}). What was trained or loaded may not be what is meant.",
        "checkpoint": "Compared with {folder}: {differ} of {compared} tensors differ from those in memory ({names}); "
        "{only_model} are in the model alone, {only_file} in the checkpoint alone.",
        "autocast": "The model's own forward computes in {dtype} (autocast inside), and so does every measurement.",
        "factor-first": "What {part} of block {block} writes was multiplied by {factor:.2f} before the first round; "
        "the signals of the sweep are those of the model with this factor.",
        "no-curvature": "The curvature of the loss in all layers' outputs would need more than 2 GiB, so errors are "
        "not weighed with it.",
        "smaller-groups": "No format was given: groups of {group} are taken, the largest of 64, 32 and 16 that divides "
        "the inputs of all layers.",
        "scales-per-channel": "No format was given: each output has a scale of its own, since no group of 64, 32 or 16 "
        "divides the inputs of all layers.",
        "read-as-numbers": "{layers} quantised layers ({method}) are read as plain numbers, exactly those that are "
        "stored, as no format here has their layout: what they gain is not at the same bit width. {codes} others hold "
        "codes.",
        "adapters-on-codes": "The parent's base holds codes of few bits in {layers} layers. The parent is the numbers "
        "that they stand for with the adapters added, as it was trained; merging into the codes would round both.",
        "router-collapsed": "Block {block}: its router has collapsed: {share:.0%} of all tokens go to experts "
        "{experts} of {of}.",
        "dead-experts": "Block {block}: {count} of {of} experts were given no token of this text (an even load would "
        "be {even:.0f} each): {experts}.",
        "copied-experts": "Block {block}: experts {pairs} have the same weights.",
        "fake-quant-off": "{off} of {of} fake quantisers are switched off, such as {name}: their layers are measured "
        "with weights in full precision, which is not what conversion will make of them.",
        "own-loss": "The probe is of batches with a loss of their own, so nothing is said of counting tokens or of a "
        "new output head.",
        "encoder-left-out": "The blocks asked about are the decoder's, which are given what the encoder makes; those "
        "of {names} were left as they are, and nothing is said of them.",
        "stacks-left-out": "The blocks asked about are those of {stack}; those of {names} were left as they are: "
        "they run with every change, so it is in the loss, and nothing is said of them.",
        "resumed": "Some of this was measured by an earlier call that did not finish; the cost is that of the last.",
    }
)


@dataclass(frozen=True, slots=True)
class VerdictWords:
    """How one verdict is written and drawn: ``light`` and ``dark`` are hex colours on those backgrounds."""

    letter: str
    shape: str
    short: str
    words: str
    meaning: str
    light: str
    dark: str
    style: str


VERDICTS: Mapping[Colour, VerdictWords] = MappingProxyType(
    {
        "red": VerdictWords(
            letter="R",
            shape="■",
            short="under-optimised",
            words="certified under-optimised",
            meaning="Replacement weights exist that lower the loss by more than the margin on text they "
            "were not fitted on, and the loss has stopped falling.",
            light="#b3261e",
            dark="#ff8f7a",
            style="bold red",
        ),
        "yellow": VerdictWords(
            letter="Y",
            shape="▲",
            short="recoverable",
            words="recoverable",
            meaning="More than the margin can be recovered, but training is still under way, or adaptation "
            "to this text is not distinguishable from under-training.",
            light="#9a5b00",
            dark="#f2c14e",
            style="yellow",
        ),
        "green": VerdictWords(
            letter="G",
            shape="●",
            short="none found",
            words="nothing above the margin found",
            meaning="The search found nothing above the margin. This proves nothing: a better search might, and "
            "a block damaged where linear layers cannot mend it (positions, norms, order) is green too.",
            light="#0a7358",
            dark="#56cfa6",
            style="green",
        ),
        "grey": VerdictWords(
            letter="?",
            shape="◇",
            short="undecided",
            words="undecided",
            meaning="The interval covers the margin, or the block was not measured: more probe tokens or a "
            "larger budget are needed.",
            light="#5d6675",
            dark="#a5afbd",
            style="dim",
        ),
        "frozen": VerdictWords(
            letter="F",
            shape="□",
            short="frozen",
            words="frozen, not asked about",
            meaning="Training does not change the linear layers of the block (requires_grad is False, or adapters "
            "alone were asked about), so nothing was tried on them and nothing is said of them.",
            light="#5d6675",
            dark="#a5afbd",
            style="dim",
        ),
    }
)


_PLAIN_UNIT = "loss"  # of losses that have no other unit than to be one


def behind(record: SealedRecord) -> str:
    """Return what stands behind a number of the loss in a sentence: its unit, unless that is simply the loss."""
    unit = clean(unit_of(record))
    return "" if unit == _PLAIN_UNIT else f" {unit}"


def in_title(record: SealedRecord) -> str:
    """Return what stands behind the title of losses: a comma and their unit, unless that is simply the loss."""
    said = behind(record)
    return f",{said}" if said else ""


def is_of_batches(record: SealedRecord) -> bool:
    """Whether the probe is of examples with a loss of their own, so that nothing is said of text and tokens."""
    probe: ProbeRecord | None = record.probe  # a check may have none
    return probe is not None and probe.loss is not None


def data_words(record: SealedRecord) -> str:
    """Return what was measured on."""
    return "examples" if is_of_batches(record) else "text"


def this_data(record: SealedRecord) -> str:
    """Return what was measured on, as that and no other."""
    return "these examples" if is_of_batches(record) else "this text"


def own_data(record: SealedRecord) -> str:
    """Return what stands behind ``peelwise verify FOLDER`` to try a witness on data of one's own, if it can be."""
    return "" if is_of_batches(record) else " --text FILE"


def short_unit(record: SealedRecord) -> str:
    """Return the unit of losses for the head of a column."""
    unit = unit_of(record)
    return "nats/token" if unit == NATS else clean(unit)


def nats(value: float | None, *, signed: bool = False) -> str:
    """Return ``value`` with four decimals, or the words for a missing one.

    Args:
        value: Nats per token; ``None`` means not measured, which is never shown as zero.
        signed: Whether a positive value carries its sign.

    Returns:
        For example ``2.8741``, ``+0.0312`` or ``not measured``.
    """
    if value is None:
        return NOT_MEASURED
    return f"{value:+z.4f}" if signed else f"{value:z.4f}"


def with_ends(interval: Interval | None, decimals: int = 4) -> str:
    """Return an interval as ``+0.0312 [0.0272, 0.0352]``; few sequences make it lopsided, so both ends are told.

    Args:
        interval: Nats per token, or ``None``.
        decimals: Of each of the three numbers.

    Returns:
        Mean and ends, or the words for a missing value.
    """
    if interval is None:
        return NOT_MEASURED
    return f"{interval.mean:+z.{decimals}f} [{interval.low:z.{decimals}f}, {interval.high:z.{decimals}f}]"


def bracket(interval: Interval | None) -> str:
    """Return the two ends of an interval as ``[+0.0272, +0.0352]``, or the words for a missing one.

    Args:
        interval: Nats per token, or ``None``.

    Returns:
        Both ends with their signs.
    """
    if interval is None:
        return NOT_MEASURED
    return f"[{nats(interval.low, signed=True)}, {nats(interval.high, signed=True)}]"


def reason_words(code: str) -> str:
    """Return why a block has its colour, from a code; a sentence of an older run history is returned as it is."""
    plain = code.removesuffix(INTERACTS)
    return REASONS[plain] + (_INTERACTS if plain != code else "") if plain in REASONS else code


def stage_words(name: str) -> str:
    """Return what a stage does, from its code; the words of an older record are returned as they are."""
    return STAGES.get(name, name)


def note_words(note: Note | str) -> str:
    """Return a remark in words; the sentence of an older record is returned as it is."""
    if isinstance(note, str):
        return note
    try:
        said = NOTES[note.code].format(**note.values)
    except (KeyError, ValueError):  # of a newer writer, or damaged
        said = f"{note.code}: {', '.join(f'{key} = {value}' for key, value in note.values.items()) or 'no values'}."
    more = note.values.get("more")
    return f"{said} (And {more} more like it.)" if more else said


def legend(colours: Iterable[Colour]) -> list[Colour]:
    """Return the verdicts that a key explains: the four colours, and frozen where a block is."""
    used = set(colours)
    return [colour for colour in VERDICTS if colour != "frozen" or colour in used]


def ranking(block: BlockRecord) -> float | None:
    """Return what ranks blocks before anything is evaluated: `RANKED_BY`, in older records the plain energy."""
    return block.energy if block.natural_energy is None else block.natural_energy


def significant(value: float | None, digits: int = 3) -> str:
    """Return a quantity without a fixed scale, such as an energy, with a few significant digits.

    Args:
        value: The quantity, or ``None``.
        digits: Significant digits.

    Returns:
        For example ``0.0612`` or ``134``; the words for a missing value.
    """
    return NOT_MEASURED if value is None else f"{value:.{digits}g}"


def percent(share: float | None) -> str:
    """Return a share between 0 and 1 in percent, or the words for a missing one."""
    return NOT_MEASURED if share is None else f"{100 * share:z.0f} %"


def amount(value: float, base: int = 1000, unit: str = "") -> str:
    """Return a large amount with a prefix, for example ``134.5 M`` or ``512.0 MiB``.

    Args:
        value: The amount, at least zero.
        base: 1000 for counts, 1024 for bytes.
        unit: Written behind the prefix.

    Returns:
        The amount with one decimal, or as an integer below ``base``.
    """
    if value < base:
        return f"{value:.0f} {unit}".rstrip()
    prefixes = ("k", "M", "G", "T") if base == 1000 else ("Ki", "Mi", "Gi", "Ti")
    for prefix in prefixes:
        value /= base
        if value < base or prefix == prefixes[-1]:
            break
    return f"{value:.1f} {prefix}{unit}"


def duration(seconds: float) -> str:
    """Return wall time for people, for example ``0.4 s``, ``48 s``, ``3 min 12 s`` or ``2 h 05 min``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def is_interaction(unique: Interval | None) -> bool:
    """Return whether a marginal gain is significantly negative."""
    return unique is not None and unique.high < 0


def is_measured(block: BlockRecord) -> bool:
    """Return whether anything was found out about the block's recoverable loss."""
    return any(i is not None for i in (block.recoverable_nats, block.unique_nats, block.first_order_nats))


def is_bounded(block: BlockRecord) -> bool:
    """Return whether a block's solo gain is bounded by a slope, and was not measured."""
    return block.recoverable_nats is None and block.first_order_nats is not None


def solo_gain(block: BlockRecord, decimals: int = 4) -> str:
    """Return a block's solo gain with its interval, or of one that was not refined the upper end of its bound."""
    bound = block.first_order_nats
    if bound is None or not is_bounded(block):
        return with_ends(block.recoverable_nats, decimals)
    return f"at most {bound.high:+.{decimals}f} (slope)"


def counts(record: AuditRecord) -> dict[Colour, int]:
    """Return how many blocks carry each verdict, in the order red, yellow, green, grey, and frozen where there are."""
    verdicts = [block.verdict for block in record.blocks]
    return {colour: verdicts.count(colour) for colour in legend(verdicts)}


def gain_sentence(record: AuditRecord) -> str:
    """Return what the whole witness does to the loss, claiming no more than its interval allows.

    Args:
        record: The audit.

    Returns:
        One sentence without the numbers themselves.
    """
    gain = record.loss.composed_gain
    if record.loss.composed is None or gain is None:
        return f"All blocks refined together: {NOT_IN_BUDGET}."
    if gain.low > 0:
        return (
            f"lower loss with the replacement weights, on {data_words(record)} they were neither fitted nor chosen on"
        )
    if gain.high < 0:
        return "higher loss with the replacement weights: this witness proves nothing"
    return "change of the loss with the replacement weights; the interval contains zero, so nothing is proven"


def control_sentence(record: AuditRecord) -> str:
    """Return whether the bound may be believed, as its null controls tell.

    Args:
        record: The audit.

    Returns:
        One sentence that begins with *Informative*, *Uninformative* or says that no control was run.
    """
    if record.loss.shuffled is None and record.loss.untrained is None:
        return f"Null controls: {NOT_IN_BUDGET}."
    if record.informative:
        return "Informative: the bound beats its null controls."
    return "Uninformative: the bound does not beat its null controls and should not be believed."
