"""A check on the terminal: a strip of all blocks by score, and what says that some stand out."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from peelwise.records.check import BlockCheck, CheckRecord, UnlikeBlock
from peelwise.records.plain_text import clean
from peelwise.records.signals import title_of
from peelwise.show.audit.terminal import model_line, print_view
from peelwise.show.check.words import (
    ATTENTION,
    MLP,
    UNLIKE,
    ablation_of,
    conclusion,
    named_blocks,
    part_words,
    reason_cells,
    rest_words,
    score_words,
    share_of_bar,
    shown_witnesses,
)
from peelwise.show.words import (
    amount,
    data_words,
    duration,
    nats,
    note_words,
    own_data,
    short_unit,
    significant,
    with_ends,
)

MOST_BLOCKS, MOST_WITNESSES = 6, 8
LEVELS = "▁▂▃▄▅▆▇█"
_NAMED, _MARK = "bold magenta", "▲"
_WIDE_CELL = 4  # columns of a block where all of them fit into a line
_WITH_ABLATION = 100  # columns from which on the table of reasons has a column for it
_EVERY = 10  # blocks between two numbers where they do not


def render(record: CheckRecord, folder: Path | str | None = None) -> RenderableType:
    """Return a view of the check that adapts itself to the width it is printed at.

    Args:
        record: what was found.
        folder: where its files are, if they were written.
    """
    return _CheckView(record, None if folder is None else str(folder))


def print_record(record: CheckRecord, console: Console, folder: Path | str | None = None) -> None:
    """Print the view, in plain characters where the terminal cannot show others."""
    print_view(render(record, folder), console)


@dataclass(frozen=True, slots=True)
class _CheckView:
    """Waits with the layout until the width is known."""

    record: CheckRecord
    folder: str | None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        record = self.record
        yield Text.assemble((clean(record.model.name), "bold"), (model_line(record), "dim"))
        yield Text(clean(conclusion(record)))
        if any(block.score is not None for block in record.blocks):
            yield Text(
                f"\nScore of each block; a full bar is twice the {score_words(record.threshold)} "
                "from which a block is named",
                style="bold",
            )
            yield strip(record, options.max_width)
        if record.unlike:
            yield _reasons(record, record.unlike, options.max_width)
        if record.unlike is None:
            yield _raw(record)
        if record.gain_witnesses:
            yield _witnesses(record)
        yield _closing(record, self.folder)


def strip(record: CheckRecord, width: int) -> Text:
    """Return bars as high as the scores, named blocks marked: a line of numbered blocks, or several of many blocks."""
    named = set(named_blocks(record))
    if _WIDE_CELL * len(record.blocks) <= width:
        lines = [_wide(record.blocks, record.threshold, named)]
    else:
        across = max(_EVERY, (width - 4) // _EVERY * _EVERY)
        pieces = [record.blocks[i : i + across] for i in range(0, len(record.blocks), across)]
        lines = [_narrow(piece, record.threshold, named) for piece in pieces]
    return Text("\n").join(lines)


def _wide(blocks: Sequence[BlockCheck], threshold: float, named: set[int]) -> Text:
    rows = [Text(), Text(), Text()]
    for block in blocks:
        style = _NAMED if block.index in named else ""
        cells = (2 * _level(block.score, threshold), str(block.index), score_words(block.score))
        for row, cell in zip(rows, cells, strict=True):
            row.append(cell.rjust(_WIDE_CELL - 1) + " ", style=style or ("cyan" if row is rows[0] else "dim"))
    return Text("\n").join([*rows, _marks(blocks, named, _WIDE_CELL)] if named else rows)


def _narrow(blocks: Sequence[BlockCheck], threshold: float, named: set[int]) -> Text:
    bars, numbers = Text("    "), "    "
    for place, block in enumerate(blocks):
        bars.append(_level(block.score, threshold), style=_NAMED if block.index in named else "cyan")
        if place % _EVERY == 0:
            numbers = numbers.ljust(4 + place) + str(block.index)
    rows = [bars, *([Text("    ") + _marks(blocks, named, 1)] if named & {b.index for b in blocks} else [])]
    return Text("\n").join([*rows, Text(numbers, style="dim")])


def _marks(blocks: Sequence[BlockCheck], named: set[int], cell: int) -> Text:
    marks = "".join((_MARK if block.index in named else " ").rjust(max(1, cell - 1)).ljust(cell) for block in blocks)
    return Text(marks.rstrip(), style=_NAMED)


def _level(score: float | None, threshold: float) -> str:
    if score is None:
        return " "
    return LEVELS[min(len(LEVELS) - 1, int(share_of_bar(score, threshold) * len(LEVELS)))]


def _reasons(record: CheckRecord, unlike: Sequence[UnlikeBlock], width: int) -> RenderableType:
    with_ablation = width >= _WITH_ABLATION and any(block.ablation is not None for block in record.blocks)
    table = Table(box=None, padding=(0, 1), header_style="bold", pad_edge=False)
    table.add_column("block", justify="right", no_wrap=True)
    table.add_column("score", justify="right", no_wrap=True)
    table.add_column("signal")
    table.add_column("part", overflow="fold")
    for title in ("value", "neighbours", "robust z"):
        table.add_column(title, justify="right", no_wrap=True)
    if with_ablation:
        table.add_column(Text(f"ablation\n{short_unit(record)}"), justify="right", no_wrap=True)
    for each in unlike[:MOST_BLOCKS]:
        ablation = ablation_of(record, each.block)
        cost = "–" if ablation is None else nats(ablation.mean, signed=True)
        for place, reason in enumerate(each.reasons):
            head = (str(each.block), score_words(each.score), cost) if place == 0 else ("", "", "")
            table.add_row(
                Text(head[0], _NAMED),
                head[1],
                *map(clean, reason_cells(reason)),
                *([head[2]] if with_ablation else []),
            )
    lines: list[RenderableType] = [Text("\nUnlike their neighbours, and the signals that say so", style="bold"), table]
    if len(unlike) > MOST_BLOCKS:
        lines.append(Text(f"and {len(unlike) - MOST_BLOCKS} more blocks; the record holds the reasons.", style="dim"))
    return Group(*lines)


def _witnesses(record: CheckRecord) -> RenderableType:
    shown = shown_witnesses(record)
    table = Table(box=None, padding=(0, 1), header_style="bold", pad_edge=False)
    table.add_column("block", justify="right", no_wrap=True)
    table.add_column("part", overflow="fold")
    table.add_column("factor", justify="right", no_wrap=True)
    table.add_column(Text(f"gain, {short_unit(record)}"), justify="right", no_wrap=True)
    for witness in shown[:MOST_WITNESSES]:
        head = "" if witness.head is None else f", head {witness.head}"
        part = clean(part_words(witness.part) + head)
        table.add_row(str(witness.block), part, f"{witness.factor:.3g}", with_ends(witness.gain, 3))
    title = f"\nGain witnesses: what one factor on a part gains, on {data_words(record)} that it was not chosen on"
    lines: list[RenderableType] = [Text(title, style="bold"), *([table] if shown else [])]
    if len(shown) > MOST_WITNESSES:
        lines.append(Text(f"and {len(shown) - MOST_WITNESSES} more in the record.", style="dim"))
    rest = len(record.gain_witnesses) - len(shown)
    if rest:
        lines.append(Text(rest_words(rest), style="dim"))
    return Group(*lines)


def _raw(record: CheckRecord) -> RenderableType:
    """List the signals of blocks, attention and MLP where there is no score to say which matter."""
    keys = dict.fromkeys(key for block in record.blocks for key in block.signals)
    table = Table(box=None, padding=(0, 1), header_style="bold", pad_edge=False)
    table.add_column("signal")
    table.add_column("part", no_wrap=True)
    for block in record.blocks:
        table.add_column(f"block {block.index}", justify="right", no_wrap=True)
    for key in keys:
        signal, _, part = key.partition(".")
        if part in ("", ATTENTION, MLP):
            values = (block.signals.get(key) for block in record.blocks)
            cells = ("–" if value is None else significant(value) for value in values)
            table.add_row(clean(title_of(signal)), clean(part_words(part)), *cells)
    title = "\nSignals of blocks, attention and MLP; those of linear layers and norms are in the record"
    return Group(Text(title, style="bold"), table)


def _closing(record: CheckRecord, folder: str | None) -> RenderableType:
    lines = [Text("")]
    if record.composed_gain is not None and record.loss is not None:
        lines.append(
            Text(
                f"Loss on report {nats(record.loss)}, with the best factors together {nats(record.composed_loss)}: "
                f"gain {with_ends(record.composed_gain)}"
            )
        )
    lines += [Text(f"Note: {clean(note_words(note))}") for note in record.notes]
    cost = f"Cost: {duration(record.cost.wall_seconds)}, peak memory {amount(record.cost.peak_bytes, 1024, 'B')}."
    lines.append(Text(cost, style="dim"))
    if folder is not None:
        lines.append(Text(f"Files are in {clean(folder)}: the page report.html, every number in certificate.json."))
        how = " --full" if record.probe is None else own_data(record)
        lines.append(Text(f"Check them with: peelwise verify {shlex.quote(clean(folder))}{how}"))
    lines.append(Text(UNLIKE, style="dim italic"))
    return Group(*lines)
