"""The sections of the report below the verdicts, one function each: a record in, markup out."""

from __future__ import annotations

from peelwise.records.allocation import AllocationRecord
from peelwise.records.audit import AuditRecord, BlockRecord
from peelwise.records.base import Interval, ProbeRecord, SealedRecord
from peelwise.records.quantcheck import QuantcheckRecord
from peelwise.records.quantise import QuantiseRecord
from peelwise.records.signals import RANKED_BY, SIGNALS
from peelwise.show.audit import charts
from peelwise.show.audit.words import reasons
from peelwise.show.html.markup import chart, chip, esc, pairs, paragraph, section, table
from peelwise.show.words import (
    INTERACTION,
    INTERACTION_MEANING,
    NOT_IN_BUDGET,
    NOT_MEASURED,
    VERDICTS,
    amount,
    behind,
    bracket,
    control_sentence,
    counts,
    data_words,
    duration,
    in_title,
    is_bounded,
    is_interaction,
    is_measured,
    is_of_batches,
    nats,
    note_words,
    own_data,
    percent,
    ranking,
    significant,
    solo_gain,
    stage_words,
    this_data,
)

# The signals of the table of blocks; their cells differ, so each is written out in `_block_row`.
_COLUMNS = ("recoverable", "unique", "removal", RANKED_BY, "gradient_norm")
ON_BATCHES = (
    "The probe is of batches, whose tensors are in the folder, so losses are recomputed from Python with the model in "
    "hand; a loss that was given is a function, which no file holds. This finds forged numbers, but not weights that "
    "were fitted to the very examples they are reported on."
)
VERIFY_BATCHES = "peelwise.verify(DIR, model, loss=..)"
_OF_TOKENS = ("New head only", "Without blocks", "Counting tokens")  # losses that a probe of batches has not
_MISSING = f"{NOT_IN_BUDGET[0].upper()}{NOT_IN_BUDGET[1:]}."


def recoverable(record: AuditRecord) -> str:
    """Show what each block can give, by itself and beside all others."""
    shapes = " · ".join(f"{VERDICTS[colour].shape} {VERDICTS[colour].short}" for colour in counts(record))
    caption = [
        f"{esc(shapes)}. Lines are 95 % intervals; the dashed line is the margin, "
        f"{nats(record.margin_nats)}{esc(behind(record))}. Neighbours can do part of each other's work, so the two "
        "rows answer different questions."
    ]
    asked = [block for block in record.blocks if not block.frozen]
    solo = [block.recoverable_nats or block.first_order_nats for block in asked]
    missing = [NOT_IN_BUDGET] if None in solo or any(block.unique_nats is None for block in asked) else []
    if any(map(is_bounded, record.blocks)):
        caption.append(
            "▼ is an upper end: these blocks were not refined, the slope of the loss along their direction bounds them."
        )
    missing += [VERDICTS["frozen"].words] if len(asked) < len(record.blocks) else []
    if missing:
        caption.append(f"Shaded: {' or '.join(missing)}.")
    odd = [str(block.index) for block in record.blocks if is_interaction(block.unique_nats)]
    if odd:
        caption.append(f"✕ {INTERACTION} (block {', '.join(odd)}): {INTERACTION_MEANING}.")
    svg = charts.recoverable(record)
    return section("recoverable", "Recoverable loss, block by block", chart(svg, "<br/>".join(caption), _MISSING))


