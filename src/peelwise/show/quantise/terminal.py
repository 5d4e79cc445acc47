"""What quantising a model cost and saved, on the terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from peelwise.records.plain_text import clean
from peelwise.records.quantise import QuantisedLayer, QuantiseRecord
from peelwise.show.quantise.words import ABOUT_LAYERS, STEPS, conclusion
from peelwise.show.words import bracket, duration, nats, note_words

MOST_LAYERS = 12


def render(record: QuantiseRecord, most: int | None = MOST_LAYERS) -> RenderableType:
    """Return the view: the losses, how far the stations are from the parent's, and the layers that lose most.

    Args:
        record: what was found.
        most: how many layers to list; ``None`` for all of them.
    """
    lines: list[RenderableType] = [
        Text.assemble((clean(record.model.name), "bold"), (" in ", "dim"), (clean(record.format), "bold")),
        Text(clean(conclusion(record))),
        Text("\nLoss on report, nats per token", style="bold"),
        Padding(_losses(record), (0, 0, 0, 1)),
        Text("\nDistance of the stream behind each block from the parent's, percent of its variance", style="bold"),
        Padding(_behind(record), (0, 0, 0, 1)),
        *_layers(record, most),
        Text(""),
    ]
    if record.skipped:
        names = ", ".join(clean(name) for name in record.skipped[:3])
        lines.append(Text(f"Left in full precision: {len(record.skipped)} layers of the blocks, such as {names}."))
    lines += [Text(f"Note: {clean(note_words(line))}") for line in record.notes]
    return Group(*lines, Text(f"Cost: {duration(record.cost.wall_seconds)}.", style="dim"))


def _losses(record: QuantiseRecord) -> Table:
    loss = record.loss
    table = Table(box=None, padding=(0, 1), show_header=False, pad_edge=False)
    for justify in ("left", "right", "right", "left"):
        table.add_column(justify=justify)
    table.add_row("parent", nats(loss.parent), "", "")
    table.add_row(
        "rounded to nearest", nats(loss.rounded), f"+{nats(loss.rounding_damage.mean)}", bracket(loss.rounding_damage)
    )
    table.add_row(
        Text("quantised", "bold"),
        Text(nats(loss.quantised), "bold"),
        Text(f"{loss.damage.mean:+.4f}", "bold"),
        Text(bracket(loss.damage)),
    )
    return table


def _behind(record: QuantiseRecord) -> Text:
    """Return a line of bars, one per block, and the largest number."""
    errors = [block.error for block in record.blocks]
    top = max(errors, default=0.0) or 1.0
    bars = "".join("▁▂▃▄▅▆▇█"[min(int(8 * error / top), 7)] for error in errors)
    worst = max(record.blocks, key=lambda block: block.error)
    return Text.assemble(bars, (f"  largest {_percent(worst.error)} behind block {worst.index}", "dim"))


def _layers(record: QuantiseRecord, most: int | None) -> list[RenderableType]:
    ordered = sorted(record.layers, key=_last, reverse=True)
    shown = ordered if most is None else ordered[:most]
    steps = [step for step in STEPS if any(step in layer.steps for layer in shown)]
    table = Table(box=None, padding=(0, 1), header_style="bold", pad_edge=False)
    table.add_column("block", justify="right", no_wrap=True)
    table.add_column("layer", overflow="fold")
    mixed = len({layer.format for layer in record.layers}) > 1
    if mixed:
        table.add_column("format", no_wrap=True)
    for title in ("bits", *(STEPS[step] for step in steps)):
        table.add_column(title.replace(" ", "\n", 1), justify="right")
    for layer in shown:
        table.add_row(
            str(layer.block),
            clean(layer.name.partition(f".{layer.block}.")[2] or layer.name),
            *([layer.format] if mixed else []),
            f"{layer.bits_per_weight:.2f}",
            *(_percent(layer.steps.get(step)) for step in steps),
        )
    lines: list[RenderableType] = [
        Text("\nLayers that lose most", style="bold"),
        Text(ABOUT_LAYERS, style="dim"),
        table,
    ]
    if len(ordered) > len(shown):
        lines.append(Text(f"{len(shown)} of {len(ordered)}; all with --all or in the JSON.", style="dim"))
    return lines


def _last(layer: QuantisedLayer) -> float:
    return list(layer.steps.values())[-1] if layer.steps else 0.0


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.3g}"
