"""One comparison, or a run of them, as one HTML file in the style of the audit's report."""

from __future__ import annotations

from peelwise.records.base import Interval, unit_of
from peelwise.records.compare import BlockChange, CompareRecord, CompareSeries, EndChange, TensorChange
from peelwise.show.audit import sections
from peelwise.show.compare import charts
from peelwise.show.compare.words import (
    MEANINGS,
    PATH,
    SIGNS,
    can_apply,
    conclusion,
    in_order,
    kind_words,
    mended,
    part_name,
    witness,
)
from peelwise.show.html.markup import chart, esc, pairs, paragraph, section, table
from peelwise.show.html.page import document, facts
from peelwise.show.words import NOT_IN_BUDGET, bracket, data_words, nats

_MISSING = f"{NOT_IN_BUDGET.capitalize()}."


def render_html(record: CompareRecord) -> str:
    """Return the report of a comparison as one self-contained HTML document.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    body = "".join(
        (
            _header(record),
            "<main>",
            _hero(record),
            _mended(record),
            _effects(record),
            _layers(record),
            _way(record),
            _all_parts(record),
            _reading(record),
            sections.cost(record),
            sections.origin(record, "What was compared", _old_model(record)),
            "</main>",
        )
    )
    return document(f"{record.model.name} against {record.old.name} – peelwise compare", body)


def render_series(series: CompareSeries) -> str:
    """Return the page of a run: each checkpoint against the one before it.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    rows = [
        (
            esc(one.model.name),
            nats(one.loss.new),
            _interval(one.loss.damage),
            esc(", ".join(map(str, one.conclusion.hurt)) or "none"),
            esc(", ".join(map(str, one.conclusion.helped)) or "none"),
            esc(conclusion(one)),
        )
        for one in series.pairs
    ]
    titles = ("checkpoint", "loss", "change of the loss", "hurt", "helped", "in words")
    caption = (
        "A row per checkpoint against the one before it. Squares: putting the earlier block back would lower the loss. "
        "Circles: it would raise it, so the change helped. The area is the size of the effect."
    )
    first = series.pairs[0].old.name if series.pairs else ""
    last = series.pairs[-1].model.name if series.pairs else ""
    body = (
        f'<header><p class="eyebrow">peelwise compare</p><h1>{esc(first)} to {esc(last)}</h1></header><main>'
        + section("time", "Each checkpoint against the one before", chart(charts.over_time(series), caption, _MISSING))
        + section("numbers", "In numbers", table(titles, rows, caption="Every pair", style="wide"), paragraph(SIGNS))
        + "</main>"
    )
    return document(f"{first} to {last} – peelwise compare", body)


def _header(record: CompareRecord) -> str:
    warning = "" if record.complete else paragraph(f"Stopped early. What is missing was {NOT_IN_BUDGET}.", "warning")
    return (
        f'<header><p class="eyebrow">peelwise compare</p><h1>{esc(record.model.name)} against {esc(record.old.name)}'
        f'</h1>{facts(record)}<p class="conclusion">{esc(conclusion(record))}</p>{warning}</header>'
    )


def _hero(record: CompareRecord) -> str:
    loss = record.loss
    number = (
        f'<p class="number">{nats(loss.damage.mean, signed=True)} <small>{esc(unit_of(record))}</small></p>'
        f'<p class="range">95 % interval {bracket(loss.damage)}</p><p class="what">loss of NEW minus loss of OLD</p>'
    )
    side = pairs(
        (
            ("loss of OLD", nats(loss.old)),
            ("loss of NEW", nats(loss.new)),
            ("interaction", nats(loss.interaction, signed=True)),
            ("changed blocks", f"{len(record.conclusion.changed)} of {len(record.blocks)}"),
        )
    )
    return (
        f'<section id="loss" class="card"><div class="hero"><div>{number}</div><div>{side}</div></div>'
        f"{_strip(record)}</section>"
    )


def _mended(record: CompareRecord) -> str:
    """Say what all parts that hurt repair together, and how to write and recheck that."""
    said = mended(record)
    commands = ["peelwise verify DIR --old OLD --new NEW --text FILE"]
    if can_apply(record):
        commands.append("peelwise apply DIR --old OLD --new NEW --out FOLDER")
    shown = "\n".join(map(esc, commands))
    return section(
        "mended",
        "Put back together, and checked",
        paragraph(said) if said else "",
        f"<pre><code>{shown}</code></pre>",
        paragraph(
            "DIR is the folder of this page. verify puts OLD's parts into NEW again, also on your own text; apply "
            "writes NEW with those that hurt put back. OLD itself is the witness: nothing else has to be believed."
        ),
    )