def losses(record: AuditRecord) -> str:
    """Show the loss now, with the witness, and what the same construction reaches without real targets."""
    loss = record.loss
    start = f"from {nats(loss.untrained_start)} at initialisation" if loss.untrained_start is not None else ""
    head_gain = None if loss.head_control is None else loss.current - loss.head_control
    rows: tuple[tuple[str, float | None, str, str], ...] = (
        ("Now", loss.current, "", "the model as it stands"),
        ("Whole witness", loss.composed, _gain(loss.composed_gain), "all blocks refined together"),
        (
            "New head only",
            loss.head_control,
            nats(head_gain, signed=True),
            "the model with its head re-fitted",
        ),
        ("Shuffled targets", loss.shuffled, _gain(loss.shuffled_gain), "null control: must gain nothing"),
        ("Untrained", loss.untrained, start, "null control: the same construction at initialisation"),
        ("Without blocks", loss.without_blocks, "", "baseline: a new head on the embedding, no block"),
        ("Counting tokens", loss.unigram, "", "baseline: how often each token occurs, no model"),
    )
    if is_of_batches(record):
        rows = tuple(row for row in rows if row[0] not in _OF_TOKENS)
    cells = [
        (esc(name), _value(nats(value)), _value(gain) if value is not None else "", esc(meaning))
        for name, value, gain, meaning in rows
    ]
    listing = table(
        ("", "loss", "gain", "what it is"), cells, caption=f"Losses on report{in_title(record)}", style="wide"
    )
    style = "good" if record.informative else "warning"
    picture = chart(
        charts.losses(record), "Each line starts at the loss now.", f"Witness and controls: {NOT_IN_BUDGET}."
    )
    return section("losses", "Loss and controls", paragraph(control_sentence(record), style), picture, listing)


def reading(record: AuditRecord) -> str:
    """Say what the colours mean, what is proven and what is not."""
    meanings = "".join(
        f"<div><dt>{chip(colour)}</dt><dd>{esc(VERDICTS[colour].meaning)}</dd></div>" for colour in counts(record)
    )
    data = data_words(record)
    text = (
        f"A witness is a set of replacement weights of the same shape. If it lowers the loss on {data} it was "
        "neither fitted nor chosen on, the model is proven to be under-optimised on this data by at least "
        "that much.",
        "If none is found, nothing is proven: the words are “none found”, never “optimal”.",
        "Unless a number says otherwise, it is measured on the report part of the probe, whose sequences "
        "were used for nothing else. Differences are paired by sequence; verdicts are adjusted for asking "
        "about many blocks (Holm), the intervals drawn are not. The adjustment is over the solo gains of all blocks; "
        "marginal gains and ablations are adjusted each for themselves, not together with them.",
        f"The probe was declared to be training {data}."
        if record.probe.in_distribution
        else f"The probe is not known to be training {data}. What can be recovered then mixes under-training "
        f"with adaptation to {this_data(record)}, which all blocks can do. Verdicts "
        "follow the marginal gain: what a block gains that the others, refined, do not. Below the margin it has "
        "nothing of its own to recover.",
    )
    points = "".join(f"<li>{esc(line)}</li>" for line in text)
    return section("reading", "How to read this", f'<dl class="meanings">{meanings}</dl>', f"<ul>{points}</ul>")


def inside(record: AuditRecord) -> str:
    """Show what ranks blocks over depth, and the share of each matrix within its block."""
    energy = chart(
        charts.energy(record),
        "The squared norm of each block's natural gradient, as far as it holds on tokens that it was not computed from "
        "(values at zero are not drawn). It is known before anything is refined. Look at a block far above its "
        "neighbours. The score ranks blocks; it proves nothing.",
        _MISSING,
    )
    shares = chart(
        charts.matrices(record),
        "Stronger colour means a larger part of the block's input-whitened score. It tells in which layer of the block "
        "the step acts.",
        _MISSING,
    )
    return section(
        "inside",
        "Inside the blocks",
        f"<h3>{esc(SIGNALS[RANKED_BY].column.capitalize())} against depth</h3>",
        energy,
        "<h3>Share of each linear layer</h3>",
        shares,
    )


def head_and_rounds(record: AuditRecord) -> str:
    """Show the output head's three values and the joint rounds."""
    head = record.head
    if head is None:
        top = paragraph(
            "Of a probe of batches the head is not fitted." if is_of_batches(record) else _MISSING, "missing"
        )
    else:
        top = pairs(
            (
                ("current", nats(head.current)),
                ("achieved by a witness", nats(head.achieved)),
                ("relaxed: no head is below this", nats(head.relaxed)),
                ("recoverable on report", _gain(head.recoverable_nats)),
            )
        ) + paragraph(
            "Fitting the head by itself is a convex problem, so its optimum is known from both sides. The first three "
            "values are on the fit tokens; achieved and relaxed are of the penalised objective "
            f"(penalty {nats(head.penalty)}). {head.steps} steps.",
            "small",
        )
    picture = chart(charts.rounds(record), "Rounds are chosen on select and reported elsewhere.", _MISSING)
    return section(
        "head",
        "Output head and joint rounds",
        "<h3>Output head by itself</h3>",
        top,
        "<h3>Joint rounds</h3>",
        picture,
        _rounds_table(record),
    )


