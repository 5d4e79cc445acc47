"""A quantised model as one HTML file and one picture: what it costs, and what each of its layers does."""

from __future__ import annotations

from peelwise.records.quantise import QuantisedLayer, QuantiseRecord
from peelwise.show.audit import sections
from peelwise.show.columns import percents, short_formats
from peelwise.show.html.markup import bar, esc, figure, pairs, paragraph, section, table
from peelwise.show.html.page import document, heading
from peelwise.show.html.prices import Price, picture, within
from peelwise.show.quantise.words import ABOUT_LAYERS, STEPS, conclusion
from peelwise.show.words import bracket, nats

MOST_ROWS = 400


def render_html(record: QuantiseRecord) -> str:
    """Return the report as one self-contained HTML document, the same for the same record."""
    parts = (
        f'{heading("quantise", record)}<p class="conclusion">{esc(conclusion(record))}</p></header><main>',
        _strip(record),
        section("layers", "What each layer loses", paragraph(ABOUT_LAYERS), figure(render_picture(record))),
        _behind(record),
        _table(record),
        _skipped(record),
        sections.cost(record),
        sections.origin(record, "What was quantised"),
        "</main>",
    )
    return document(f"{record.model.name} – peelwise quantise", "".join(parts))


def render_picture(record: QuantiseRecord) -> str:
    """Return the picture of all layers as one SVG, which can stand by itself."""
    loss = record.loss
    rows: dict[tuple[int, str], list[float]] = {}
    for layer in record.layers:
        rows.setdefault((layer.block, _row(layer)), []).append(_last(layer))
    prices = [
        Price(
            block,
            row,
            100 * max(errors),
            said=f"{100 * max(errors):.3g} %" + (f", the most of {len(errors)} experts" if len(errors) > 1 else ""),
        )
        for (block, row), errors in rows.items()
    ]
    lines = (
        f"costs {loss.damage.mean:+.4f} {bracket(loss.damage)} nats per token; rounding to nearest "
        f"{loss.rounding_damage.mean:+.4f} {bracket(loss.rounding_damage)}",
        "each layer: error of its output in percent of its mean square (white: below 0), on held-out text; peelwise",
    )
    bits = f"{record.model.name} in {record.format}, {record.bits_per_weight:.2f} bits per weight"
    return picture(prices, bits, lines, "output error, %")


def _strip(record: QuantiseRecord) -> str:
    loss = record.loss
    number = (
        f'<p class="number">{loss.damage.mean:+.4f} <small>nats per token</small></p>'
        f'<p class="range">{esc(bracket(loss.damage))}</p><p class="what">lost on text that nothing was fitted on</p>'
    )
    side = (
        ("loss of the parent", nats(loss.parent)),
        ("quantised", nats(loss.quantised)),
        ("rounded to nearest", f"{nats(loss.rounded)} ({loss.rounding_damage.mean:+.4f})"),
        ("less than rounding", f"{nats(loss.recovered.mean)} {bracket(loss.recovered)}"),
        ("bits per weight", f"{record.bits_per_weight:.2f}"),
    )
    inner = f'<div class="hero"><div>{number}</div><div>{pairs(side)}</div></div>'
    return f'<section id="strip" class="card">{inner}</section>'


def _behind(record: QuantiseRecord) -> str:
    top = max((block.error for block in record.blocks), default=0.0) or 1.0
    percent = percents(block.error for block in record.blocks)
    rows = [(str(block.index), percent(block.error), bar(block.error / top)) for block in record.blocks]
    about = "Squared distance of the stream behind each block from the parent's, in percent of its variance there."
    body = table(("block", "percent", ""), rows, caption=about, style="bars")
    return section("blocks", "Behind each block", paragraph(about), body)


def _table(record: QuantiseRecord) -> str:
    shown = sorted(record.layers, key=_last, reverse=True)[:MOST_ROWS]
    steps = [step for step in STEPS if any(step in layer.steps for layer in shown)]
    names, options = short_formats(layer.format for layer in record.layers)
    mixed = len(names) > 1  # one format for all is said above
    percent = percents(layer.steps.get(step) for layer in shown for step in steps)
    rows = [
        (
            esc(within(layer.name, layer.block)),
            *((esc(names[layer.format]),) if mixed else ()),
            str(layer.block),
            *((f"{layer.bits_per_weight:.2f}",) if mixed else ()),
            *(percent(layer.steps.get(step)) for step in steps),
            f"{100 * layer.flipped:.1f}",
        )
        for layer in shown
    ]
    own = (("format",), ("bits",)) if mixed else ((), ())
    titles = ("layer", *own[0], "block", *own[1], *(STEPS[step] for step in steps), "other codes")
    shared = f" All formats: {options}." if options else ""
    about = paragraph(f"Other codes: those that rounding to nearest does not give.{shared}")
    style = "numbers named" if mixed else "numbers"
    body = table(titles, rows, caption="Layers, those that lose most first", style=style)
    return section("steps", "What each step came to, percent", about, body)


def _skipped(record: QuantiseRecord) -> str:
    if not record.skipped:
        return ""
    names = "".join(f"<li>{esc(name)}</li>" for name in record.skipped[:MOST_ROWS])
    return section("skipped", f"Left in full precision: {len(record.skipped)}", f"<ul>{names}</ul>")


def _row(layer: QuantisedLayer) -> str:
    """Return the name of a layer within its block; experts of one parameter have one row, or it would be too tall."""
    return within(layer.parameter or layer.name, layer.block)


def _last(layer: QuantisedLayer) -> float:
    return list(layer.steps.values())[-1] if layer.steps else 0.0