def _strip(record: CompareRecord) -> str:
    """Draw a tile per block: red hurts, green helped, striped changed, quiet unchanged."""
    found, cells = record.conclusion, []
    for block in record.blocks:
        if block.index in found.hurt:
            style, letter, said = "red", "−", "hurts"
        elif block.index in found.helped:
            style, letter, said = "green", "+", "helped"
        elif block.kind_of_change == "unchanged":
            style, letter, said = "grey", "=", "unchanged"
        else:
            style, letter, said = "yellow", "~", "changed, no effect above the margin"
        label = f"Block {block.index}: {said}"
        cells.append(
            f'<li title="{esc(label)}" aria-label="{esc(label)}"><b class="tile {style}">{letter}</b>'
            f"<i>{block.index}</i></li>"
        )
    columns = -(-len(cells) // max(1, -(-len(cells) // 32)))
    return (
        f'<ol class="strip" style="--columns:{columns}" aria-label="Blocks, first to last">{"".join(cells)}</ol>'
        '<p class="small">− the change hurts · + it helped · ~ changed without an effect above the margin · = the same '
        "in both models</p>"
    )


def _effects(record: CompareRecord) -> str:
    margin = f"Dotted: the margin of {nats(record.margin_nats)}. Bars are 95 % intervals, paired by sequence; squares "
    caption = f"{margin}are blocks whose repair is above it, with all blocks asked about at once (Holm)."
    return section(
        "effects",
        "What each part's change does",
        paragraph(SIGNS),
        chart(charts.effects(record), esc(caption), _MISSING),
        "<h3>How far weights and outputs moved</h3>",
        chart(
            charts.distances(record),
            "Relative to OLD: Frobenius norms of weights; of outputs, what a block adds to its input.",
            _MISSING,
        ),
    )


def _layers(record: CompareRecord) -> str:
    parts = []
    for block in record.blocks:
        measured = [tensor for tensor in block.tensors if tensor.repairs_nats is not None]
        if measured:
            parts.append(f"<h3>Block {block.index}</h3>")
            titles = ("layer", "repairs", "moved by", "kind of change")
            rows = [_tensor_row(tensor) for tensor in measured]
            parts.append(table(titles, rows, caption=f"Layers of block {block.index}", style="wide"))
    if not parts:
        return ""
    return section("layers", "Layer by layer, where it matters most", *parts)


def _tensor_row(tensor: TensorChange) -> tuple[str, ...]:
    return (
        esc(tensor.name),
        _interval(tensor.repairs_nats),
        f"{100 * tensor.relative_distance:.3g} %",
        esc(kind_words(tensor.kind_of_change, tensor.kind_values)),
    )


def _way(record: CompareRecord) -> str:
    drawn = charts.path(record)
    if not drawn and sum(part.kind_of_change != "unchanged" for part in in_order(record)) < 2:
        return ""  # a single step is what the part repairs
    return section("way", "From NEW to OLD, part by part", paragraph(PATH), chart(drawn, "", _MISSING))


def _all_parts(record: CompareRecord) -> str:
    titles = ("part", "kind of change", "repairs", "breaks", "steps", "interaction", "weights moved", "output moved")
    parts = in_order(record)
    rows = [_part_row(part) for part in parts if part.kind_of_change != "unchanged"]
    drawn = table(titles, rows, caption="Every part that changed", style="blocks") if rows else ""
    same = len(parts) - len(rows)
    which = (
        f"The other {same} parts are" if rows and same > 1 else "The other part is" if rows else f"All {same} parts are"
    )
    quiet = f"{which} the same in both models: equal weights that compute the same, so exchanging them does nothing."
    return section("parts", "Every changed part in numbers", paragraph(quiet) if same else "", drawn)


def _old_model(record: CompareRecord) -> tuple[tuple[str, object], ...]:
    old = record.old
    return (("OLD", old.name), ("source of OLD", old.source or "not stated"), ("fingerprint of OLD", old.fingerprint))


def _part_row(part: BlockChange | EndChange) -> tuple[str, ...]:
    steps = [part.path_from_first_nats, part.path_from_last_nats]
    return (
        esc(part_name(part)),
        esc(kind_words(part.kind_of_change, part.kind_values)),
        _interval(part.repairs_nats),
        _interval(part.breaks_nats),
        "<br/>".join("–" if step is None else nats(step.mean, signed=True) for step in steps),
        "–" if part.interaction_nats is None else nats(part.interaction_nats, signed=True),
        f"{100 * part.relative_distance:.3g} %",
        f"{100 * part.output_distance:.3g} %",
    )


def _reading(record: CompareRecord) -> str:
    met = dict.fromkeys([b.kind_of_change for b in record.blocks] + [e.kind_of_change for e in record.ends])
    meanings = "".join(
        f"<div><dt>{esc(kind_words(code, {}))}</dt><dd>{esc(MEANINGS[code])}</dd></div>"
        for code in met
        if code in MEANINGS
    )
    text = (
        witness(record),
        "Every part is run by the model that it comes from: its weights, its code, the arguments its model calls it "
        "with. A model put together from all parts of OLD has OLD's loss exactly.",
        "Everything is measured on the report part of the probe; nothing was fitted. Which blocks are looked at layer "
        f"by layer was chosen on the same {data_words(record)}, so their effects are a little too large.",
    )
    points = f"<ul>{''.join(f'<li>{esc(line)}</li>' for line in text)}</ul>"
    return section("reading", "How to read this", f'<dl class="meanings">{meanings}</dl>' if meanings else "", points)


def _interval(interval: Interval | None) -> str:
    if interval is None:
        return "–"
    return f"{nats(interval.mean, signed=True)}<small>{bracket(interval)}</small>"
