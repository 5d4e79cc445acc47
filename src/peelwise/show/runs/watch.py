"""A run history in the terminal, live: the latest of every block, what it is worth, and what happened. No torch."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Mapping
from datetime import datetime

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from peelwise.records.plain_text import clean
from peelwise.records.run import COLOURS
from peelwise.records.signals import NATS, Kind, Signal, of_kinds
from peelwise.show.words import UNDAMAGED
from peelwise.store.reader import Run, RunReader
from peelwise.store.schema import sound

_STYLES = {"red": "bold red", "yellow": "yellow", "green": "green", "grey": "dim", "frozen": "dim"}
_LEVELS = {"alert": "bold red", "warning": "yellow", "info": "dim"}
_EVENTS = 6
_LOOKED_BACK = 100  # events
_REFINED_WITHIN = 500  # measurements
_COLUMNS = 6  # of signals beside each other
# The tables in their order, each of some kinds of signals: the first has the verdicts too.
_TABLES: tuple[tuple[str, tuple[Kind, ...]], ...] = (
    ("", ("refinement", "backward")),
    ("forward", ("forward",)),
    ("weights", ("weights",)),
    ("weights since the start", ("drift",)),
    ("over depth", ("score",)),
    ("codes since the measurement before", ("codes",)),
)


def watch(
    reader: RunReader,
    run_id: int | None,
    console: Console,
    *,
    seconds: float = 2.0,
    once: bool = False,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Draw the run, and again whenever it has news, until it ends or Ctrl-C.

    Args:
        reader: of the history.
        run_id: number of the run; ``None`` for the newest, also when a newer one begins.
        console: where to draw.
        seconds: between two readings of the file.
        once: draw once and return.
        sleep: waits; tests replace it.
    """
    run = _chosen(reader, run_id)
    if once:
        console.print(view(reader, run))
        return
    with Live(view(reader, run), console=console, auto_refresh=False) as live:
        while run.status == "running":
            sleep(seconds)
            run = _chosen(reader, run_id)
            live.update(view(reader, run), refresh=True)


def view(reader: RunReader, run: Run) -> RenderableType:
    """Return the present state of a run."""
    with sound(reader.path):
        return _view(reader, run)


def _view(reader: RunReader, run: Run) -> RenderableType:
    parts: list[RenderableType] = [_headline(reader, run), *_look_here(reader, run), *_blocks(reader, run)]
    events = reader.events(run.id, most=_EVENTS)
    parts += [_event(row["step"], row["level"], row["text"], row["suggestion"]) for row in events]
    return Group(*parts)


def _chosen(reader: RunReader, run_id: int | None) -> Run:
    return reader.latest() if run_id is None else reader.run(run_id)


def _headline(reader: RunReader, run: Run) -> Text:
    last_step, last_probe, _ = reader.newest_ids(run.id)
    steps = reader.steps(run.id, after=max(last_step - 200, 0)) if last_step else []
    probes = reader.probes(run.id, after=last_probe - 1) if last_probe else []
    words = [f"{clean(run.info.name)}, run {run.id}, {run.status}"]
    if steps:
        loss = next((row["loss"] for row in reversed(steps) if row["loss"] is not None), None)
        words.append(f"step {steps[-1]['step']:,}" + ("" if loss is None else f", loss {loss:.4f}"))
        asked = "" if run.info.budget is None else f" of {run.info.budget:.1%} asked for"
        words.append(f"monitor {steps[-1]['share']:.1%}{asked}")
        words.append(f"as of {_clock(steps[-1]['time'])}")
    if probes:
        words.append(f"measured at step {probes[-1]['step']:,}: {probes[-1]['probe_loss']:.4f} on the probe")
        if probes[-1]["slope"] is not None:
            words.append(f"loss {1000 * probes[-1]['slope']:+.3g} per 1,000 steps")
    return Text(" | ".join(words))


