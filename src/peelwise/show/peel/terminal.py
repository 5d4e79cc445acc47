"""A peel on the terminal: one line per map, best first, then the stations and the controls."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from peelwise.records.base import Interval
from peelwise.records.peel import PeelRecord
from peelwise.records.plain_text import clean
from peelwise.show.audit.terminal import WIDE, footer, model_line
from peelwise.show.peel.words import (
    STATION_WORDS,
    beats_head,
    conclusion,
    control_rows,
    control_sentence,
    inside,
    shown_loss,
    stations,
)
from peelwise.show.words import NOT_IN_BUDGET, duration, nats, note_words, with_ends

MOST_MAPS = 16
_STYLES = {"needed": "", "redundant": "cyan", "misleading": "bold magenta", "undecided": "dim", "not measured": "dim"}


def render(record: PeelRecord, folder: Path | str | None = None) -> RenderableType:
    """Return a view of the peel that adapts itself to the width it is printed at.

    Args:
        record: what the peel found.
        folder: where its files are, if they were written.
    """
    return _PeelView(record, None if folder is None else str(folder))


@dataclass(frozen=True, slots=True)
class _PeelView:
    """Waits with the layout until the width is known."""

    record: PeelRecord
    folder: str | None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        record = self.record
        yield Text.assemble((clean(record.model.name), "bold"), (model_line(record), "dim"))
        yield Text(clean(conclusion(record)), style="bold" if beats_head(record) else "")
        yield Text(
            f"{len(record.maps)} of {record.maps_total:,} maps visited, {record.start} start{inside(record)}",
            style="dim",
        )
        yield _map_table(record, options.max_width >= WIDE)
        if len(record.maps) > MOST_MAPS:
            yield Text(f"and {len(record.maps) - MOST_MAPS} more maps, in the certificate and the report.", style="dim")
        yield _losses(record)
        yield _stations(record)
        yield Group(*_closing(record), *footer(record, self.folder))


def _map_table(record: PeelRecord, wide: bool) -> Table:
    table = Table(box=None, padding=(0, 1), header_style="bold", pad_edge=False)
    table.add_column("map")
    if wide:
        table.add_column("name", max_width=24)
        table.add_column("fit", justify="right", no_wrap=True)
        table.add_column("select", justify="right", no_wrap=True)
    table.add_column("report", justify="right", no_wrap=True)
    table.add_column("gain over model\nnats/token", justify="right", no_wrap=True)
    table.add_column("over its head control\nnats/token", justify="right", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    for one in record.maps[:MOST_MAPS]:
        loss = shown_loss(one)
        more: list[RenderableType] = [Text(clean(one.name)), nats(loss.fit), nats(loss.select)] if wide else []
        table.add_row(
            stations(one.stations),
            *more,
            nats(loss.report) + ("" if one.loss else "*"),
            _gain(one.gain_over_model),
            _gain(one.gain_over_head),
            Text(duration(one.wall_seconds), style="dim"),
        )
    if any(one.loss is None for one in record.maps[:MOST_MAPS]):
        table.caption = "* with the model's own head"
    return table


def _gain(interval: Interval | None) -> Text:
    if interval is None:
        return Text("–", style="dim")
    style = "bold green" if interval.low > 0 else "dim" if interval.high < 0 else ""
    return Text(with_ends(interval, 3), style=style)


def _losses(record: PeelRecord) -> RenderableType:
    table = Table(box=None, padding=(0, 1), show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column()
    for name, value, meaning in control_rows(record):
        style = "bold" if name in ("model, new head", "best map") else ""
        table.add_row(Text(name, style=style), Text(nats(value), style=style or "dim"), Text(meaning, style="dim"))
    title = Text("\nLoss on report, nats per token", style="bold")
    return Group(title, Padding(table, (0, 0, 0, 1)), Text(control_sentence(record), _control_style(record)))


def _control_style(record: PeelRecord) -> str:
    return "" if record.informative else "bold yellow"


def _stations(record: PeelRecord) -> RenderableType:
    measured = [block for block in record.blocks if block.lost_nats is not None]
    title = Text("\nLost when a block's station is no longer a target", style="bold")
    if not measured:
        return Group(title, Text(f" {NOT_IN_BUDGET}", style="dim"))
    table = Table(box=None, padding=(0, 1), header_style="bold", pad_edge=False)
    table.add_column("block", justify="right", no_wrap=True)
    table.add_column("station", justify="right", no_wrap=True)
    table.add_column("lost, nats/token", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("best map without it")
    for block in measured:
        style = _STYLES[block.verdict]
        table.add_row(
            str(block.index),
            str(block.station),
            with_ends(block.lost_nats, 3),
            Text(STATION_WORDS[block.verdict][0], style=style),
            Text(stations(block.without_map), style="dim"),
        )
    return Group(title, Padding(table, (0, 0, 0, 1)))


def _closing(record: PeelRecord) -> list[RenderableType]:
    lines: list[RenderableType] = [Text("")]
    if not record.complete:
        lines.append(Text(f"Stopped early: what is missing was {NOT_IN_BUDGET}.", style="bold yellow"))
    lines += [Text(f"Note: {clean(note_words(note))}") for note in record.notes]
    return lines
