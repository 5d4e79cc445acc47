"""A run history in the terminal, live: the latest of every block, what it is worth, and what happened. No torch."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from datetime import datetime

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from peelwise.records.plain_text import clean
from peelwise.records.run import COLOURS
from peelwise.store.reader import Run, RunReader
from peelwise.store.schema import sound

_STYLES = {"red": "bold red", "yellow": "yellow", "green": "green", "grey": "dim"}
_LEVELS = {"alert": "bold red", "warning": "yellow", "info": "dim"}
_EVENTS = 6
_OWN_COLUMNS = (("recoverable", "alone"), ("unique", "unique"), ("equivalent_steps", "steps"))
_FREE_COLUMNS = (("natural_energy", "natural energy"), ("energy", "energy"), ("gradient_norm", "gradient norm"))

_CODE_COLUMNS = (
    ("codes_flipped", "flipped", "{:.3%}"),
    ("near_threshold", "near a threshold", "{:.1%}"),
    ("scale_drift", "scale drift", "{:.2%}"),
    ("dead_rows", "dead outputs", "{:.0f}"),
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
        seconds: between two looks at the file.
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
    parts: list[RenderableType] = [_headline(reader, run), _blocks(reader, run), *_codes(reader, run)]
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
        words.append(f"looked at step {probes[-1]['step']:,}: {probes[-1]['probe_loss']:.4f} on the probe")
        if probes[-1]["slope"] is not None:
            words.append(f"loss {1000 * probes[-1]['slope']:+.3g} per 1,000 steps")
    return Text(" | ".join(words))


def _clock(seconds: float) -> str:
    try:
        return f"{datetime.fromtimestamp(seconds):%H:%M:%S}"
    except (ValueError, OverflowError, OSError) as error:  # the last one is some systems' word for too large
        raise ValueError(f"{seconds} is no time") from error


def _blocks(reader: RunReader, run: Run) -> RenderableType:
    probes = reader.probes(run.id, most=1)
    if not probes:
        return Text("No look at the model yet: the first comes when the budget allows.", style="dim")
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("block", "verdict"):
        table.add_column(name)
    for _, title in _OWN_COLUMNS + _FREE_COLUMNS:
        table.add_column(title, justify="right")
    own = {name: reader.newest(run.id, name) for name, _ in _OWN_COLUMNS}
    free = {name: reader.newest(run.id, name) for name, _ in _FREE_COLUMNS}
    for block, (name, letter) in enumerate(zip(run.info.blocks, probes[-1]["letters"], strict=True)):
        colour = COLOURS[letter]
        cells: list[Text] = [_interval(own[key].get(block), key) for key, _ in _OWN_COLUMNS]
        cells += [_free(free[key].get(block)) for key, _ in _FREE_COLUMNS]
        table.add_row(Text(clean(name)), Text(f"{letter} {colour}", style=_STYLES[colour]), *cells)
    return table


def _codes(reader: RunReader, run: Run) -> list[RenderableType]:
    """Return the signals of low-bit blocks, as last looked at; nothing for a run without any."""
    newest = {name: reader.newest(run.id, name) for name, _, _ in _CODE_COLUMNS}
    if not newest["codes_flipped"]:
        return []
    table = Table(
        box=None, header_style="bold", pad_edge=False, title="codes since the look before", title_justify="left"
    )
    table.add_column("block")
    for _, title, _ in _CODE_COLUMNS:
        table.add_column(title, justify="right")
    for block in sorted(newest["codes_flipped"]):
        cells = [
            form.format(newest[name][block]["value"]) if block in newest[name] else ""
            for name, _, form in _CODE_COLUMNS
        ]
        table.add_row(clean(run.info.blocks[block]), *cells)
    return [table]


def _interval(row: sqlite3.Row | None, name: str) -> Text:
    """Return a measured number with its step: it may be older than the latest look."""
    if row is None:
        return Text("")
    value = f"{row['value']:,.0f}" if name == "equivalent_steps" else f"{row['value']:+.4f}"
    half = "" if name == "equivalent_steps" else f" +- {(row['high'] - row['low']) / 2:.4f}"
    return Text(f"{value}{half} @{row['step']:,}")


def _free(row: sqlite3.Row | None) -> Text:
    """Return a free statistic, and how many times its running median it is where that is worth a word."""
    if row is None:
        return Text("")
    times = row["to_median"]
    if times is None or 0.67 < times < 1.5:
        return Text(f"{row['value']:.3g}")
    return Text(f"{row['value']:.3g} (x{times:.2g})", style="yellow" if times > 1 else "")


def _event(step: int, level: str, text: str, suggestion: str) -> Text:
    line = Text(f"step {step:,}: {clean(text)}", style=_LEVELS.get(level, ""))
    return line.append(f" {clean(suggestion)}", style="default") if suggestion else line
