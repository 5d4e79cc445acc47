"""Results in a notebook: small HTML fragments that a cell shows in place of a printed object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from peelwise.records.allocation import AllocationRecord
from peelwise.records.anatomy import ABLATIONS, AnatomyRecord
from peelwise.records.audit import AuditRecord, BlockRecord
from peelwise.records.base import Colour, ModelRecord
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
from peelwise.show.fragments import (
    MOST_ROWS,
    TILE,
    folded_table,
    fragment,
    headline,
    interval_text,
    letter_tile,
    line,
    strip,
    verdict_tile,
)
from peelwise.show.html.markup import esc
from peelwise.show.peel import words as peel_words
from peelwise.show.plan import words as plan_words
from peelwise.show.quantcheck import words as quantcheck_words
from peelwise.show.quantise import words as quantise_words
from peelwise.show.words import (
    NOT_IN_BUDGET,
    NOT_MEASURED,
    amount,
    control_sentence,
    duration,
    gain_sentence,
    nats,
    note_words,
    short_unit,
    solo_gain,
    with_ends,
)

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
        rows.append([esc(name), verdict_tile(colour), *map(esc, cells)])
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
        headline(f"Step {measurement.step:,}", facts),
        line(f"{nats(measurement.probe_loss)} {clean(measurement.unit)} on the probe's report part", bold=True),
        strip(colours),
        folded_table(headers, rows, f"Blocks ({len(rows)})"),
        *(line(str(event)) for event in measurement.events),
    )


def nothing_html() -> str:
    """Return the fragment of a monitor that has not measured yet."""
    return fragment(line("No measurement yet: the first comes when the budget allows."))


def bounds_html(bounds: YesRecord) -> str:
    """Return the fragment of YES bounds: what a terminal prints, with the cloud as a tile."""
    title, *facts = yes_words.head(bounds)
    headers, *rows = yes_words.rows(bounds)
    cells = [[esc(cell) for cell in row] for row in rows]
    tile = letter_tile(_CLOUDS[bounds.cloud], f"cloud: {bounds.cloud}")
    lines = map(line, [*facts, *yes_words.foot(bounds)])
    return fragment(headline(title, ()), f"<div>{tile}</div>", *lines, folded_table(headers, cells, "Bounds"))


def _audit(record: AuditRecord) -> str:
    loss = record.loss
    rows = [
        [
            str(block.index),
            verdict_tile(block.verdict),
            interval_text(block.recoverable_nats) if block.recoverable_nats else esc(solo_gain(block)),
            interval_text(block.unique_nats),
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
        headline(record.model.name, _facts(record.model)),
        line(audit_words.conclusion(record)),
        strip([block.verdict for block in record.blocks]),
        line(f"{losses}."),
        line(f"{gain} {gain_sentence(record)}".strip(), bold=loss.composed_gain is not None),
        folded_table(headers, notable, f"Recoverable blocks ({len(notable)})"),
        folded_table(headers, rows, f"Blocks ({len(rows)})" if not notable else f"All blocks ({len(rows)})"),
        *_foot(record, control_sentence(record)),
    )


def _peel(record: PeelRecord) -> str:
    maps = [
        [
            esc(peel_words.stations(one.stations)),
            esc(one.name),
            esc(nats(peel_words.shown_loss(one).report) + ("" if one.loss else "*")),
            interval_text(one.gain_over_model),
            interval_text(one.gain_over_head),
        ]
        for one in record.maps[:MOST_ROWS]
    ]
    star = any(one.loss is None for one in record.maps[:MOST_ROWS])
    losses = [[esc(name), esc(nats(value)), esc(meaning)] for name, value, meaning in peel_words.control_rows(record)]
    visited = f"{len(record.maps):,} of {record.maps_total:,} maps visited, {record.start} start"
    headers = ["map", "name", "loss on report", "gain over model", "gain over its head control"]
    return fragment(
        headline(record.model.name, _facts(record.model)),
        line(peel_words.conclusion(record), bold=peel_words.beats_head(record)),
        line(visited + peel_words.inside(record), quiet=True),
        folded_table(["loss on report, nats per token", "", ""], losses, "Losses"),
        folded_table(headers, maps, _of("Maps", len(maps), len(record.maps))),
        line("* with the model's own head", quiet=True) if star else "",
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
        headline(f"{record.quantised.name} against {record.parent.name}", _facts(record.quantised)),
        line(quantcheck_words.conclusion(record)),
        folded_table(
            ["loss on report, nats per token", "", ""], [[esc(cell) for cell in row] for row in losses], "Losses"
        ),
        folded_table(headers, rows, _of("Layers, those with most to recover first", len(rows), len(solved))),
        line(f"{missing} more layers: {NOT_IN_BUDGET}.", bold=True) if missing else "",
        "" if loss.kept else line(quantcheck_words.NOT_KEPT, bold=True),
        *(line(f"Note: {note_words(note)}", quiet=True) for note in record.notes),
        line(f"Cost: {duration(record.cost.wall_seconds)}.", quiet=True),
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
        headline(record.model.name, _facts(record.model)),
        line(quantise_words.conclusion(record)),
        folded_table(
            ["loss on report, nats per token", "", "more than the parent"],
            [[esc(c) for c in r] for r in losses],
            "Losses",
        ),
        folded_table(headers, rows, _of("Layers, those that lose most first", len(rows), len(ordered))),
        line(quantise_words.ABOUT_LAYERS, quiet=True),
        *(line(f"Note: {note_words(note)}", quiet=True) for note in record.notes),
        line(f"Cost: {duration(record.cost.wall_seconds)}.", quiet=True),
    )


def _allocation(record: AllocationRecord) -> str:
    curve = [
        [f"{bits:.2f}", esc(name), nats(loss), with_ends(damage)]
        for bits, name, loss, damage in allocate_words.curve_rows(record)
    ]
    ordered = sorted(record.layers, key=lambda layer: layer.share, reverse=True)
    rows = [[esc(each.name), esc(each.format), _percent(each.share)] for each in ordered[:MOST_ROWS]]
    return fragment(
        headline(record.model.name, _facts(record.model)),
        line(allocate_words.conclusion(record)),
        folded_table(["bits per weight", "formats", "loss, nats per token", "damage"], curve, "Loss against bits"),
        folded_table(
            ["layer", "format", "share of the damage, %"], rows, _of("Layers that cost most", len(rows), len(ordered))
        ),
        line(f"Interactions: {allocate_words.interaction(record)}.", quiet=True),
        line(f"Cost: {duration(record.cost.wall_seconds)}.", quiet=True),
    )


def _plan(record: PlanRecord) -> str:
    rows = [
        [esc(plan_words.TASKS[plan.task]), esc(plan_words.WAYS[plan.way]), f"{plan.tokens:,}" if plan.tokens else "",
         amount(plan.operations), plan_words.size(plan.largest.peak_bytes), plan_words.size(plan.read_bytes)]
        for plan in record.plans
    ]  # fmt: skip
    headers = ["command", "weights", "tokens", "operations", "memory", "read from disk"]
    return fragment(
        headline(record.shape.name, (record.shape.architecture, f"{amount(record.shape.parameters)} parameters")),
        line(plan_words.conclusion(record)),
        folded_table(headers, rows, "What it would take"),
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
        [str(one.block), esc(check_words.part_words(one.part)), f"{one.factor:.3g}", interval_text(one.gain)]
        for one in check_words.shown_witnesses(record)
    ]
    headers = ["block", "score", "signal", "part", "value", "neighbours", "robust z"]
    return fragment(
        headline(record.model.name, _facts(record.model)),
        line(check_words.conclusion(record)),
        _scores(record.blocks, named, record.threshold),
        folded_table(headers, reasons, f"Unlike their neighbours ({len(named)})"),
        folded_table(["block", "part", "factor", "gain, nats/token"], factors, f"Gain witnesses ({len(factors)})"),
        *(line(f"Note: {note_words(note)}", quiet=True) for note in record.notes),
        line(f"Cost: {duration(record.cost.wall_seconds)}. {check_words.UNLIKE}", quiet=True),
    )


def _scores(blocks: Sequence[BlockCheck], named: Sequence[int], threshold: float) -> str:
    """Return a bar for each block, as high as its score; named blocks are filled, with their number below."""
    if all(block.score is None for block in blocks):
        return ""
    step, height = max(6, min(TILE, 900 // len(blocks))), 44
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
            interval_text(part.repairs_nats),
            interval_text(part.breaks_nats),
            esc(compare_words.kind_words(part.kind_of_change, part.kind_values)),
        ]
        for part in changed
    ]
    unit = short_unit(record)
    headers = ["block", f"repairs, {unit}", f"breaks, {unit}", "kind of change"]
    return [
        headline(f"{record.model.name} against {record.old.name}", _facts(record.model)),
        line(compare_words.conclusion(record)),
        folded_table(headers, rows, f"Changed parts ({len(rows)})"),
        *(line(f"Note: {note_words(note)}", quiet=True) for note in record.notes),
        line(f"Cost: {duration(record.cost.wall_seconds)}. {compare_words.SIGNS}", quiet=True),
    ]


def _anatomy(record: AnatomyRecord) -> list[str]:
    ways = [way for way in ABLATIONS if any(way in block.ablation for block in record.blocks)]
    rows = [[str(block.index), *(interval_text(block.ablation.get(way)) for way in ways)] for block in record.blocks]
    headers = ["block", *(f"{anatomy_words.ABLATIONS[way]}, nats/token" for way in ways)]
    return [
        headline(record.model.name, _facts(record.model)),
        line(anatomy_words.conclusion(record)),
        folded_table(headers, rows, f"Ablation ({len(rows)} blocks)") if ways else "",
        *(line(f"Note: {note_words(note)}", quiet=True) for note in record.notes),
        line(f"Cost: {duration(record.cost.wall_seconds)}. {anatomy_words.SIGNS}", quiet=True),
    ]


def _foot(record: AuditRecord | PeelRecord, controls: str) -> list[str]:
    lines = [line(controls, bold=record.informative is False)]
    if not record.complete:
        lines.append(line(f"Stopped early: what is missing was {NOT_IN_BUDGET}.", bold=True))
    lines += [line(f"Note: {note_words(note)}", quiet=True) for note in record.notes]
    cost = f"Cost: {duration(record.cost.wall_seconds)}. Margin: {nats(record.margin_nats)} nats per token."
    return [*lines, line(f"{cost} A witness proves; none found proves nothing.", quiet=True)]


def _facts(model: ModelRecord) -> tuple[str, ...]:
    return f"{amount(model.parameters)} parameters", f"{model.blocks} blocks", model.dtype


def _ablation(block: BlockRecord) -> str:
    return interval_text(block.removal_nats)


def _left(layer: LayerCheck) -> float:
    return layer.split.left_on_the_table if layer.split else 0.0


def _percent(share: float) -> str:
    return f"{100 * share:.3g}"


def _of(what: str, shown: int, total: int) -> str:
    return f"{what} ({total})" if shown == total else f"{what} ({shown} of {total})"
