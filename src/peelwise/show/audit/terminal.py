"""An audit on the terminal: one line per block, then what the whole witness does and what it cost.

Every verdict carries its letter and its words, so nothing is lost in a pipe or with ``NO_COLOR``.
"""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from peelwise.records.audit import AuditRecord, BlockRecord, LossRecord
from peelwise.records.base import Interval, SealedRecord
from peelwise.records.plain_text import clean
from peelwise.records.signals import RANKED_BY, SIGNALS
from peelwise.show.audit.low_bit import terminal_view
from peelwise.show.audit.words import conclusion, reasons, two_gains
from peelwise.show.check import words as check_words
from peelwise.show.words import (
    INTERACTION,
    INTERACTION_MEANING,
    NOT_IN_BUDGET,
    VERDICTS,
    amount,
    behind,
    bracket,
    control_sentence,
    counts,
    duration,
    gain_sentence,
    in_title,
    is_interaction,
    is_measured,
    is_of_batches,
    nats,
    note_words,
    own_data,
    ranking,
    short_unit,
    solo_gain,
    with_ends,
)

WIDE = 108
"""From this many columns on, verdicts are written out in full."""
_WITH_ROUNDS = 124
_DECIMALS = 3  # in the table of blocks, where two columns of intervals have to fit beside each other

MOST_REASONS = 5
BAR_CELLS = 8
EIGHTHS = " ▏▎▍▌▋▊▉█"
# One character each, so that columns stay aligned where the terminal cannot show the original.
_ASCII = str.maketrans({"±": "~", "·": "-", "–": "-", "—": "-", "→": ">", "…": "."} | dict.fromkeys("▏▎▍▌", " "))
_ASCII |= str.maketrans(dict.fromkeys("▁▂", ".") | dict.fromkeys("▃▄", "o") | dict.fromkeys("▅▆▇", "O"))
_ASCII |= str.maketrans(dict.fromkeys("▋▊▉█", "#") | {"■": "#", "▲": "^", "●": "o", "◇": "?", "□": "-"})


def render(record: AuditRecord, folder: Path | str | None = None) -> RenderableType:
    """Return a view of the audit that adapts itself to the width it is printed at.

    Args:
        record: What the audit found.
        folder: Where its files are, if they were written.

    Returns:
        Anything rich can print; it is laid out when printed.
    """
    return _AuditView(record, None if folder is None else str(folder))


def print_record(record: AuditRecord, console: Console, folder: Path | str | None = None) -> None:
    """Print the audit, replacing characters that the terminal's encoding does not have.

    Args:
        record: What the audit found.
        console: Where to print.
        folder: Where its files are, if they were written.
    """
    print_view(render(record, folder), console)


def print_view(view: RenderableType, console: Console) -> None:
    """Print a view, replacing characters that the terminal's encoding does not have."""
    if not console.options.ascii_only:
        console.print(view)
        return
    with console.capture() as captured:
        console.print(view)
    plain = captured.get().translate(_ASCII)
    console.file.write(plain.encode(console.encoding, "replace").decode(console.encoding))


@dataclass(frozen=True, slots=True)
class _AuditView:
    """Waits with the layout until the width is known."""

    record: AuditRecord
    folder: str | None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        record = self.record
        yield Text.assemble((clean(record.model.name), "bold"), (model_line(record), "dim"))
        yield Text(clean(conclusion(record)))
        yield Text(_counts_line(record), style="dim")
        yield _block_table(record, options.max_width)
        yield Text("Intervals are 95 % for each block; verdicts hold for all together (Holm).", style="dim")
        if record.check is not None:
            style = "bold yellow" if record.check.unlike else "dim"
            yield Text("\n".join(map(clean, check_words.part_sentences(record.check))), style=style)
        if any(is_interaction(block.unique_nats) for block in record.blocks):
            yield Text(f"\n{INTERACTION}: {INTERACTION_MEANING}.", style="magenta")
        yield _why(record)
        yield _losses(record)
        bits = terminal_view(record)
        if bits is not None:
            yield bits
        yield _closing(record, self.folder)