def _look_here(reader: RunReader, run: Run) -> list[Text]:
    """Return one sentence on what to look at first: the newest alert that still holds, or that there is none."""
    probes = reader.probes(run.id, most=1)
    letters = probes[-1]["letters"] if probes else ""
    for row in reversed(reader.events(run.id, most=_LOOKED_BACK)):
        block, kind = row["block"], row["kind"]
        own = letters if block is None else letters[block : block + 1]
        unlike = kind == "unlike-scales" and own == "?"  # until that block has a verdict
        if unlike or (row["level"] == "alert" and (kind != "red" or "R" in own)):
            return [Text(f"Look here: {clean(row['text'])}", style=_LEVELS["alert"])]
    return [Text("No alert so far.", style="dim")] if probes else []


def _clock(seconds: float) -> str:
    try:
        return f"{datetime.fromtimestamp(seconds):%H:%M:%S}"
    except (ValueError, OverflowError, OSError) as error:  # the last one is some systems' word for too large
        raise ValueError(f"{seconds} is no time") from error


def _blocks(reader: RunReader, run: Run) -> list[RenderableType]:
    """Return the verdicts and the newest signals of every block, as many tables as they need."""
    probes = reader.probes(run.id, most=1)
    if not probes:
        return [Text("No measurement yet: the first comes when the budget allows.", style="dim")]
    tables: list[RenderableType] = []
    for title, kinds in _TABLES:
        newest = {signal: _newest(reader, run, signal) for signal in of_kinds(kinds) if signal.in_history}
        shown = [signal for signal, rows in newest.items() if any(block >= 0 for block in rows)]
        if not tables:
            tables.append(_table(run, title, {each: newest[each] for each in shown[:_COLUMNS]}, probes[-1]["letters"]))
            shown = shown[_COLUMNS:]
            if "G" in probes[-1]["letters"]:
                tables.append(Text(f"Green {UNDAMAGED}", style="dim"))
        for start in range(0, len(shown), _COLUMNS):
            tables.append(_table(run, title, {each: newest[each] for each in shown[start : start + _COLUMNS]}))
    return tables


def _newest(reader: RunReader, run: Run, signal: Signal) -> dict[int, sqlite3.Row]:
    """Return a signal's newest row per block; all but refined ones are in every measurement, so a few of those do."""
    return reader.newest(run.id, signal.name, among=_REFINED_WITHIN if signal.kind == "refinement" else 20)


def _table(run: Run, title: str, newest: Mapping[Signal, Mapping[int, sqlite3.Row]], letters: str = "") -> Table:
    """Return a table of blocks by signals; with ``letters``, of all blocks and their verdicts."""
    table = Table(box=None, header_style="bold", pad_edge=False, title=title or None, title_justify="left")
    for name in ("block", "verdict") if letters else ("block",):
        table.add_column(name)
    for signal in newest:
        table.add_column(signal.column, justify="right")
    for block, name in enumerate(run.info.blocks):
        if letters:
            colour = COLOURS[letters[block]]
            verdict = [Text(f"{letters[block]} {colour}", style=_STYLES[colour])]
        elif any(block in rows for rows in newest.values()):
            verdict = []
        else:
            continue
        table.add_row(Text(clean(name)), *verdict, *(_cell(signal, rows.get(block)) for signal, rows in newest.items()))
    return table


def _cell(signal: Signal, row: sqlite3.Row | None) -> Text:
    """Return a value: a refined one with its interval and step, which may be older than the latest measurement.

    Any other is followed by how many times its running median it is, where that is worth a word.
    """
    if row is None:
        return Text("")
    value = signal.form.format(row["value"])
    if signal.kind == "refinement":
        known = signal.unit == NATS and row["low"] is not None and row["high"] is not None
        # Few sequences make intervals lopsided, so both ends are shown.
        ends = f" [{row['low']:z.4f}, {row['high']:z.4f}]" if known else ""
        return Text(f"{value}{ends} @{row['step']:,}")
    times = row["to_median"]
    if not signal.quotient or times is None or 0.67 < times < 1.5:
        return Text(value)
    return Text(f"{value} (x{times:.2g})", style="yellow" if times > 1 else "")


def _event(step: int, level: str, text: str, suggestion: str) -> Text:
    line = Text(f"step {step:,}: {clean(text)}", style=_LEVELS.get(level, ""))
    return line.append(f" {clean(suggestion)}", style="default") if suggestion else line