def blocks(record: AuditRecord) -> str:
    """Show every number of every block."""
    titles = (
        "block",
        "verdict",
        *(SIGNALS[name].column for name in _COLUMNS),
        "rounds",
        "largest share",
    )
    counted = "examples" if is_of_batches(record) else "tokens"
    said = [_reason(block, reason, counted) for block, reason in zip(record.blocks, reasons(record), strict=True)]
    rows = list(map(_block_row, record.blocks, said))
    listing = table(titles, rows, caption="Every block", style="blocks")
    return section("blocks", "Every block in numbers", listing, _further_signals(record))


def verifying(record: SealedRecord) -> str:
    """Say how somebody who trusts nobody can check the certificate."""
    steps = paragraph(
        "Try the replacement weights on text of your own, which whoever made this certificate never saw: one command "
        "says what they gain there, beside what is certified here. Nothing of the author is needed but the weights. "
        "Without a text it recomputes the losses of this record, which finds forged numbers, but not weights that were "
        "fitted to the very text they are reported on."
    )
    command = "<pre><code>peelwise verify DIR --model MODEL --text FILE\npeelwise verify DIR</code></pre>"
    if not own_data(record):
        steps, command = paragraph(ON_BATCHES), f"<pre><code>{esc(VERIFY_BATCHES)}</code></pre>"
    if record.witness is None:
        return section("verify", "How to verify", steps, command, paragraph(f"Replacement weights: {NOT_IN_BUDGET}."))
    witness = record.witness
    files = pairs(
        (
            ("replacement weights", witness.file),
            ("size", f"{amount(witness.bytes, 1024, 'B')}, {witness.dtype}"),
            ("SHA-256", witness.sha256),
        )
    )
    return section("verify", "How to verify", steps, command, files)


def cost(record: SealedRecord | QuantiseRecord | AllocationRecord | QuantcheckRecord) -> str:
    """Show what the audit cost, stage by stage."""
    total = record.cost
    longest = max((stage.wall_seconds for stage in total.stages), default=0.0) or 1.0
    rows = [
        (
            esc(stage_words(stage.name)),
            esc(duration(stage.wall_seconds)),
            f"{stage.forward_equivalents:.1f}",
            f'<span class="bar" style="width:{100 * stage.wall_seconds / longest:.0f}%"></span>',
        )
        for stage in total.stages
    ]
    sentence = paragraph(
        f"{duration(total.wall_seconds)}, {total.forward_equivalents:.1f} forward passes over the probe, "
        f"peak memory {amount(total.peak_bytes, 1024, 'B')}."
    )
    titles = ("stage", "wall time", "forward passes", "")
    return section(
        "cost",
        "What it cost",
        sentence,
        table(titles, rows, caption="Cost per stage", style="wide") if rows else "",
    )


def origin(
    record: SealedRecord | QuantiseRecord | AllocationRecord | QuantcheckRecord,
    title: str = "What was audited",
    beside: tuple[tuple[str, object], ...] = (),
) -> str:
    """Show what exactly was measured, on which text, with which settings and versions; ``beside`` first."""
    model = record.model
    about = (
        *beside,
        ("model", model.name),
        ("source", model.source or "not stated"),
        ("fingerprint", model.fingerprint),
        *_about_text(record.probe, record.seed),
    )
    settings = [(name, "not set" if value is None else value) for name, value in sorted(record.settings.items())]
    notes = "".join(f"<li>{esc(note_words(note))}</li>" for note in record.notes)
    return section(
        "origin",
        title,
        f"<h3>Notes</h3><ul>{notes}</ul>" if notes else "",
        pairs(about),
        "<h3>Settings</h3>",
        pairs(settings),
        "<h3>Versions</h3>",
        pairs(sorted(record.versions.items())),
    )


def _about_text(probe: ProbeRecord | None, seed: int) -> tuple[tuple[str, object], ...]:
    if probe is None:  # a check of weights alone
        return (("probe", "none: weights alone"),)
    return (
        ("probe", probe.source),
        ("probe fingerprint", probe.fingerprint),
        *(_about_examples(probe) if probe.loss is not None else _about_sequences(probe)),
        ("seed", seed),
    )


