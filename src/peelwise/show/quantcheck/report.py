"""A quantised model beside its parent as one HTML file and one picture: what its weights cost, layer by layer."""

from __future__ import annotations

from peelwise.records.quantcheck import LayerCheck, QuantcheckRecord
from peelwise.show.allocate import report as allocate_report
from peelwise.show.allocate import words as allocate_words
from peelwise.show.audit import sections
from peelwise.show.audit.low_bit import GAP, SAME_BITS
from peelwise.show.columns import percents, short_formats
from peelwise.show.html.markup import esc, figure, pairs, paragraph, section, table
from peelwise.show.html.page import document, heading
from peelwise.show.html.prices import Price, picture, within
from peelwise.show.quantcheck.words import ABOUT_LAYERS, ABOUT_PRICES, NOT_KEPT, activations, conclusion, survival
from peelwise.show.words import NOT_IN_BUDGET, bracket, nats

MOST_ROWS = 400


def render_html(record: QuantcheckRecord) -> str:
    """Return the report as one self-contained HTML document, the same for the same record."""
    said = [*activations(record), *survival(record), *([] if record.loss.kept else [NOT_KEPT])]
    parts = (
        f'{heading("quantcheck", record)}<p class="conclusion">{esc(conclusion(record))}</p>',
        "".join(map(paragraph, said)),
        "</header><main>",
        _strip(record),
        section(
            "prices",
            "What the weights of each layer cost",
            paragraph(_about_prices(record)),
            figure(render_picture(record)),
        ),
        _table(record),
        _fine_tune(record),
        _plan(record),
        sections.cost(record),
        sections.origin(record, "What was compared", (("parent", record.parent.name),)),
        "</main>",
    )
    return document(f"{record.quantised.name} – peelwise quantcheck", "".join(parts))


def render_picture(record: QuantcheckRecord) -> str:
    """Return the picture of all layers as one SVG, which can stand by itself; the numbers are bits per weight."""
    rows: dict[tuple[int, str], list[LayerCheck]] = {}
    for layer in record.layers:
        rows.setdefault((layer.block, within(layer.parameter or layer.name, layer.block)), []).append(layer)
    known = _predicted(record)
    prices = [
        Price(
            block,
            row,
            sum(layer.predicted or 0.0 for layer in layers) if known else 100 * max(layer.error for layer in layers),
            f"{layers[0].bits_per_weight:.1f}".removesuffix(".0"),
            f"{layers[0].format}, {_said(layers, known)}",
        )
        for (block, row), layers in rows.items()
    ]
    damage, left = record.loss.damage, record.loss.left
    lines = (
        f"costs {damage.mean:+.4f} {bracket(damage)} nats per token, of which {left.mean:.4f} {bracket(left)} are "
        "recoverable at the same bits",
        f"numbers: bits per weight; shade: {'what its weights are predicted to cost' if known else 'output error'}; "
        "peelwise",
    )
    title = f"{record.quantised.name} against {record.parent.name}"
    return picture(prices, title, lines, "nats per token" if known else "output error, %")


def _predicted(record: QuantcheckRecord) -> bool:
    return any(layer.predicted is not None for layer in record.layers)


def _about_prices(record: QuantcheckRecord) -> str:
    return ABOUT_PRICES if _predicted(record) else ABOUT_LAYERS


def _said(layers: list[LayerCheck], known: bool) -> str:
    if not known:
        return f"error {100 * max(layer.error for layer in layers):.3g} %"
    cost, share = (sum(values) for values in zip(*((m.predicted or 0.0, m.share or 0.0) for m in layers), strict=True))
    return f"{cost:.2g} nats, {100 * share:.1f} % of all"


