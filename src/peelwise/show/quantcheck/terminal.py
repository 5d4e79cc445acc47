"""A comparison of a quantised model with its parent, on the terminal."""

from __future__ import annotations

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from peelwise.records.plain_text import clean
from peelwise.records.quantcheck import LayerCheck, QuantcheckRecord
from peelwise.show.allocate import terminal as allocate_terminal
from peelwise.show.audit.low_bit import GAP, SAME_BITS
from peelwise.show.audit.terminal import print_view
from peelwise.show.quantcheck.words import ABOUT_LAYERS, NOT_KEPT, activations, conclusion, survival
from peelwise.show.words import NOT_IN_BUDGET, bracket, duration, nats, note_words

MOST_LAYERS = 24


def render(record: QuantcheckRecord, most: int | None = MOST_LAYERS) -> RenderableType:
    """Return the view: the loss in three parts, and the layers in which most is recoverable.

    Args:
        record: what was found.
        most: how many layers to list; ``None`` for all of them.
    """
    lines: list[RenderableType] = [
        Text.assemble(
            (clean(record.quantised.name), "bold"), (" against ", "dim"), (clean(record.parent.name), "bold")
        ),
        Text(clean(conclusion(record))),
        *(Text(line) for line in (*activations(record), *survival(record))),
        Text("\nLoss on report, nats per token", style="bold"),
        Padding(_losses(record), (0, 0, 0, 1)),
        *_layers(record, most),
        Text(""),
        *(Text(f"Note: {clean(line)}") for line in _notes(record)),
        Text(f"Cost: {duration(record.cost.wall_seconds)}.", style="dim"),
    ]
    if record.allocation is not None:
        lines += [Text(""), Rule(style="dim"), allocate_terminal.render(record.allocation)]
    return Group(*lines)


def _notes(record: QuantcheckRecord) -> list[str]:
    return [*([] if record.loss.kept else [NOT_KEPT]), *map(note_words, record.notes)]


def print_record(record: QuantcheckRecord, console: Console, most: int | None = MOST_LAYERS) -> None:
    """Print the view, in plain characters where the terminal cannot show others."""
    print_view(render(record, most), console)


def _losses(record: QuantcheckRecord) -> Table:
    loss = record.loss
    runs = (
        ()
        if loss.as_run is None or loss.activations is None
        else (
            ("quantised inputs", nats(loss.activations.mean), bracket(loss.activations), "beside the weights"),
            ("as it runs", nats(loss.as_run), "", "with them"),
        )
    )
    rows = (
        ("parent (irreducible)", nats(loss.split.irreducible), "", ""),
        (
            GAP,
            f"≤ {nats(loss.split.price_of_precision)}",
            bracket(loss.price),
            "at most due to the bits",
        ),
        (SAME_BITS, nats(loss.split.left_on_the_table), bracket(loss.left), "certified"),
        ("quantised", nats(loss.quantised), "", "the three parts add up to it"),
        *runs,
        ("best weights found", nats(loss.best), "", ""),
    )
    table = Table(box=None, padding=(0, 1), show_header=False, pad_edge=False)
    for justify in ("left", "right", "left", "left"):
        table.add_column(justify=justify)
    for name, value, interval, meaning in rows:
        style = "bold" if name == SAME_BITS else ""
        table.add_row(Text(name, style), Text(value, style), Text(interval), Text(meaning, style="dim"))
    return table


def _layers(record: QuantcheckRecord, most: int | None) -> list[RenderableType]:
    measured = [layer for layer in record.layers if layer.split or not layer.codes]
    solved = sorted(measured, key=lambda layer: (_left(layer), layer.error), reverse=True)
    shown = solved if most is None else solved[:most]
    table = Table(box=None, padding=(0, 1), header_style="bold", pad_edge=False)
    table.add_column("block", justify="right", no_wrap=True)
    table.add_column("layer", overflow="fold", min_width=12)
    formats = sorted({layer.format for layer in record.layers})
    if len(formats) > 1:  # one format for all is said above, and leaves its room to the names
        table.add_column("format", overflow="fold")
    for title in ("bits", "error", "gap\nat most", "recov-\nerable", "codes\nother"):
        table.add_column(title, justify="right", no_wrap=True)
    shares = any(layer.share is not None for layer in shown)
    if shares:
        table.add_column("share of\ndamage", justify="right", no_wrap=True)
    if record.activations:
        table.add_column("inputs\nrounded", justify="right", no_wrap=True)
    for layer in shown:
        split = layer.split
        table.add_row(
            str(layer.block),
            clean(layer.name.partition(f".{layer.block}.")[2] or layer.name),
            *([layer.format] if len(formats) > 1 else []),
            f"{layer.bits_per_weight:.2f}",
            _percent(layer.error),
            _percent(split.price_of_precision + split.irreducible if split else None),
            _percent(split.left_on_the_table if split else None),
            _percent(layer.flipped),
            *([_percent(layer.share)] if shares else []),
            *([_percent(layer.inputs)] if record.activations else []),
        )
    about = ABOUT_LAYERS if len(formats) > 1 else f"{ABOUT_LAYERS} All hold {clean(formats[0])}."
    title = "\nOutput error of each layer, in percent of the parent's output"
    lines: list[RenderableType] = [Text(title, style="bold"), Text(about, style="dim"), table]
    if len(solved) > len(shown):
        lines.append(
            Text(f"The {len(shown)} with most to recover; all {len(solved)} with --all or in the JSON.", style="dim")
        )
    missing = len(record.layers) - len(solved)
    if missing:
        lines.append(Text(f"{missing} more layers: {NOT_IN_BUDGET}.", style="bold yellow"))
    return lines


def _left(layer: LayerCheck) -> float:
    return layer.split.left_on_the_table if layer.split else 0.0


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.3g}"
