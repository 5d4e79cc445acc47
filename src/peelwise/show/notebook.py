"""Results in a notebook: small HTML fragments that a cell shows in place of a printed object.

A fragment is self-contained: no script, no style sheet, nothing loaded, every name escaped. Notebooks tell nobody if
they are dark, so text and lines take the notebook's own colour (``currentColor``), and verdicts stand in tiles that are
readable on both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from peelwise.records.allocation import AllocationRecord
from peelwise.records.anatomy import ABLATIONS, AnatomyRecord
from peelwise.records.audit import AuditRecord, BlockRecord
from peelwise.records.base import Colour, Interval, ModelRecord
from peelwise.records.check import BlockCheck, CheckRecord
from peelwise.records.compare import CompareRecord, CompareSeries
from peelwise.records.peel import PeelRecord
from peelwise.records.plain_text import clean
from peelwise.records.plan import PlanRecord
from peelwise.records.quantcheck import LayerCheck, QuantcheckRecord
from peelwise.records.quantise import QuantiseRecord
from peelwise.records.run import COLOURS, WHOLE_MODEL, Measurement
from peelwise.records.yes import YesRecord
from peelwise.show import yes as yes_words
from peelwise.show.allocate import words as allocate_words
from peelwise.show.anatomy import words as anatomy_words
from peelwise.show.audit import words as audit_words
from peelwise.show.check import words as check_words
from peelwise.show.compare import words as compare_words
from peelwise.show.html.markup import esc
from peelwise.show.peel import words as peel_words
from peelwise.show.plan import words as plan_words
from peelwise.show.quantcheck import words as quantcheck_words
from peelwise.show.quantise import words as quantise_words
from peelwise.show.words import (
    NOT_IN_BUDGET,
    NOT_MEASURED,
    VERDICTS,
    amount,
    control_sentence,
    duration,
    gain_sentence,
    legend,
    nats,
    note_words,
    short_unit,
    solo_gain,
    with_ends,
)

MOST_ROWS = 12  # of a table that is open from the start, and of any other than that of the blocks
_TILE, _GAP, _IN_A_LINE = 26, 4, 24
_FONT = "font-family:system-ui,sans-serif;font-size:13px;line-height:1.5"
_NUMBERS = "font-variant-numeric:tabular-nums"
_LINE = "border-bottom:1px solid rgba(128,128,128,.35)"
_CELL = f"padding:3px 14px 3px 0;text-align:left;background:none;white-space:nowrap;{_LINE}"
_QUIET = "opacity:.75"
_CLOUDS: Mapping[str, Colour] = MappingProxyType({"red": "red", "yellow": "yellow", "green": "green"})


def record_html(
    record: AuditRecord
    | CheckRecord
    | PeelRecord
    | QuantcheckRecord
    | QuantiseRecord
    | CompareRecord
    | CompareSeries
    | AllocationRecord
    | AnatomyRecord
    | PlanRecord,
) -> str:
    """Return the fragment of any record."""
    if isinstance(record, CheckRecord):
        return _check(record)
    if isinstance(record, PlanRecord):
        return _plan(record)
    if isinstance(record, QuantcheckRecord):
        return _quantcheck(record)
    if isinstance(record, AllocationRecord):
        return _allocation(record)
    if isinstance(record, QuantiseRecord):
        return _quantise(record)
    if isinstance(record, CompareRecord):
        return fragment(*_compare(record))
    if isinstance(record, CompareSeries):
        return fragment(*(part for one in record.pairs for part in _compare(one)))
    if isinstance(record, AnatomyRecord):
        return fragment(*_anatomy(record))
    return _peel(record) if isinstance(record, PeelRecord) else _audit(record)


def measurement_html(measurement: Measurement, blocks: Sequence[str] = ()) -> str:
    """Return the fragment of one measurement of a training run.

    Args:
        measurement: what was found.
        blocks: names of the blocks; default: their numbers.
    """
    colours = [COLOURS[letter] for letter in measurement.letters]
    found = {(one.name, one.block): one for one in measurement.statistics}
    shown = [
        (title, name, signed)
        for title, name, signed in (
            ("solo gain", "recoverable", True),
            ("marginal gain", "unique", True),
            ("natural-gradient score", "natural_energy", False),
        )
        if any(key == name and block != WHOLE_MODEL for key, block in found)
    ]
    rows = []
    for index, colour in enumerate(colours):
        cells = []
        for _, name, signed in shown:
            one = found.get((name, index))
            if one is None:
                cells.append(NOT_MEASURED)
            elif one.low is None or one.high is None:
                cells.append(nats(one.value, signed=True) if signed else f"{one.value:.3g}")
            else:
                cells.append(f"{one.value:+z.4f} [{one.low:z.4f}, {one.high:z.4f}]")
        name = blocks[index] if index < len(blocks) else str(index)
        rows.append([esc(name), _verdict(colour), *map(esc, cells)])
    what = {
        "slopes": "gain slopes of the blocks",
        "ranking": "ranking of the blocks",
        "alone": "blocks refined one by one",
        "joint": "all blocks refined together",
    }[measurement.kind]
    slope = "" if measurement.slope is None else f"loss {1000 * measurement.slope:+.3g} per 1,000 steps"
    facts = (
        what,
        f"took {duration(measurement.seconds)}",
        f"monitor {measurement.share:.1%} of wall time",
        *([slope] if slope else []),
    )
    headers = ["block", "verdict", *(title for title, *_ in shown)]
    return fragment(
        _title(f"Step {measurement.step:,}", facts),
        _line(f"{nats(measurement.probe_loss)} {clean(measurement.unit)} on the probe's report part", bold=True),
        strip(colours),
        _table(headers, rows, f"Blocks ({len(rows)})"),
        *(_line(str(event)) for event in measurement.events),
    )


def nothing_html() -> str:
    """Return the fragment of a monitor that has not measured yet."""
    return fragment(_line("No measurement yet: the first comes when the budget allows."))


def bounds_html(bounds: YesRecord) -> str:
    """Return the fragment of YES bounds: what a terminal prints, with the cloud as a tile."""
    title, *facts = yes_words.head(bounds)
    headers, *rows = yes_words.rows(bounds)
    cells = [[esc(cell) for cell in row] for row in rows]
    tile = _tile(_CLOUDS[bounds.cloud], f"cloud: {bounds.cloud}")
    lines = map(_line, [*facts, *yes_words.foot(bounds)])
    return fragment(_title(title, ()), f"<div>{tile}</div>", *lines, _table(headers, cells, "Bounds"))


def fragment(*parts_html: str) -> str:
    """Return parts as one element that sets its own type and keeps the notebook's colours."""
    return f'<div class="peelwise" style="{_FONT};{_NUMBERS};max-width:70em">{"".join(parts_html)}</div>'