def _strip(record: QuantcheckRecord) -> str:
    loss = record.loss
    number = (
        f'<p class="number">{loss.damage.mean:+.4f} <small>nats per token</small></p>'
        f'<p class="range">{esc(bracket(loss.damage))}</p>'
        '<p class="what">that the quantised weights cost on text that nothing was fitted on</p>'
    )
    side = (
        ("loss of the parent", nats(loss.parent)),
        (GAP, f"at most {nats(loss.split.price_of_precision)} {bracket(loss.price)}"),
        (SAME_BITS, f"{nats(loss.split.left_on_the_table)} {bracket(loss.left)}"),
        ("quantised", nats(loss.quantised)),
        *(
            ()
            if loss.as_run is None or loss.activations is None
            else (
                ("quantised inputs", f"{nats(loss.activations.mean)} {bracket(loss.activations)}"),
                ("as it runs", nats(loss.as_run)),
            )
        ),
    )
    inner = f'<div class="hero"><div>{number}</div><div>{pairs(side)}</div></div>'
    return f'<section id="strip" class="card">{inner}</section>'


def _table(record: QuantcheckRecord) -> str:
    shown = sorted(record.layers, key=lambda m: (m.share or 0.0, m.error), reverse=True)[:MOST_ROWS]
    known, inputs = _predicted(record), record.activations is not None
    names, options = short_formats(layer.format for layer in record.layers)
    mixed = len(names) > 1
    percent = percents(value for layer in shown for value in (layer.error, *_split(layer)))
    of_inputs = percents(layer.inputs for layer in shown)
    rows = [
        (
            esc(within(layer.name, layer.block)),
            *((esc(names[layer.format]),) if mixed else ()),
            str(layer.block),
            f"{layer.bits_per_weight:.2f}",
            *((f"{layer.predicted or 0.0:.2g}", f"{100 * (layer.share or 0.0):.1f}") if known else ()),
            percent(layer.error),
            *(percent(value) for value in _split(layer)),
            "" if layer.flipped is None else f"{100 * layer.flipped:.1f}",
            *((of_inputs(layer.inputs),) if inputs else ()),
        )
        for layer in shown
    ]
    titles = (
        "layer",
        *(("format",) if mixed else ()),
        "block",
        "bits",
        *(("nats", "share, %") if known else ()),
        "error",
        "gap at most",
        "recoverable",
        "other codes",
        *(("inputs rounded",) if inputs else ()),
    )
    shared = f" All formats: {options}." if options else ""
    form = shared if mixed else f" All hold {record.layers[0].format}."
    about = paragraph(f"Errors of outputs, gaps and what is recoverable in percent. {ABOUT_LAYERS}{form}")
    missing = sum(layer.split is None and layer.codes for layer in record.layers)
    unsolved = paragraph(f"{missing} layers: {NOT_IN_BUDGET}.", "warning") if missing else ""
    style = "numbers named" if mixed else "numbers"
    body = table(titles, rows, caption="Layers, those that cost most first", style=style)
    return section("layers", "Is it the bits or the codes?", about, unsolved, body)


def _split(layer: LayerCheck) -> tuple[float | None, float | None]:
    split = layer.split
    return (None, None) if split is None else (split.price_of_precision + split.irreducible, split.left_on_the_table)


def _fine_tune(record: QuantcheckRecord) -> str:
    found = record.fine_tune
    if found is None or not found.blocks:
        return ""
    rows = [
        (
            str(block.index),
            f"{block.lost.mean:+.4f}",
            esc(bracket(block.lost)),
            "" if block.noise is None else f"{block.noise:.2g}",
        )
        for block in found.blocks
    ]
    about = paragraph(
        "What the fine-tuned model loses if one block alone gets its quantised weights, nats per token; and how large "
        "the errors of its layers are beside what the fine-tune changed in their outputs."
    )
    titles = ("block", "lost", "95 % interval", "error / fine-tune")
    body = table(titles, rows, caption="Blocks in order", style="numbers")
    return section("fine-tune", "Where the fine-tune is lost", about, body)


def _plan(record: QuantcheckRecord) -> str:
    plan = record.allocation
    if plan is None:
        return ""
    return section(
        "plan",
        f"Where {plan.budget_bits:g} bits per weight would be of most use",
        paragraph(allocate_words.conclusion(plan)),
    ) + allocate_report.sections_of(plan)