def _about_sequences(probe: ProbeRecord) -> tuple[tuple[str, object], ...]:
    return (
        ("fit", f"{probe.fit_tokens:,} tokens in {probe.fit_sequences:,} sequences"),
        ("select", f"{probe.select_tokens:,} tokens in {probe.select_sequences:,} sequences"),
        ("report", f"{probe.report_tokens:,} tokens in {probe.report_sequences:,} sequences"),
        ("sequence length", f"{probe.sequence_length:,}"),
    )


def _about_examples(probe: ProbeRecord) -> tuple[tuple[str, object], ...]:
    given = "of a function that no file holds" if probe.loss == "given" else "the cross-entropy of the labels"
    return (
        ("loss", f"{probe.unit}, {given}"),
        ("fit", f"{probe.fit_sequences:,} examples"),
        ("select", f"{probe.select_sequences:,} examples"),
        ("report", f"{probe.report_sequences:,} examples"),
    )


def _rounds_table(record: AuditRecord) -> str:
    rows = [
        (
            str(place),
            esc(one.direction),
            significant(one.step),
            "–" if one.output_change is None else significant(one.output_change),
            nats(one.select_before),
            nats(one.select_after),
        )
        for place, one in enumerate(record.rounds, start=1)
    ]
    titles = ("round", "direction", "step", "output change", "select before", "select after")
    return table(titles, rows, caption="What each joint round chose") if rows else ""


def _block_row(block: BlockRecord, reason: str) -> tuple[str, ...]:
    return (
        f"{block.index}<small>{esc(block.name).replace('.', '.<wbr/>')}</small>",
        f"{chip(block.verdict, VERDICTS[block.verdict].short)}<small>{esc(reason)}</small>",
        esc(solo_gain(block)) if is_bounded(block) else _interval(block.recoverable_nats),
        _interval(block.unique_nats),
        _taken_out(block.removal_nats),
        _value(significant(ranking(block))),
        _value(significant(block.gradient_norm)),
        str(block.rounds) if is_measured(block) else _value(NOT_MEASURED),
        _largest_share(block),
    )


def _further_signals(record: AuditRecord) -> str:
    """Show the signals that have no column of their own, in the order of the table of signals."""
    found = {name for block in record.blocks for name in block.signals}
    names = [name for name in SIGNALS if name in found]
    rows = [
        (str(block.index), *(_value(significant(block.signals.get(name))) for name in names)) for block in record.blocks
    ]
    titles = ("block", *(SIGNALS[name].column for name in names))
    return table(titles, rows, caption="Further signals of every block", style="wide") if names else ""


def _reason(block: BlockRecord, reason: str, counted: str) -> str:
    """Return the reason, with the tokens or examples, whichever are ``counted``, that a decision would need."""
    if block.tokens_needed is None:
        return reason
    return f"{reason}; about {block.tokens_needed:,} report {counted} would decide"


def _largest_share(block: BlockRecord) -> str:
    if not block.matrices:
        return _value(NOT_MEASURED)
    largest = max(block.matrices, key=lambda matrix: matrix.share)
    return f"{percent(largest.share)}<small>{esc(largest.name).replace('.', '.<wbr/>')}</small>"


def _interval(interval: Interval | None) -> str:
    if interval is None:
        return _value(NOT_MEASURED)
    flag = f'<small class="flag">✕ {INTERACTION}</small>' if is_interaction(interval) else ""
    return f"{nats(interval.mean, signed=True)}<small>{bracket(interval)}</small>{flag}"


def _taken_out(interval: Interval | None) -> str:
    """What the loss rises by without the block; no flag, negative means something else here."""
    return (
        _value(NOT_MEASURED)
        if interval is None
        else f"{nats(interval.mean, signed=True)}<small>{bracket(interval)}</small>"
    )


def _gain(interval: Interval | None) -> str:
    return NOT_MEASURED if interval is None else f"{nats(interval.mean, signed=True)} {bracket(interval)}"


def _value(text: str) -> str:
    return f'<span class="missing">{esc(text)}</span>' if text == NOT_MEASURED else esc(text)
