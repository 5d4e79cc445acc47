"""An allocation of bits as one HTML file and one picture: the price of every layer, its bits, and the curve."""

from __future__ import annotations

from peelwise.records.allocation import AllocationRecord
from peelwise.show.allocate.exports import exports
from peelwise.show.allocate.words import THIS_PLAN, conclusion, curve_rows, interaction
from peelwise.show.audit import sections
from peelwise.show.columns import short_formats
from peelwise.show.html.markup import esc, figure, pairs, paragraph, section, table
from peelwise.show.html.page import document, heading
from peelwise.show.html.prices import Price, picture, within
from peelwise.show.words import bracket, nats

MOST_ROWS = 400


def render_html(record: AllocationRecord) -> str:
    """Return the report as one self-contained HTML document, the same for the same record."""
    parts = (
        f'{heading("allocate", record)}<p class="conclusion">{esc(conclusion(record))}</p></header><main>',
        _strip(record),
        sections_of(record),
        sections.cost(record),
        sections.origin(record, "What was measured"),
        "</main>",
    )
    return document(f"{record.model.name} – peelwise allocate", "".join(parts))


def sections_of(record: AllocationRecord) -> str:
    """Return the plan itself: the price of each layer, the curve, every layer, and the plan for other tools."""
    parts = (
        section("plan-prices", "The price of each layer", figure(render_picture(record))),
        _curve(record),
        _table(record),
        _others(record),
    )
    return "".join(parts)


def render_picture(record: AllocationRecord) -> str:
    """Return the price of all layers as one SVG, which can stand by itself; the numbers are bits per weight."""
    prices = [
        Price(
            layer.block,
            within(layer.name, layer.block),
            layer.predicted.get(layer.format, 0.0),
            f"{layer.bits_per_weight:.1f}".removesuffix(".0"),
            f"{layer.format}, {layer.predicted.get(layer.format, 0.0):.2g} nats",
        )
        for layer in record.stored
    ]
    lines = (
        f"costs {record.damage.mean:+.4f} {bracket(record.damage)} nats per token; numbers: bits per weight",
        "shade: what the layer's format is predicted to cost; peelwise",
    )
    return picture(
        prices, f"{record.model.name} in {record.bits_per_weight:.2f} bits per weight", lines, "nats per token"
    )


def _strip(record: AllocationRecord) -> str:
    number = (
        f'<p class="number">{record.bits_per_weight:.2f} <small>bits per weight</small></p>'
        f'<p class="what">of at most {record.budget_bits:g}</p>'
    )
    rivals = [(name, gain) for name, gain in record.better_than.items() if record.chosen != f"uniform {name}"]
    side = (
        ("loss of the parent", nats(record.parent_loss)),
        ("with this plan", nats(record.parent_loss + record.damage.mean)),
        ("damage", f"{record.damage.mean:+.4f} {bracket(record.damage)}"),
        *((f"less than {name}", f"{gain.mean:.4f} {bracket(gain)}") for name, gain in rivals),
    )
    inner = f'<div class="hero"><div>{number}</div><div>{pairs(side)}</div></div>'
    return f'<section id="strip" class="card">{inner}</section>'


def _curve(record: AllocationRecord) -> str:
    rows = [
        (
            f"<strong>{esc(name)}</strong>" if name == THIS_PLAN else esc(name),
            f"{bits:.2f}",
            nats(loss),
            f"{damage.mean:+.4f}",
            esc(bracket(damage)),
        )
        for bits, name, loss, damage in curve_rows(record)
    ]
    titles = ("formats", "bits", "loss", "damage", "95 % interval")
    body = table(titles, rows, caption="Everything measured, by bits", style="numbers")
    said = paragraph(f"Interactions: {interaction(record)}.")
    return section("curve", "Loss against bits", body, said)


def _table(record: AllocationRecord) -> str:
    shown = sorted(record.stored, key=lambda layer: layer.share, reverse=True)[:MOST_ROWS]
    names, options = short_formats(record.formats)
    rows = [
        (
            esc(within(layer.name, layer.block)),
            esc(names[layer.format]),
            str(layer.block),
            f"{layer.bits_per_weight:.2f}",
            f"{100 * layer.share:.1f}",
            *(f"{layer.predicted[form]:.2g}" if form in layer.predicted else "" for form in record.formats),
        )
        for layer in shown
    ]
    titles = ("layer", "gets", "block", "bits", "share, %", *(f"in {names[form]}" for form in record.formats))
    shared = f" All formats: {options}." if options else ""
    about = paragraph(f"What each layer is predicted to cost in each format, nats per token.{shared}")
    body = table(titles, rows, caption="Layers, largest share first", style="numbers named")
    return section("plan-layers", "Every layer of the plan", about, body)


def _others(record: AllocationRecord) -> str:
    written = "".join(
        f"<h3>{esc(name)}</h3><pre><code>{esc(text)}</code></pre>" for name, text in sorted(exports(record).items())
    )
    return section("exports", "The plan for other tools", written)
