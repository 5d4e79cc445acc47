"""One anatomy as one HTML file in the style of the audit's report."""

from __future__ import annotations

from peelwise.records.anatomy import ABLATIONS, BENDS, AnatomyRecord, BlockAnatomy
from peelwise.records.base import Interval
from peelwise.show.anatomy import charts, words
from peelwise.show.audit import sections
from peelwise.show.html.markup import chart, esc, pairs, paragraph, section, table
from peelwise.show.html.page import document, heading
from peelwise.show.words import NOT_IN_BUDGET, bracket, nats

_MISSING = f"{NOT_IN_BUDGET.capitalize()}."
_MOST_CORRELATIONS = 20


def render_html(record: AnatomyRecord) -> str:
    """Return the report of an anatomy as one self-contained HTML document.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    body = "".join(
        (
            _header(record),
            "<main>",
            _hero(record),
            _ablation(record),
            _bending(record),
            _recovery(record),
            _predictability(record),
            _correlations(record),
            _reading(),
            sections.cost(record),
            sections.origin(record, "What was studied"),
            "</main>",
        )
    )
    return document(f"{record.model.name} – peelwise anatomy", body)


def _header(record: AnatomyRecord) -> str:
    warning = "" if record.complete else paragraph(f"Stopped early. What is missing was {NOT_IN_BUDGET}.", "warning")
    return f'{heading("anatomy", record)}<p class="conclusion">{esc(words.conclusion(record))}</p>{warning}</header>'


def _hero(record: AnatomyRecord) -> str:
    number = (
        f'<p class="number">{len({each.block for each in record.better_without})} '
        f"<small>of {len(record.blocks)} blocks</small></p>"
        '<p class="what">without which, or without a part of which, the model is better</p>'
    )
    side = pairs((("loss on report", f"{nats(record.loss)} nats per token"), ("margin", nats(record.margin_nats))))
    return f'<section id="better" class="card"><div class="hero"><div>{number}</div><div>{side}</div></div></section>'


def _ablation(record: AnatomyRecord) -> str:
    ways = [way for way in ABLATIONS if any(way in block.ablation for block in record.blocks)]
    titles = ("block", *(words.ABLATIONS[way] for way in ways), "predicted")
    rows = [
        (str(b.index), *(_cost(b.ablation.get(way)) for way in ways), _interval(b.predicted)) for b in record.blocks
    ]
    meanings = "".join(
        f"<div><dt>{esc(words.ABLATIONS[way])}</dt><dd>{esc(words.ABLATION_MEANINGS[way])}</dd></div>" for way in ways
    )
    return section(
        "ablation",
        "What each block is worth",
        chart(charts.ablation(record), "Dotted: the margin. Bars are 95 % intervals, paired by sequence.", _MISSING),
        f'<dl class="meanings">{meanings}</dl>' if meanings else "",
        table(
            titles,
            rows,
            caption="Cost of ablating each block: nats per token, and times the perplexity",
            style="blocks",
        )
        if ways
        else "",
    )


def _bending(record: AnatomyRecord) -> str:
    titles = ("block", *(words.BENDS[kind] for kind in BENDS), "best scale", "its gain")
    rows = [_bent_row(block) for block in record.blocks if block.bent]
    return section(
        "bending",
        "How far each block bends",
        paragraph(words.TOLERATED),
        chart(charts.scaling(record), "A line per block, its number at the left. Dotted: the margin.", _MISSING),
        table(titles, rows, caption="Largest strength within the margin", style="wide") if rows else "",
    )


def _recovery(record: AnatomyRecord) -> str:
    rows = [
        (
            str(block.index),
            _interval(recovery.damage),
            _interval(recovery.left),
            "–" if recovery.share is None else f"{100 * recovery.share:.0f} %",
            esc(words.retrained(block)),
        )
        for block in record.blocks
        if (recovery := block.recovery) is not None
    ]
    if not rows:
        return ""
    titles = ("block", "the noise costs", "left after one round", "recovered", "retrained, in steps")
    drawn = table(titles, rows, caption="What a damaged block wins back", style="blocks")
    return section("recovery", "How fast each block recovers", paragraph(words.RECOVERED), drawn)


def _bent_row(block: BlockAnatomy) -> tuple[str, ...]:
    best = block.best_scale
    return (
        str(block.index),
        *("–" if (bent := words.bent_of(block, kind)) is None else esc(words.tolerated(bent)) for kind in BENDS),
        "–" if best is None else f"{best.factor:.3g}",
        "–" if best is None else nats(best.gain.mean, signed=True),
    )


def _predictability(record: AnatomyRecord) -> str:
    titles = ("matrix", "ridge R2", "control", "neighbours R2", "shuffled order, 95 %", "mean R2", "control", "deltas",
              "shuffled order, 95 %", "control")  # fmt: skip
    rows = [
        (
            esc(each.part),
            f"{each.explained.ridge:.3f}",
            f"{each.independent.ridge:.3f}",
            f"{each.explained.neighbours:.3f}",
            _range(each.neighbours_shuffled),
            f"{each.explained.mean:.3f}",
            f"{each.independent.mean:.3f}",
            f"{each.deltas:.3f}",
            _range(each.deltas_shuffled),
            f"{each.deltas_independent:.3f}",
        )
        for each in record.predictability
    ]
    drawn = table(titles, rows, caption="Predictability of weights with controls", style="wide") if rows else ""
    return section("weights", "What other blocks tell of the weights", paragraph(words.CONTROLS), drawn)


def _correlations(record: AnatomyRecord) -> str:
    if not record.correlations:
        return ""
    parts = []
    for target, title in (("skipped", "With what skipping the block costs"), ("recovery", "With the share recovered")):
        found = sorted((c for c in record.correlations if c.target == target), key=lambda c: (c.p, -abs(c.rho)))
        rows = [
            (f"<b>{esc(c.column)}</b>" if c.significant else esc(c.column), f"{c.rho:+.2f}", f"{c.p:.2g}")
            for c in found[:_MOST_CORRELATIONS]
        ]
        if rows:
            parts += [f"<h3>{esc(title)}</h3>", table(("column", "rho", "p"), rows, caption=title, style="wide")]
    return section("correlations", "What goes with it", paragraph(words.CORRELATED), *parts)


def _reading() -> str:
    lines = (
        words.SIGNS,
        "Means are those of the fit tokens, the best scale was chosen on select, all that is shown is from report.",
        "What a block costs on this text says nothing of other text, and blocks that cost nothing one at a time may "
        "cost much together.",
    )
    return section("reading", "How to read this", f"<ul>{''.join(f'<li>{esc(line)}</li>' for line in lines)}</ul>")


def _range(spread: tuple[float, float, float]) -> str:
    return f"{spread[1]:.3f} .. {spread[2]:.3f}"


def _cost(cost: Interval | None) -> str:
    """Return a cost with its interval and what it multiplies the perplexity by."""
    return _interval(cost) if cost is None else f"{_interval(cost)}<small>{esc(words.times(cost))}</small>"


def _interval(interval: Interval | None) -> str:
    return "–" if interval is None else f"{nats(interval.mean, signed=True)}<small>{bracket(interval)}</small>"