def strip(colours: Sequence[Colour]) -> str:
    """Return the verdicts of all blocks as one drawing: a tile with a letter for each, in depth order."""
    if not colours:
        return ""
    step = _TILE + _GAP
    columns, lines = min(len(colours), _IN_A_LINE), -(-len(colours) // _IN_A_LINE)
    width, height = columns * step, lines * (step + 14)
    label = ", ".join(f"{sum(c == colour for c in colours)} {VERDICTS[colour].words}" for colour in legend(colours))
    tiles = []
    for index, colour in enumerate(colours):
        x, y = index % _IN_A_LINE * step, index // _IN_A_LINE * (step + 14)
        words = VERDICTS[colour]
        middle = x + _TILE / 2
        tiles.append(
            f"<g><title>{esc(f'block {index}: {words.words}')}</title>"
            f'<rect x="{x}" y="{y}" width="{_TILE}" height="{_TILE}" rx="4" fill="{words.light}"/>'
            f'<text x="{middle}" y="{y + 18}" text-anchor="middle" font-size="13" font-weight="700" fill="#fff">'
            f"{esc(words.letter)}</text>"
            f'<text x="{middle}" y="{y + _TILE + 11}" text-anchor="middle" font-size="9" fill="currentColor" '
            f'opacity=".75">{index}</text></g>'
        )
    return (
        f'<svg role="img" aria-label="{esc(f"Verdicts of {len(colours)} blocks: {label}")}" width="{width}" '
        f'height="{height}" viewBox="0 0 {width} {height}" style="max-width:100%;height:auto;display:block;'
        f'margin:8px 0 4px">{"".join(tiles)}</svg>'
    )


def _audit(record: AuditRecord) -> str:
    loss = record.loss
    rows = [
        [
            str(block.index),
            _verdict(block.verdict),
            _interval(block.recoverable_nats) if block.recoverable_nats else esc(solo_gain(block)),
            _interval(block.unique_nats),
            _ablation(block),
        ]
        for block in record.blocks
    ]
    gain = "" if loss.composed_gain is None else f" {with_ends(loss.composed_gain)}"
    losses = f"Loss on report: {nats(loss.current)} nats per token now"
    losses += "" if loss.composed is None else f", {nats(loss.composed)} with the replacement weights"
    # A long table is folded; what it says of the blocks to look at stands above it.
    notable = [row for row, block in zip(rows, record.blocks, strict=True) if block.verdict in ("red", "yellow")]
    notable = notable[:MOST_ROWS] if len(rows) > MOST_ROWS else []
    headers = ["block", "verdict", "solo gain, nats/token", "marginal gain, nats/token", "ablation, nats/token"]
    return fragment(
        _title(record.model.name, _facts(record.model)),
        _line(audit_words.conclusion(record)),
        strip([block.verdict for block in record.blocks]),
        _line(f"{losses}."),
        _line(f"{gain} {gain_sentence(record)}".strip(), bold=loss.composed_gain is not None),
        _table(headers, notable, f"Recoverable blocks ({len(notable)})"),
        _table(headers, rows, f"Blocks ({len(rows)})" if not notable else f"All blocks ({len(rows)})"),
        *_foot(record, control_sentence(record)),
    )


def _peel(record: PeelRecord) -> str:
    maps = [
        [
            esc(peel_words.stations(one.stations)),
            esc(one.name),
            esc(nats(peel_words.shown_loss(one).report) + ("" if one.loss else "*")),
            _interval(one.gain_over_model),
            _interval(one.gain_over_head),
        ]
        for one in record.maps[:MOST_ROWS]
    ]
    star = any(one.loss is None for one in record.maps[:MOST_ROWS])
    losses = [[esc(name), esc(nats(value)), esc(meaning)] for name, value, meaning in peel_words.control_rows(record)]
    visited = f"{len(record.maps):,} of {record.maps_total:,} maps visited, {record.start} start"
    headers = ["map", "name", "loss on report", "gain over model", "gain over its head control"]
    return fragment(
        _title(record.model.name, _facts(record.model)),
        _line(peel_words.conclusion(record), bold=peel_words.beats_head(record)),
        _line(visited + peel_words.inside(record), quiet=True),
        _table(["loss on report, nats per token", "", ""], losses, "Losses"),
        _table(headers, maps, _of("Maps", len(maps), len(record.maps))),
        _line("* with the model's own head", quiet=True) if star else "",
        *_foot(record, peel_words.control_sentence(record)),
    )


def _quantcheck(record: QuantcheckRecord) -> str:
    loss = record.loss
    losses = [
        ["parent", nats(loss.parent), ""],
        ["quantisation gap (upper bound)", nats(loss.split.price_of_precision), with_ends(loss.price)],
        ["recoverable at the same bit width", nats(loss.split.left_on_the_table), with_ends(loss.left)],
        ["quantised", nats(loss.quantised), "the three parts add up to it"],
    ]
    solved = sorted((layer for layer in record.layers if layer.split), key=_left, reverse=True)
    rows = [
        [
            esc(layer.name),
            esc(layer.format),
            f"{layer.bits_per_weight:.2f}",
            _percent(layer.error),
            _percent(_left(layer)),
        ]
        for layer in solved[:MOST_ROWS]
    ]
    missing = len(record.layers) - len(solved)
    headers = ["layer", "format", "bits", "output error, %", "recoverable at the same bit width, %"]
    return fragment(
        _title(f"{record.quantised.name} against {record.parent.name}", _facts(record.quantised)),
        _line(quantcheck_words.conclusion(record)),
        _table(["loss on report, nats per token", "", ""], [[esc(cell) for cell in row] for row in losses], "Losses"),
        _table(headers, rows, _of("Layers, those with most to recover first", len(rows), len(solved))),
        _line(f"{missing} more layers: {NOT_IN_BUDGET}.", bold=True) if missing else "",
        "" if loss.kept else _line(quantcheck_words.NOT_KEPT, bold=True),
        *(_line(f"Note: {note_words(note)}", quiet=True) for note in record.notes),
        _line(f"Cost: {duration(record.cost.wall_seconds)}.", quiet=True),
    )


def _quantise(record: QuantiseRecord) -> str:
    loss = record.loss
    losses = [
        ["parent", nats(loss.parent), ""],
        ["rounded to nearest", nats(loss.rounded), with_ends(loss.rounding_damage)],
        ["quantised", nats(loss.quantised), with_ends(loss.damage)],
    ]
    steps = [step for step in quantise_words.STEPS if any(step in layer.steps for layer in record.layers)]
    ordered = sorted(record.layers, key=lambda layer: list(layer.steps.values())[-1:], reverse=True)
    rows = [
        [
            esc(each.name),
            esc(each.format),
            f"{each.bits_per_weight:.2f}",
            *(_percent(each.steps.get(s, 0.0)) for s in steps),
        ]
        for each in ordered[:MOST_ROWS]
    ]
    headers = ["layer", "format", "bits", *(f"{quantise_words.STEPS[step]}, %" for step in steps)]
    return fragment(
        _title(record.model.name, _facts(record.model)),
        _line(quantise_words.conclusion(record)),
        _table(
            ["loss on report, nats per token", "", "more than the parent"],
            [[esc(c) for c in r] for r in losses],
            "Losses",
        ),
        _table(headers, rows, _of("Layers, those that lose most first", len(rows), len(ordered))),
        _line(quantise_words.ABOUT_LAYERS, quiet=True),
        *(_line(f"Note: {note_words(note)}", quiet=True) for note in record.notes),
        _line(f"Cost: {duration(record.cost.wall_seconds)}.", quiet=True),
    )


def _allocation(record: AllocationRecord) -> str:
    curve = [
        [f"{bits:.2f}", esc(name), nats(loss), with_ends(damage)]
        for bits, name, loss, damage in allocate_words.curve_rows(record)
    ]
    ordered = sorted(record.layers, key=lambda layer: layer.share, reverse=True)
    rows = [[esc(each.name), esc(each.format), _percent(each.share)] for each in ordered[:MOST_ROWS]]
    return fragment(
        _title(record.model.name, _facts(record.model)),
        _line(allocate_words.conclusion(record)),
        _table(["bits per weight", "formats", "loss, nats per token", "damage"], curve, "Loss against bits"),
        _table(
            ["layer", "format", "share of the damage, %"], rows, _of("Layers that cost most", len(rows), len(ordered))
        ),
        _line(f"Interactions: {allocate_words.interaction(record)}.", quiet=True),
        _line(f"Cost: {duration(record.cost.wall_seconds)}.", quiet=True),
    )


def _plan(record: PlanRecord) -> str:
    rows = [
        [esc(plan_words.TASKS[plan.task]), esc(plan_words.WAYS[plan.way]), f"{plan.tokens:,}" if plan.tokens else "",
         amount(plan.operations), plan_words.size(plan.largest.peak_bytes), plan_words.size(plan.read_bytes)]
        for plan in record.plans
    ]  # fmt: skip
    headers = ["command", "weights", "tokens", "operations", "memory", "read from disk"]
    return fragment(
        _title(record.shape.name, (record.shape.architecture, f"{amount(record.shape.parameters)} parameters")),
        _line(plan_words.conclusion(record)),
        _table(headers, rows, "What it would take"),
    )


def _check(record: CheckRecord) -> str:
    named = check_words.named_blocks(record)
    reasons = [
        [
            str(each.block),
            esc(check_words.score_words(each.score)),
            *(esc(cell) for cell in check_words.reason_cells(reason)),
        ]
        for each in record.unlike or ()
        for reason in each.reasons
    ]
    factors = [
        [str(one.block), esc(check_words.part_words(one.part)), f"{one.factor:.3g}", _interval(one.gain)]
        for one in check_words.shown_witnesses(record)
    ]
    headers = ["block", "score", "signal", "part", "value", "neighbours", "robust z"]
    return fragment(
        _title(record.model.name, _facts(record.model)),
        _line(check_words.conclusion(record)),
        _scores(record.blocks, named, record.threshold),
        _table(headers, reasons, f"Unlike their neighbours ({len(named)})"),
        _table(["block", "part", "factor", "gain, nats/token"], factors, f"Gain witnesses ({len(factors)})"),
        *(_line(f"Note: {note_words(note)}", quiet=True) for note in record.notes),
        _line(f"Cost: {duration(record.cost.wall_seconds)}. {check_words.UNLIKE}", quiet=True),
    )


def _scores(blocks: Sequence[BlockCheck], named: Sequence[int], threshold: float) -> str:
    """Return a bar for each block, as high as its score; named blocks are filled, with their number below."""
    if all(block.score is None for block in blocks):
        return ""
    step, height = max(6, min(_TILE, 900 // len(blocks))), 44
    bars = []
    for place, block in enumerate(blocks):
        tall = height * check_words.share_of_bar(block.score, threshold)
        is_named = block.index in named
        bars.append(
            f"<g><title>{esc(f'block {block.index}: score {check_words.score_words(block.score)}')}</title>"
            f'<rect x="{place * step}" y="{height - tall:.1f}" width="{step - 2}" height="{tall:.1f}" '
            f'fill="currentColor" opacity="{1 if is_named else 0.35}"/>'
            + (
                f'<text x="{place * step + step / 2 - 1:.0f}" y="{height + 13}" text-anchor="middle" font-size="11" '
                f'font-weight="700" fill="currentColor">{block.index}</text></g>'
                if is_named
                else "</g>"
            )
        )
    width, said = len(blocks) * step, f"Scores of {len(blocks)} blocks, {len(named)} unlike their neighbours"
    return (
        f'<svg role="img" aria-label="{esc(said)}" width="{width}" height="{height + 16}" '
        f'viewBox="0 0 {width} {height + 16}" style="max-width:100%;height:auto;display:block;margin:8px 0 4px">'
        f"{''.join(bars)}</svg>"
    )


def _compare(record: CompareRecord) -> list[str]:
    changed = [part for part in compare_words.in_order(record) if part.kind_of_change != "unchanged"]
    rows = [
        [
            esc(compare_words.part_name(part)),
            _interval(part.repairs_nats),
            _interval(part.breaks_nats),
            esc(compare_words.kind_words(part.kind_of_change, part.kind_values)),
        ]
        for part in changed
    ]
    unit = short_unit(record)
    headers = ["block", f"repairs, {unit}", f"breaks, {unit}", "kind of change"]
    return [
        _title(f"{record.model.name} against {record.old.name}", _facts(record.model)),
        _line(compare_words.conclusion(record)),
        _table(headers, rows, f"Changed parts ({len(rows)})"),
        *(_line(f"Note: {note_words(note)}", quiet=True) for note in record.notes),
        _line(f"Cost: {duration(record.cost.wall_seconds)}. {compare_words.SIGNS}", quiet=True),
    ]


def _anatomy(record: AnatomyRecord) -> list[str]:
    ways = [way for way in ABLATIONS if any(way in block.ablation for block in record.blocks)]
    rows = [[str(block.index), *(_interval(block.ablation.get(way)) for way in ways)] for block in record.blocks]
    headers = ["block", *(f"{anatomy_words.ABLATIONS[way]}, nats/token" for way in ways)]
    return [
        _title(record.model.name, _facts(record.model)),
        _line(anatomy_words.conclusion(record)),
        _table(headers, rows, f"Ablation ({len(rows)} blocks)") if ways else "",
        *(_line(f"Note: {note_words(note)}", quiet=True) for note in record.notes),
        _line(f"Cost: {duration(record.cost.wall_seconds)}. {anatomy_words.SIGNS}", quiet=True),
    ]


def _foot(record: AuditRecord | PeelRecord, controls: str) -> list[str]:
    lines = [_line(controls, bold=record.informative is False)]
    if not record.complete:
        lines.append(_line(f"Stopped early: what is missing was {NOT_IN_BUDGET}.", bold=True))
    lines += [_line(f"Note: {note_words(note)}", quiet=True) for note in record.notes]
    cost = f"Cost: {duration(record.cost.wall_seconds)}. Margin: {nats(record.margin_nats)} nats per token."
    return [*lines, _line(f"{cost} A witness proves; none found proves nothing.", quiet=True)]


def _facts(model: ModelRecord) -> tuple[str, ...]:
    return f"{amount(model.parameters)} parameters", f"{model.blocks} blocks", model.dtype


def _title(name: str, facts: Iterable[str]) -> str:
    more = "".join(f'<span style="margin-left:14px;{_QUIET}">{esc(fact)}</span>' for fact in facts)
    return f'<div><strong style="font-size:15px">{esc(name)}</strong>{more}</div>'


def _line(text: str, *, bold: bool = False, quiet: bool = False) -> str:
    style = "margin:3px 0" + (";font-weight:600" if bold else "") + (f";{_QUIET}" if quiet else "")
    return f'<div style="{style}">{esc(text)}</div>'


def _table(headers: Sequence[str], rows_html: Sequence[Sequence[str]], summary: str) -> str:
    """Return a table that can be folded, folded where it is long; cells are markup."""
    if not rows_html:
        return ""
    head = "".join(f'<th scope="col" style="{_CELL};font-weight:600;{_QUIET}">{esc(title)}</th>' for title in headers)
    body = "".join(
        f'<tr style="background:none">{"".join(f"<td style={_CELL!r}>{cell}</td>" for cell in row)}</tr>'
        for row in rows_html
    )
    opened = " open" if len(rows_html) <= MOST_ROWS else ""
    return (
        f'<details{opened} style="margin:6px 0"><summary style="cursor:pointer">{esc(summary)}</summary>'
        f'<div style="overflow-x:auto"><table style="border-collapse:collapse;margin:4px 0 0;color:inherit;{_FONT}">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></details>"
    )


def _tile(colour: Colour, text: str) -> str:
    words = VERDICTS[colour]
    style = (
        f"display:inline-block;min-width:18px;text-align:center;border-radius:3px;color:#fff;background:{words.light}"
    )
    return f'<b style="{style}" aria-hidden="true">{esc(words.letter)}</b> {esc(text)}'


def _verdict(colour: Colour) -> str:
    return _tile(colour, VERDICTS[colour].words)


def _interval(interval: Interval | None) -> str:
    text = esc(with_ends(interval))
    return f'<span style="{_QUIET}">{text}</span>' if interval is None else text


def _ablation(block: BlockRecord) -> str:
    return _interval(block.removal_nats)


def _left(layer: LayerCheck) -> float:
    return layer.split.left_on_the_table if layer.split else 0.0


def _percent(share: float) -> str:
    return f"{100 * share:.3g}"


def _of(what: str, shown: int, total: int) -> str:
    return f"{what} ({total})" if shown == total else f"{what} ({shown} of {total})"
