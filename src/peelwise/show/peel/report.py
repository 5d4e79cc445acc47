"""One peel as one HTML file, in the style of the audit's report."""

from __future__ import annotations

import math

from peelwise.records.base import Interval
from peelwise.records.peel import MapRecord, PeelRecord, StationRecord
from peelwise.show.audit import sections
from peelwise.show.html.markup import chart, esc, pairs, paragraph, section, table
from peelwise.show.html.page import document, heading
from peelwise.show.peel import charts as peel_charts
from peelwise.show.peel.words import (
    CAVEAT,
    STATION_WORDS,
    beats_head,
    conclusion,
    control_rows,
    control_sentence,
    stations,
)
from peelwise.show.words import NOT_IN_BUDGET, NOT_MEASURED, bracket, duration, nats

_MOST_IN_A_ROW = 32


def render_html(record: PeelRecord) -> str:
    """Return the report of a peel as one self-contained HTML document.

    Args:
        record: What the peel found; parts that were not measured are named as such.

    Returns:
        The document, the same for the same record and the same version of matplotlib.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    parts = (
        _header(record),
        "<main>",
        _hero(record),
        _maps(record),
        _controls(record),
        _stations(record),
        _reading(record),
        _numbers(record),
        sections.verifying(record),
        sections.cost(record),
        sections.origin(record),
        "</main>",
    )
    return document(f"{record.model.name} – peelwise peel", "".join(parts))


def _header(record: PeelRecord) -> str:
    warnings = []
    if not record.complete:
        warnings.append(f"Stopped early. What is missing below was {NOT_IN_BUDGET}.")
    if record.informative is False:
        warnings.append(control_sentence(record))
    return (
        f"{heading('peel', record)}"
        f'<p class="conclusion">{esc(conclusion(record))}</p>'
        f"{''.join(paragraph(line, 'warning') for line in warnings)}</header>"
    )


def _hero(record: PeelRecord) -> str:
    """The one number and the best map: what a reader in a hurry should see."""
    loss = record.loss
    over = loss.certified
    rival = "the model as it stands" if over == loss.bound_gain else "the model with its head re-fitted"
    if over is None or record.best_map is None:
        return f'<section class="card"><p class="number missing">{esc(NOT_IN_BUDGET)}</p></section>'
    said = (
        f"lower than {rival} (the better of the two), on text that nothing was fitted or chosen on"
        if beats_head(record)
        else f"below {rival}; no improvement is shown, which proves nothing"
    )
    number = (
        f'<p class="number">{nats(over.mean, signed=True)} <small>nats per token</small></p>'
        f'<p class="range">95 % interval {bracket(over)}</p><p class="what">{esc(said)}</p>'
    )
    side = pairs(
        (
            ("maps visited", f"{len(record.maps)} of {record.maps_total:,}"),
            ("start", f"{record.start}: {_START[record.start]}"),
            *([("references", f"inside {record.reference_formats}")] if record.reference_formats else []),
            ("best map", record.maps[0].name if record.maps else "–"),
        )
    )
    return (
        f'<section id="bound" class="card"><div class="hero"><div>{number}</div><div>{side}</div></div>'
        f"{_strip(record.best_map)}</section>"
    )


_START = {"warm": "from each block's own weights", "cold": "from initialisation"}


def _strip(best: tuple[int, ...]) -> str:
    """Draw the best map: a tile per block with the station it regresses to; its own is quiet."""
    cells = []
    for index, station in enumerate(best):
        own = station == index + 1
        label = f"Block {index} regresses to station {station}" + (", its own" if own else "")
        style = "green" if own else "yellow"
        cells.append(
            f'<li title="{esc(label)}" aria-label="{esc(label)}">'
            f'<b class="tile {style}">{station}</b><i>{index}</i></li>'
        )
    rows = max(1, math.ceil(len(best) / _MOST_IN_A_ROW))
    columns = max(1, math.ceil(len(best) / rows))
    return (
        f'<ol class="strip" style="--columns:{columns}" aria-label="Best map, first block to last">'
        f"{''.join(cells)}</ol>"
        '<p class="small">Best map: below each tile the block, in it the station its reference regresses to '
        "(striped: not its own).</p>"
    )


def _maps(record: PeelRecord) -> str:
    caption = (
        "Solid line: the model as it stands. Dashed: the model with its head re-fitted on the same tokens, which "
        "is what a map has to beat. Bars are 95 % intervals of the difference to the dashed line, paired by sequence; "
        "blue where the whole bar lies to its left. Maps are ordered by select, which chose the best."
    )
    if any(one.loss is None for one in record.maps):
        caption += " Hollow: with the model's own head, against the solid line."
    if len(record.maps) > peel_charts.MOST_ROWS:
        caption += f" The {peel_charts.MOST_ROWS} best of {len(record.maps)} are drawn."
    fits = (
        "Each tile holds the station that a block regresses to. Stronger colour: more of the station's variance (each "
        "coordinate counted alike) is missed on select. Errors add up to the right, because references stand on "
        "references."
    )
    return section(
        "maps",
        "Maps against the model",
        chart(peel_charts.maps(record), esc(caption), "No map was visited."),
        "<h3>How well each reference hits its station</h3>",
        chart(peel_charts.unexplained(record), esc(fits), "No map was visited."),
    )


def _controls(record: PeelRecord) -> str:
    loss = record.loss
    over = {
        "model, new head": loss.over_head_control,
        "model now": loss.bound_gain,
        "shuffled targets": loss.over_shuffled,
        "untrained": loss.over_untrained,
    }
    rows = [
        (esc(name.capitalize()), _value(nats(value)), _interval(over.get(name)), esc(meaning))
        for name, value, meaning in control_rows(record)
    ]
    titles = ("", "loss", "best map is lower by", "what it is")
    style = "good" if record.informative else "warning"
    listing = table(titles, rows, caption="Losses on report, nats per token", style="wide")
    return section("controls", "Loss and controls", paragraph(control_sentence(record), style), listing)


def _stations(record: PeelRecord) -> str:
    legend = " · ".join(f"{STATION_WORDS[v][0]} ({shape})" for v, shape in _SHAPES.items())
    caption = (
        f"{legend}. Best map without the station as a target against the best with it, both chosen on select; bars are "
        "95 % intervals. Near zero marks a block that this data does not need as a target: a hint for pruning, not a "
        "proof that it can be removed."
    )
    rows = [_station_row(block) for block in record.blocks]
    titles = ("block", "lost", "", "best map with it", "best map without it")
    return section(
        "stations",
        "What is lost when a block is no longer a target",
        chart(peel_charts.station_losses(record), esc(caption), f"{NOT_IN_BUDGET.capitalize()}."),
        table(titles, rows, caption="Every station", style="wide"),
    )


_SHAPES = {"needed": "●", "redundant": "■", "misleading": "✕", "undecided": "◆"}


def _station_row(block: StationRecord) -> tuple[str, ...]:
    return (
        f"{block.index}<small>{esc(block.name).replace('.', '.<wbr/>')}</small>",
        _interval(block.lost_nats),
        esc(STATION_WORDS[block.verdict][0]),
        esc(stations(block.with_map)),
        esc(stations(block.without_map)),
    )


def _reading(record: PeelRecord) -> str:
    text = (
        "A map says which station (hidden state behind a block of the trained model) each block of a reference stack "
        "regresses to. References are blocks of the same shape, fitted one after another, earlier ones frozen: nothing "
        "is trained through the stack. A light head with cross-entropy goes on top.",
        "The direct map, started warm, is the model itself; with the light head it is the head control.",
        "If a map beats the model with its head re-fitted, on text that it was neither fitted nor chosen on, the "
        "stack of blocks is proven not to be at its optimum on this data by at least that much. " + CAVEAT,
        *(
            [
                f"The model holds low-bit layers ({record.reference_formats}), and so do the references: codes and "
                "scales of the same formats, which the certificate holds. What a map gains is gained at the same bit "
                "width, but for the head."
            ]
            if record.reference_formats
            else []
        ),
        *(f"{words.capitalize()}: {meaning}" for words, meaning in STATION_WORDS.values()),
        "The probe was declared to be training text."
        if record.probe.in_distribution
        else "The probe is not known to be training text, so a gain mixes under-training with adaptation to this text.",
    )
    return section("reading", "How to read this", f"<ul>{''.join(f'<li>{esc(line)}</li>' for line in text)}</ul>")


def _numbers(record: PeelRecord) -> str:
    titles = ("map", "fit", "select", "report", "own head", "gain over model", "over its head control", "cost")
    listing = table(titles, [_map_row(one) for one in record.maps], caption="Every map", style="blocks")
    return section("numbers", "Every map in numbers", listing)


def _map_row(one: MapRecord) -> tuple[str, ...]:
    loss = one.loss
    fitted = [nats(v) for v in (loss.fit, loss.select, loss.report)] if loss else [_value(NOT_MEASURED)] * 3
    return (
        f"{esc(stations(one.stations))}<small>{esc(one.name)}</small>",
        *fitted,
        nats(one.own_head.report),
        _interval(one.gain_over_model),
        _interval(one.gain_over_head),
        f"{esc(duration(one.wall_seconds))}<small>{one.forward_equivalents:.1f} passes, "
        f"{one.blocks_fitted} fitted</small>",
    )


def _interval(interval: Interval | None) -> str:
    if interval is None:
        return ""
    return f"{nats(interval.mean, signed=True)}<small>{bracket(interval)}</small>"


def _value(text: str) -> str:
    return f'<span class="missing">{esc(text)}</span>' if text == NOT_MEASURED else esc(text)
