"""An anatomy on the terminal: what each block costs, how far it bends, what others tell of its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from peelwise.records.anatomy import ABLATIONS, BENDS, AnatomyRecord, Correlation
from peelwise.records.base import Interval
from peelwise.records.plain_text import clean
from peelwise.show.anatomy import words
from peelwise.show.audit.terminal import model_line
from peelwise.show.words import amount, duration, note_words, with_ends

MOST_CORRELATIONS = 6
_WIDE = 110  # columns from which on intervals are shown
_DECIMALS = 3


def render(record: AnatomyRecord, folder: Path | str | None = None) -> RenderableType:
    """Return a view of the anatomy that adapts itself to the width it is printed at.

    Args:
        record: what was found.
        folder: where its files are, if they were written.
    """
    return _AnatomyView(record, None if folder is None else str(folder))


@dataclass(frozen=True, slots=True)
class _AnatomyView:
    """Waits with the layout until the width is known."""

    record: AnatomyRecord
    folder: str | None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        record = self.record
        yield Text.assemble((clean(record.model.name), "bold"), (model_line(record), "dim"))
        yield Text(clean(words.conclusion(record)))
        if any(block.ablation or block.predicted for block in record.blocks):
            yield _costs(record, options.max_width)
        if any(block.bent for block in record.blocks):
            yield _bends(record)
        if any(block.recovery for block in record.blocks):
            yield _recovery(record)
        if record.predictability:
            yield _predictability(record)
        if record.correlations:
            yield _correlations(record)
        yield _closing(record, self.folder)


def _table(*titles: str) -> Table:
    table = Table(box=None, padding=(0, 1), header_style="bold", pad_edge=False)
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    return table


def _costs(record: AnatomyRecord, width: int) -> RenderableType:
    ways = [way for way in ABLATIONS if any(way in block.ablation for block in record.blocks)]
    table = _table("block", *(words.ABLATIONS[way].replace(" ", "\n", 1) for way in ways), "predicted",
                   *(["skipped,\nperplexity"] if "skipped" in ways else []))  # fmt: skip
    better = {(each.block, each.ablation) for each in record.better_without}
    for block in record.blocks:
        cells = [
            Text(_cost(block.ablation.get(way), wide=width >= _WIDE and way == "skipped"),
                 style="bold green" if (block.index, way) in better else "")
            for way in ways
        ]  # fmt: skip
        skipped = block.ablation.get("skipped")
        ratio = [] if "skipped" not in ways else ["-" if skipped is None else words.times(skipped)]
        table.add_row(str(block.index), *cells, _cost(block.predicted), *ratio)
    title = "\nWhat the loss rises by, nats per token"
    return Group(Text(title, style="bold"), table)


def _bends(record: AnatomyRecord) -> RenderableType:
    table = _table("block", *(words.BENDS[kind].replace(" ", "\n", 1) for kind in BENDS), "best\nscale", "its\ngain")
    for block in record.blocks:
        cells = ["-" if (bent := words.bent_of(block, kind)) is None else words.tolerated(bent) for kind in BENDS]
        best = block.best_scale
        scale = ("-", "-") if best is None else (f"{best.factor:.3g}", f"{best.gain.mean:+z.{_DECIMALS}f}")
        table.add_row(str(block.index), *cells, *scale)
    title = f"\nTolerated within the margin of {record.margin_nats:.4f} nats per token"
    return Group(Text(title, style="bold"), table)


def _recovery(record: AnatomyRecord) -> RenderableType:
    table = _table("block", "the noise\ncosts", "left after\none round", "recovered", "retrained,\nin steps")
    for block in record.blocks:
        if (found := block.recovery) is not None:
            share = "-" if found.share is None else f"{100 * found.share:.0f} %"
            table.add_row(str(block.index), _cost(found.damage), _cost(found.left), share, words.retrained(block))
    title = "\nWhat a block damaged by noise wins back, alone"
    return Group(Text(title, style="bold"), table)


def _predictability(record: AnatomyRecord) -> RenderableType:
    table = Table(box=None, padding=(0, 1), header_style="bold", pad_edge=False)
    table.add_column("matrix", overflow="fold")
    for title in ("ridge\nR2", "its\ncontrol", "mean\nR2", "its\ncontrol", "deltas\ncosine", "shuffled\n95 %"):
        table.add_column(title, justify="right", no_wrap=True)
    for each in record.predictability:
        _, low, high = each.deltas_shuffled
        table.add_row(
            clean(each.part),
            f"{each.explained.ridge:z.3f}",
            f"{each.independent.ridge:z.3f}",
            f"{each.explained.mean:z.3f}",
            f"{each.independent.mean:z.3f}",
            f"{each.deltas:z.3f}",
            f"{low:z.3f} .. {high:z.3f}",
            style="bold" if words.is_told(each) else "",
        )
    return Group(
        Text("\nWhat other blocks tell of the weights", style="bold"), table, Text(words.CONTROLS, style="dim")
    )


def _correlations(record: AnatomyRecord) -> RenderableType:
    lines: list[RenderableType] = []
    for target, said in (("skipped", "what skipping the block costs"), ("recovery", "the share recovered")):
        found = sorted((c for c in record.correlations if c.target == target), key=lambda c: (c.p, -abs(c.rho)))
        if found:
            lines.append(Text(f"\nRank correlation with {said}", style="bold"))
            lines += [_correlation(each) for each in found[:MOST_CORRELATIONS]]
    return Group(*lines)


def _correlation(each: Correlation) -> Text:
    sure = "" if each.significant else ", not significant among all columns"
    return Text(f"{each.rho:+.2f}  {clean(each.column)} (p = {each.p:.2g}{sure})")


def _cost(interval: Interval | None, *, wide: bool = False) -> str:
    if interval is None:
        return "-"
    return with_ends(interval, _DECIMALS) if wide else f"{interval.mean:+z.{_DECIMALS}f}"


def _closing(record: AnatomyRecord, folder: str | None) -> RenderableType:
    lines = [Text("")]
    lines += [Text(f"Note: {clean(note_words(note))}") for note in record.notes]
    cost = f"Cost: {duration(record.cost.wall_seconds)}, peak memory {amount(record.cost.peak_bytes, 1024, 'B')}."
    lines.append(Text(cost, style="dim"))
    if folder is not None:
        lines.append(Text(f"Files are in {clean(folder)}: the page report.html, every number in anatomy.json."))
    lines.append(Text(f"{words.SIGNS} {words.TOLERATED}", style="dim italic"))
    return Group(*lines)