def model_line(record: SealedRecord) -> str:
    """Return the model's size and dtype, to stand behind its name."""
    model = record.model
    return f"  {amount(model.parameters)} parameters, {model.blocks} blocks, {clean(model.dtype)}"


def _counts_line(record: AuditRecord) -> str:
    listed = [
        f"{VERDICTS[colour].letter} {number} {VERDICTS[colour].short}" for colour, number in counts(record).items()
    ]
    return " · ".join(filter(None, [*listed, two_gains(record)]))


def _block_table(record: AuditRecord, width: int) -> Table:
    wide, widest = width >= WIDE, width >= _WITH_ROUNDS
    table = Table(box=None, padding=(0, 1), header_style="bold", pad_edge=False)
    table.add_column("block", justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    unit = short_unit(record)
    table.add_column(Text(f"{SIGNALS['recoverable'].column}\n{unit}"), justify="right", no_wrap=True)
    table.add_column(Text(f"{SIGNALS['unique'].column}\n{unit}"), justify="right", min_width=23, max_width=23)
    if wide:
        table.add_column(Text(f"{SIGNALS['removal'].column}\n{unit}"), justify="right", no_wrap=True)
        table.add_column(SIGNALS[RANKED_BY].column.replace("-", "-\n").replace(" ", "\n"), no_wrap=True)
    if widest:
        table.add_column("rounds", justify="right", no_wrap=True)
    energies = [value for block in record.blocks if (value := ranking(block)) is not None and value > 0]
    ends = (min(energies), max(energies)) if energies else (1.0, 1.0)
    unlike = {each.block for each in record.check.unlike} if record.check is not None else set()
    for block in record.blocks:
        table.add_row(
            str(block.index),
            _verdict(block, wide, block.index in unlike),
            *_gains(block),
            *([_removal(block.removal_nats), _energy_bar(ranking(block), ends)] if wide else []),
            *([Text(str(block.rounds) if is_measured(block) else "–")] if widest else []),
        )
    return table


def _verdict(block: BlockRecord, wide: bool, unlike: bool) -> Text:
    words = VERDICTS[block.verdict]
    verdict = Text(f"{words.letter} {words.words if wide else words.short}", style=words.style)
    return verdict.append(" ▲", style="bold yellow") if unlike else verdict


def _gains(block: BlockRecord) -> list[Text]:
    if block.frozen:
        return [Text("–", style="dim")] * 2
    measured = block.recoverable_nats is not None or block.first_order_nats is not None
    return [Text(solo_gain(block, _DECIMALS), style="" if measured else "dim"), _unique(block.unique_nats)]


def _measured(interval: Interval | None) -> Text:
    return Text(with_ends(interval, _DECIMALS), style="dim" if interval is None else "")


def _removal(interval: Interval | None) -> Text:
    if interval is None:
        return Text("–", style="dim")
    return Text(nats(interval.mean, signed=True), style="bold red" if interval.high < 0 else "")


def _unique(interval: Interval | None) -> Text:
    if is_interaction(interval):
        return Text(f"{with_ends(interval, _DECIMALS)}\n{INTERACTION}", style="bold magenta")
    return _measured(interval)


def _energy_bar(energy: float | None, ends: tuple[float, float]) -> Text:
    """Draw one energy on a log scale whose shortest bar is the smallest energy: they span decades."""
    if energy is None:
        return Text("–", style="dim")
    low, high = (math.log(end) for end in ends)
    share = (math.log(energy) - low) / (high - low) if energy > 0 and high > low else float(energy > 0)
    eighths = round(8 * (1 + share * (BAR_CELLS - 1))) if energy > 0 else 0
    bar = EIGHTHS[8] * (eighths // 8) + (EIGHTHS[eighths % 8] if eighths % 8 else "")
    return Text(bar.ljust(BAR_CELLS), style="cyan")


def _why(record: AuditRecord) -> Text:
    """Give the reasons for what was certified; of the other verdicts the words say enough."""
    red = [block for block in record.blocks if block.verdict == "red"]
    said = dict(zip((block.index for block in record.blocks), reasons(record), strict=True))
    lines = [f"\nBlock {block.index}: {clean(said[block.index])}." for block in red[:MOST_REASONS]]
    if len(red) > MOST_REASONS:
        more = len(red) - MOST_REASONS
        lines.append(f"\nand {more} more {'block' if more == 1 else 'blocks'}; the certificate holds the reasons.")
    return Text("".join(lines) + ("\n" if red else ""), style="red")


def _losses(record: AuditRecord) -> RenderableType:
    loss = record.loss
    table = Table(box=None, padding=(0, 1), show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column()
    gain = "" if loss.composed_gain is None else f"gain {with_ends(loss.composed_gain)}"
    shuffled = "" if loss.shuffled_gain is None else f"gain {with_ends(loss.shuffled_gain)}"
    start = "" if loss.untrained_start is None else f"from {nats(loss.untrained_start)} at initialisation"
    of_batches = is_of_batches(record)
    rows: tuple[tuple[str, float | None, str], ...] = (
        ("now", loss.current, ""),
        ("composed witness", loss.composed, gain),
        *([] if of_batches else [("control: head re-fitted", loss.head_control, "")]),
        ("control: shuffled targets", loss.shuffled, shuffled),
        ("control: untrained", loss.untrained, start),
        *([] if of_batches else _baselines(loss)),
    )
    for name, value, remark in rows:
        bold = "bold" if name in ("now", "composed witness") else ""
        table.add_row(Text(name, style=bold), Text(nats(value), style=bold or "dim"), Text(remark))
    if of_batches:
        head = ""
    elif record.head is not None:
        head = f"head by itself: gain {with_ends(record.head.recoverable_nats)}"
    else:
        head = f"head by itself: {NOT_IN_BUDGET}"
    title = Text(f"Loss on report{in_title(record)}", style="bold")
    style = "" if record.informative else "bold yellow"
    shown = [Text(f" {head}")] if head else []
    return Group(title, Padding(table, (0, 0, 0, 1)), *shown, Text(control_sentence(record), style))


def _baselines(loss: LossRecord) -> list[tuple[str, float | None, str]]:
    return [("baseline: without blocks", loss.without_blocks, ""), ("baseline: counting tokens", loss.unigram, "")]


def _closing(record: AuditRecord, folder: str | None) -> RenderableType:
    lines: list[RenderableType] = [Text("")]
    gain = record.loss.composed_gain
    if gain is not None and record.loss.composed is not None:
        lines.append(Text.assemble((nats(gain.mean, signed=True), "bold"), f" {bracket(gain)} {gain_sentence(record)}"))
    if not record.complete:
        lines.append(Text(f"Stopped early: what is missing was {NOT_IN_BUDGET}.", style="bold yellow"))
    lines += [Text(f"Note: {clean(note_words(note))}") for note in record.notes]
    return Group(*lines, *footer(record, folder))


def footer(record: SealedRecord, folder: str | None) -> list[RenderableType]:
    """Return what every view ends with: cost, margin, the files and how to check them."""
    lines: list[RenderableType] = []
    cost = record.cost
    work = f"{cost.forward_equivalents:.1f} forward passes over the probe"
    memory = f"peak memory {amount(cost.peak_bytes, 1024, 'B')}"
    lines.append(Text(f"Cost: {duration(cost.wall_seconds)}, {work}, {memory}.", style="dim"))
    lines.append(Text(f"Margin: {nats(record.margin_nats)}{behind(record)}.", style="dim"))
    if record.witness is not None:
        size = amount(record.witness.bytes, 1024, "B")
        lines.append(Text(f"Witness: {clean(record.witness.file)} ({size})", style="dim"))
    if folder is not None:
        check = f"peelwise verify {shlex.quote(clean(folder))}"
        lines.append(Text(f"Files are in {clean(folder)}. Check them with: {check}{own_data(record)}"))
    lines.append(Text("A witness proves; none found proves nothing.", style="dim italic"))
    return lines
