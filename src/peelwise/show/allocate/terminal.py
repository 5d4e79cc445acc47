"""An allocation of bits on the terminal: the curve, a strip of blocks, and the layers that cost most."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from peelwise.records.allocation import AllocatedLayer, AllocationRecord
from peelwise.records.plain_text import clean
from peelwise.show.allocate.words import THIS_PLAN, conclusion, curve_rows, interaction
from peelwise.show.words import bracket, duration, nats, note_words

MOST_LAYERS = 12


def render(record: AllocationRecord, most: int | None = MOST_LAYERS) -> RenderableType:
    """Return the view.

    Args:
        record: what was found.
        most: how many layers to list; ``None`` for all of them.
    """
    return Group(
        Text.assemble((clean(record.model.name), "bold"), (f" in {record.bits_per_weight:.2f} bits per weight", "dim")),
        Text(clean(conclusion(record))),
        Text("\nLoss on report against bits per weight of the quantised layers", style="bold"),
        Padding(_curve(record), (0, 0, 0, 1)),
        Text("\nBits per weight of each block, in block order", style="bold"),
        Padding(_strip(record), (0, 0, 0, 1)),
        Text(""),
        Text("Layers whose format costs most of the predicted damage", style="bold"),
        _layers(record, most),
        Text(f"\nInteractions: {interaction(record)}."),
        *(Text(f"Note: {clean(note_words(line))}") for line in record.notes),
        Text(f"Cost: {duration(record.cost.wall_seconds)}.", style="dim"),
    )


def _curve(record: AllocationRecord) -> Table:
    table = Table(box=None, padding=(0, 1), header_style="bold", pad_edge=False)
    table.add_column("bits", justify="right")
    table.add_column("formats")
    for title in ("loss", "damage"):
        table.add_column(title, justify="right")
    table.add_column("95 % interval")
    for bits, name, loss, damage in curve_rows(record):
        cells = (f"{bits:.2f}", clean(name), nats(loss), f"{damage.mean:+.4f}", bracket(damage))
        table.add_row(*(Text(cell, "bold" if name == THIS_PLAN else "") for cell in cells))
    return table


def _strip(record: AllocationRecord) -> Text:
    """Return a digit per block: its bits per weight, rounded."""
    blocks = sorted({layer.block for layer in record.layers})
    digits = []
    for block in blocks:
        own = [layer for layer in record.layers if layer.block == block]
        mean = sum(layer.bits_per_weight * layer.weights for layer in own) / sum(layer.weights for layer in own)
        digits.append(str(min(round(mean), 16)))
    return Text(" ".join(digits))


def _layers(record: AllocationRecord, most: int | None) -> Table:
    shown = sorted(record.stored, key=lambda layer: layer.share, reverse=True)[:most]
    table = Table(box=None, padding=(0, 1), header_style="bold", pad_edge=False)
    table.add_column("block", justify="right", no_wrap=True)
    table.add_column("layer", no_wrap=True)
    table.add_column("format", no_wrap=True)
    table.add_column("share, %", justify="right")
    table.add_column("nats", justify="right")
    for layer in shown:
        table.add_row(
            str(layer.block), clean(_short(layer)), layer.format, f"{100 * layer.share:.1f}",
            f"{layer.predicted.get(layer.format, 0.0):.4f}",
        )  # fmt: skip
    return table


def _short(layer: AllocatedLayer) -> str:
    return layer.name.partition(f".{layer.block}.")[2] or layer.name
