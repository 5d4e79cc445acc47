"""One check as one HTML file: no script, no network; every signal of every block in small charts over depth."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from peelwise.records.check import BlockCheck, CheckRecord, SignalReason, UnlikeBlock
from peelwise.records.signals import FROM_BACKWARD, FROM_FORWARD, FROM_WEIGHTS, SIGNALS, title_of
from peelwise.show.audit import sections
from peelwise.show.check import charts
from peelwise.show.check.words import (
    NOT_EXCLUDED,
    UNLIKE,
    ablation_of,
    blocks_words,
    conclusion,
    deviation_words,
    named_blocks,
    part_words,
    reason_words,
    rest_words,
    score_words,
    share_of_bar,
    shown_witnesses,
    story,
)
from peelwise.show.html.markup import esc, pairs, paragraph, section, table
from peelwise.show.html.page import document, heading
from peelwise.show.words import (
    behind,
    bracket,
    in_title,
    is_of_batches,
    nats,
    note_words,
    own_data,
    significant,
    this_data,
)

MOST_IN_A_ROW = 32
MOST_STORIES = 8  # named blocks that are told one by one
_GROUPS = (
    ("weights", "From the weights", FROM_WEIGHTS),
    ("forward", "From a pass forward", FROM_FORWARD),
    ("backward", "From a pass forward and back", FROM_BACKWARD),
)
Rows = Mapping[str, Mapping[str, charts.Row]]
Styles = Mapping[str, charts.Style]


def render_html(record: CheckRecord) -> str:
    """Return the report of a check as one self-contained HTML document, the same for the same record.

    Args:
        record: what was found; what was not measured is named as such.
    """
    rows, styles = charts.rows_of(record), charts.styles_of(record)
    parts = (
        _header(record),
        "<main>",
        _strip(record),
        _stories(record, rows, styles),
        _witnesses(record),
        _signals(record, rows, styles),
        _reading(record),
        _verifying(record),
        sections.cost(record),
        sections.origin(record, "What was checked"),
        "</main>",
    )
    return document(f"{record.model.name} – peelwise check", "".join(parts))


def _verifying(record: CheckRecord) -> str:
    """Say how somebody who trusts nobody can check the certificate."""
    if record.probe is None:
        said, commands = "One command makes this check again, and compares every signal and score.", []
    else:
        said = (
            "Try the factors on text of your own, which whoever made this certificate never saw. Without a text verify "
            "recomputes losses, ablations and factors on the author's; in full it makes the check again, and compares "
            "every signal, score and named block."
        )
        commands = ["peelwise verify DIR --model MODEL --text FILE"]
    if record.probe is not None and not own_data(record):
        code = f"<pre><code>{esc(sections.VERIFY_BATCHES)}</code></pre>"
        return section("verify", "How to verify", paragraph(sections.ON_BATCHES), code)
    commands.append("peelwise verify DIR --model MODEL --full")
    code = "\n".join(commands)
    return section("verify", "How to verify", paragraph(said), f"<pre><code>{code}</code></pre>")


def _header(record: CheckRecord) -> str:
    codes = ("no-text", "no-gradients")
    missing = [note_words(note) for note in record.notes if not isinstance(note, str) and note.code in codes]
    return (
        f"{heading('check', record)}"
        f'<p class="conclusion">{esc(conclusion(record))}</p>'
        f"{''.join(paragraph(line, 'warning') for line in missing)}</header>"
    )


def _strip(record: CheckRecord) -> str:
    """All blocks by score, and what the factors gain: what a reader in a hurry should see."""
    side = [("loss on report", f"{nats(record.loss)}{behind(record)}")] if record.loss is not None else []
    if record.composed_gain is not None:
        gain = f"{nats(record.composed_gain.mean, signed=True)} {bracket(record.composed_gain)}"
        side += [("loss with the best factors", nats(record.composed_loss)), ("gain", gain)]
    if record.unlike is None:
        number, tiles = paragraph("no depth to compare with", "number missing"), ""
    else:
        number = (
            f'<p class="number">{len(record.unlike)} <small>of {esc(blocks_words(len(record.blocks)))}</small></p>'
            '<p class="what">unlike their neighbours</p>'
        )
        side = [("named from a score of", score_words(record.threshold)), *side]
        tiles = _tiles(record)
    return (
        f'<section id="strip" class="card"><div class="hero"><div>{number}</div><div>{pairs(side)}</div></div>'
        f"{tiles}</section>"
    )


def _tiles(record: CheckRecord) -> str:
    rows = max(1, math.ceil(len(record.blocks) / MOST_IN_A_ROW))
    columns = max(1, math.ceil(len(record.blocks) / rows))
    named = set(named_blocks(record))
    cells = "".join(_cell(block, record.threshold, block.index in named) for block in record.blocks)
    return (
        f'<ol class="strip" style="--columns:{columns}" aria-label="Score of each block, first to last">{cells}</ol>'
        '<p class="small">Scores: larger is more unlike the neighbours. A full tile is twice the score from which a '
        "block is named.</p>"
    )


def _cell(block: BlockCheck, threshold: float, named: bool) -> str:
    score = block.score
    said = "no score" if score is None else f"score {score_words(score)}"
    label = f"Block {block.index} ({block.name}): {said}{', unlike its neighbours' if named else ''}"
    style = f'class="tile score{" named" if named else ""}" style="--share:{100 * share_of_bar(score, threshold):.0f}%"'
    return (
        f'<li title="{esc(label)}" aria-label="{esc(label)}" data-block="{block.index}">'
        f"<b {style}>{score_words(score)}</b><i>{block.index}</i></li>"
    )


def _stories(record: CheckRecord, rows: Rows, styles: Styles) -> str:
    if not record.unlike:
        return ""
    told = "".join(_story(record, each, rows, styles) for each in record.unlike[:MOST_STORIES])
    rest = len(record.unlike) - MOST_STORIES
    more = paragraph(f"{blocks_words(rest)} more: their reasons are in certificate.json.", "small") if rest > 0 else ""
    return section("unlike", "Unlike their neighbours", told, more)


def _story(record: CheckRecord, unlike: UnlikeBlock, rows: Rows, styles: Styles) -> str:
    ablation = ablation_of(record, unlike.block)
    heading = f"Block {unlike.block}: score {score_words(unlike.score)}"
    proved = story(record, unlike)[len(unlike.reasons) :]
    figures = "".join(_reason(reason, unlike.block, rows, styles) for reason in unlike.reasons)
    lines = "".join(paragraph(line) for line in proved)
    if ablation is None and record.probe is not None:
        lines = paragraph("Ablation and factors were not measured for this block.", "small")
    return f'<h3>{esc(heading)}</h3>{lines}<div class="small-charts">{figures}</div>'


def _reason(reason: SignalReason, block: int, rows: Rows, styles: Styles) -> str:
    part = reason.part
    drawn = {part: rows[reason.signal][part]} if part in rows.get(reason.signal, {}) else {}
    # One line needs no dashes.
    picture = charts.chart(reason.signal, drawn, {part: replace(styles[part], dash="")}, [block]) if drawn else ""
    said = f"{reason_words(reason)} Robust z {deviation_words(reason.deviation)}."
    return f"<figure><h4>{esc(_heading(reason.signal))}</h4>{picture}<figcaption>{esc(said)}</figcaption></figure>"


def _witnesses(record: CheckRecord) -> str:
    if not record.gain_witnesses:
        return ""
    shown = shown_witnesses(record)
    cells = [
        (
            str(witness.block),
            esc(part_words(witness.part) + ("" if witness.head is None else f", head {witness.head}")),
            f"{witness.factor:.3g}",
            f"{nats(witness.gain.mean, signed=True)} {bracket(witness.gain)}",
            esc(nats(witness.select_gain, signed=True)),
            "yes" if witness.composed else "",
        )
        for witness in shown
    ]
    about = (
        "Each factor multiplies the weight (and bias) of one part. It was found on select; its gain is measured on "
        "report, which was used for nothing else. 0 takes the part out, below 0 its sign is turned. An interval above "
        f"0 proves that this factor lowers the loss on {this_data(record)}."
    )
    if record.composed_gain is not None:
        about += f" Those marked as together gain {nats(record.composed_gain.mean)} {bracket(record.composed_gain)}."
    titles = ("block", "part", "factor", f"gain{in_title(record)}", "gain on select", "together")
    listing = table(titles, cells, caption="Gain witnesses") if shown else ""
    rest = len(record.gain_witnesses) - len(shown)
    more = paragraph(rest_words(rest), "small") if rest else ""
    return section("witnesses", "Gain witnesses: factors on parts of a block", paragraph(about), listing, more)


def _signals(record: CheckRecord, rows: Rows, styles: Styles) -> str:
    named, of = named_blocks(record), "loss" if is_of_batches(record) else "nats"
    parts = {part for drawn in rows.values() for part in drawn}
    about = (
        "Each chart is one signal over depth, from the first block on the left to the last, with a line for each part. "
        "On the left stand the smallest, the median and the largest value. Quotients are logarithmic; the others are "
        "linear near the median and logarithmic far away."
    )
    shaded = " Shaded: blocks unlike their neighbours." if named else ""
    groups = [
        f'<h3 id="{anchor}">{esc(title)}</h3><div class="small-charts">'
        f"{''.join(_small(name, rows, styles, named, of) for name in names)}</div>"
        for anchor, title, kinds in _GROUPS
        if (names := [name for name in SIGNALS if SIGNALS[name].kind in kinds and _varies(rows.get(name, {}))])
    ]
    legend = charts.legend(parts, styles)
    return section("signals", "Every signal over depth", paragraph(about + shaded), legend, *groups, _constant(rows))


def _varies(rows: Mapping[str, charts.Row]) -> bool:
    return len(set(charts.known(rows))) > 1


def _constant(rows: Rows) -> str:
    """Name the signals that are the same everywhere, which need no chart."""
    same = [
        f"{title_of(name)} ({significant(charts.known(rows[name])[0])})"
        for name in SIGNALS
        if name in rows and not _varies(rows[name])
    ]
    return paragraph(f"The same everywhere: {', '.join(same)}.", "small") if same else ""


def _small(name: str, rows: Rows, styles: Styles, named: list[int], of: str) -> str:
    signal = SIGNALS[name]
    unit = f" <small>{esc(signal.unit.replace('nats', of))}</small>" if signal.unit else ""
    picture = charts.chart(name, rows[name], styles, named)
    return (
        f'<figure id="signal-{name}"><h4>{esc(_heading(name))}{unit}</h4>{picture}'
        f"<figcaption>{esc(signal.meaning)}</figcaption></figure>"
    )


def _heading(name: str) -> str:
    title = title_of(name)
    return title[:1].upper() + title[1:]


def _reading(record: CheckRecord) -> str:
    lines = [
        UNLIKE,
        NOT_EXCLUDED,
        "The score of a block combines what its gain slopes say that those of other blocks do not, how far its signals "
        "of structure are from those of the blocks up to three away (robust z), and what a few factors gain.",
        "A large gain slope says that less (above 0) or more (below 0) of what a part gives would lower the loss; it "
        "is the derivative, not a proof.",
    ]
    if record.probe is not None and not record.probe.in_distribution:
        lines.append(
            "The text is not known to be training text. Signals of the passes are those on this text; another text may "
            "use the blocks otherwise."
            if not is_of_batches(record)
            else "The examples are not known to be training data. Signals of the passes are those on these examples; "
            "others may use the blocks otherwise."
        )
    return section("reading", "How to read this", f"<ul>{''.join(f'<li>{esc(line)}</li>' for line in lines)}</ul>")
