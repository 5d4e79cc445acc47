"""A comparison of two models on the terminal: one line per changed part, then layers, then how to read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from peelwise.records.base import Interval
from peelwise.records.compare import BlockChange, CompareRecord, CompareSeries, EndChange
from peelwise.records.plain_text import clean
from peelwise.show.compare.words import PATH, SIGNS, can_apply, conclusion, in_order, kind_words, mended, part_name
from peelwise.show.words import (
    NOT_IN_BUDGET,
    duration,
    in_title,
    is_of_batches,
    nats,
    note_words,
    own_data,
    short_unit,
    with_ends,
)

MOST_PARTS = 40
_DECIMALS = 3
_WIDE = 118  # columns from which on both intervals, the ways and the distance fit
_WIDE_TITLES = ("steps of the\nway from\neither end", "inter-\naction", "weights\nmoved by")


def render(record: CompareRecord, folder: Path | str | None = None, *, every: bool = False) -> RenderableType:
    """Return the view of one comparison.

    Args:
        record: what was found.
        folder: where its certificate is, if it was written.
        every: list unchanged parts too, and all of very many.
    """
    return _CompareView(record, folder, every)


@dataclass(frozen=True)
class _CompareView:
    """Waits with the layout until the width is known."""

    record: CompareRecord
    folder: Path | str | None
    every: bool

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from _lines(self.record, self.folder, self.every, wide=options.max_width >= _WIDE)


def _lines(record: CompareRecord, folder: Path | str | None, every: bool, *, wide: bool) -> list[RenderableType]:
    return [
        Text.assemble((clean(record.model.name), "bold"), (" against ", "dim"), (clean(record.old.name), "bold")),
        Text(clean(conclusion(record))),
        Padding(_losses(record), (1, 0, 0, 1)),
        *_parts(record, every, wide=wide),
        *_layers(record),
        Text(""),
        Text(SIGNS, style="dim"),
        *([Text(PATH, style="dim")] if wide and any(b.path_from_first_nats for b in record.blocks) else []),
        *(Text(f"Note: {clean(note_words(each))}") for each in record.notes),
        Text(f"Cost: {duration(record.cost.wall_seconds)}. Margin: {nats(record.margin_nats)} nats.", style="dim"),
        *_next(record, folder),
    ]


def _next(record: CompareRecord, folder: Path | str | None) -> list[RenderableType]:
    """Return what all parts that hurt repair together, and what to do with a certificate that was written."""
    said = mended(record)
    lines: list[RenderableType] = [Text(f"Together: {said}")] if said else []
    if folder is None:
        return lines
    where = clean(str(folder))
    lines.append(Text(f"Certificate and page: {where}. Recheck: peelwise verify {where}{own_data(record)}"))
    if can_apply(record):
        lines.append(Text(f"Put back what hurt: peelwise apply {where} --out FOLDER"))
    return lines


def _losses(record: CompareRecord) -> Table:
    loss = record.loss
    rows = [
        ("loss of OLD", nats(loss.old), f"on report{in_title(record)}"),
        ("loss of NEW", nats(loss.new), ""),
        (
            "NEW - OLD",
            with_ends(loss.damage),
            f"95 % interval, paired by {'example' if is_of_batches(record) else 'sequence'}",
        ),
    ]
    if loss.interaction is not None:
        rows.append(("of it interaction", nats(loss.interaction, signed=True), "what the repairs do not add up to"))
    table = Table(box=None, padding=(0, 1), show_header=False, pad_edge=False)
    for justify in ("left", "right", "left"):
        table.add_column(justify=justify)
    for name, value, meaning in rows:
        table.add_row(name, value, Text(meaning, style="dim"))
    return table


def _parts(record: CompareRecord, every: bool, *, wide: bool) -> list[RenderableType]:
    parts = [part for part in in_order(record) if every or part.kind_of_change != "unchanged"]
    if not parts:
        return []
    shown = parts if every else sorted(sorted(parts, key=_effect)[:MOST_PARTS], key=in_order(record).index)
    table = Table(box=None, padding=(0, 1), header_style="bold", pad_edge=False)
    table.add_column("block", justify="right", no_wrap=True)
    unit = short_unit(record)
    for title in (f"repairs\n{unit}", f"breaks\n{unit}", *(_WIDE_TITLES if wide else ())):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("kind of change", overflow="fold")
    for part in shown:
        hurt = isinstance(part, BlockChange) and part.index in record.conclusion.hurt
        helped = isinstance(part, BlockChange) and part.index in record.conclusion.helped
        table.add_row(
            part_name(part),
            _interval(part.repairs_nats),
            _interval(part.breaks_nats) if wide else _mean(part.breaks_nats),
            *(_beside(part) if wide else ()),
            clean(kind_words(part.kind_of_change, part.kind_values)),
            style="bold red" if hurt else "bold green" if helped else "",
        )
    lines: list[RenderableType] = [Text(""), table]
    quiet = len(in_order(record)) - len(parts)
    if len(parts) > len(shown):
        lines.append(Text(f"The {len(shown)} with the largest effect; all with --all or in the JSON.", style="dim"))
    if quiet:
        lines.append(Text(f"{quiet} more parts are the same in both models.", style="dim"))
    return lines


def _layers(record: CompareRecord) -> list[RenderableType]:
    lines: list[RenderableType] = []
    for block in record.blocks:
        measured = [tensor for tensor in block.tensors if tensor.repairs_nats is not None]
        if len(measured) < 2:
            continue
        table = Table(box=None, padding=(0, 1), show_header=False, pad_edge=False)
        for justify in ("left", "right", "left"):
            table.add_column(justify=justify)
        for tensor in sorted(measured, key=lambda t: -abs(t.repairs_nats.mean if t.repairs_nats else 0.0)):
            words = kind_words(tensor.kind_of_change, tensor.kind_values)
            table.add_row(clean(tensor.name), _interval(tensor.repairs_nats), clean(words))
        lines += [Text(f"\nBlock {block.index}, layer by layer: repairs", style="bold"), Padding(table, (0, 0, 0, 1))]
    return lines


def render_series(series: CompareSeries) -> RenderableType:
    """Return the table over time: each checkpoint against the one before it."""
    table = Table(box=None, padding=(0, 1), header_style="bold", pad_edge=False)
    table.add_column("checkpoint", no_wrap=True)
    table.add_column("loss", justify="right")
    table.add_column("change\nof the loss", justify="right", no_wrap=True)
    for title in ("hurt\nblocks", "helped\nblocks"):
        table.add_column(title, overflow="fold")
    table.add_column("largest\nrepair", justify="right", no_wrap=True)
    table.add_column("weights\nmoved by", justify="right")
    table.add_column("kinds of change", overflow="fold")
    if series.pairs:
        first = series.pairs[0]
        table.add_row(clean(first.old.name), nats(first.loss.old), "", "", "", "", "", "")
    for one in series.pairs:
        top = max(one.blocks, key=lambda b: b.repairs_nats.mean if b.repairs_nats else float("-inf"))
        table.add_row(
            clean(one.model.name),
            nats(one.loss.new),
            f"{one.loss.damage.mean:+z.4f}",
            _few(one.conclusion.hurt),
            _few(one.conclusion.helped),
            "" if top.repairs_nats is None else f"{top.index}: {top.repairs_nats.mean:+z.{_DECIMALS}f}",
            _distance(max((b.relative_distance for b in one.blocks), default=0.0)),
            ", ".join(dict.fromkeys(kind_words(b.kind_of_change, {}) for b in one.blocks)),
        )
    lines: list[RenderableType] = [Text("Each checkpoint against the one before it", style="bold"), table]
    if not series.complete:
        lines.append(Text(f"Stopped early: what is missing was {NOT_IN_BUDGET}.", style="bold yellow"))
    return Group(*lines, Text(SIGNS, style="dim"))


def _effect(part: BlockChange | EndChange) -> float:
    return -abs(part.repairs_nats.mean) if part.repairs_nats else 1.0


def _interval(interval: Interval | None) -> str:
    return "-" if interval is None else with_ends(interval, _DECIMALS)


def _mean(interval: Interval | None) -> str:
    return "-" if interval is None else f"{interval.mean:+z.{_DECIMALS}f}"


def _beside(part: BlockChange | EndChange) -> tuple[str, str, str]:
    interaction = "" if part.interaction_nats is None else f"{part.interaction_nats:+z.{_DECIMALS}f}"
    return _steps(part), interaction, _distance(part.relative_distance)


def _steps(part: BlockChange | EndChange) -> str:
    steps = part.path_from_first_nats, part.path_from_last_nats
    return " ".join("-" if step is None else f"{step.mean:+z.{_DECIMALS}f}" for step in steps)


def _distance(relative: float) -> str:
    return "0" if relative == 0 else f"{100 * relative:.3g} %"


def _few(indices: Sequence[int], most: int = 5) -> str:
    return ", ".join(map(str, indices[:most])) + (f" +{len(indices) - most}" if len(indices) > most else "")
