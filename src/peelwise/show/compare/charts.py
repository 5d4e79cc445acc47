"""The charts of a comparison: effects against depth, distances, layers, and a run over time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from peelwise.records.base import Interval, unit_of
from peelwise.records.compare import BlockChange, CompareRecord, CompareSeries, EndChange
from peelwise.show.compare.words import in_order
from peelwise.show.html.svg import COLOURS, draw, safe_label
from peelwise.show.words import in_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 912
_ENDS = {"embedding": "emb", "norm": "norm", "head": "head"}
_MOST_TICKS = 34


def effects(record: CompareRecord) -> str:
    """Draw what each part repairs in NEW and breaks in OLD, with 95 % intervals; "" if nothing was measured."""
    parts = in_order(record)
    if not any(part.repairs_nats or part.breaks_nats for part in parts):
        return ""

    def paint(figure: Figure) -> None:
        top, bottom = figure.subplots(2, 1, sharex=True)
        _intervals(top, parts, [part.repairs_nats for part in parts], record.conclusion.hurt, record.margin_nats)
        top.set_title("Repairs: NEW falls by so much with this part of OLD")
        _intervals(bottom, parts, [part.breaks_nats for part in parts], record.conclusion.hurt, record.margin_nats)
        bottom.set_title("Breaks: OLD rises by so much with this part of NEW")
        _ticks(bottom, parts)
        figure.supylabel(safe_label(unit_of(record)), fontsize=12)

    return draw("effects", "Effect of exchanging each part", (WIDTH, 460), paint)


def path(record: CompareRecord) -> str:
    """Draw the loss on both ways from NEW to OLD; "" without a path, or where it is a single step."""
    parts = [part for part in in_order(record) if part.kind_of_change != "unchanged"]
    if len(parts) < 2 or any(part.path_from_first_nats is None for part in parts):
        return ""

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for key, order, colour, label in (
            ("path_from_first_nats", parts, "accent", "from the embedding on"),
            ("path_from_last_nats", parts[::-1], "mark", "from the head on"),
        ):
            losses = [record.loss.new]
            for part in order:
                losses.append(losses[-1] - getattr(part, key).mean)
            places = list(range(len(losses)))
            axes.plot(places, losses, "o-", color=COLOURS[colour], linewidth=2.2, markersize=5, label=label)
        axes.axhline(record.loss.old, color=COLOURS["muted"], linewidth=1, linestyle="--")
        axes.annotate("OLD", (len(parts), record.loss.old), (4, 2), textcoords="offset points", color=COLOURS["muted"])
        axes.set_xlabel("changed parts put back")
        axes.locator_params(axis="x", integer=True)
        axes.set_ylabel(safe_label(f"loss{in_title(record)}"))
        axes.legend()

    return draw("path", "Loss on two ways from NEW to OLD", (WIDTH, 280), paint)


def distances(record: CompareRecord) -> str:
    """Draw how far weights and outputs moved, against depth."""
    parts = in_order(record)

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        places = range(len(parts))
        for key, colour, marker, label in (
            ("relative_distance", "accent", "o", "weights"),
            ("output_distance", "mark", "s", "output for the same input"),
        ):
            values = [100 * getattr(part, key) for part in parts]
            axes.plot(places, values, marker, color=COLOURS[colour], markersize=6, label=label)
        axes.set_yscale("symlog", linthresh=0.01)
        most = max(100 * max(part.relative_distance, part.output_distance) for part in parts)
        marks = [0.0, *(10.0**power for power in range(-2, 2 + max(0, math.ceil(math.log10(max(most, 1.0)))) - 1))]
        axes.set_yticks(marks, [f"{mark:g}" for mark in marks])
        axes.minorticks_off()
        axes.set_ylim(-0.002, 1.6 * max(most, marks[-1]))
        axes.set_ylabel("moved by, % (log)")
        axes.legend()
        _ticks(axes, parts)

    return draw("distances", "Distance of weights and outputs", (WIDTH, 280), paint)


def over_time(series: CompareSeries) -> str:
    """Draw what each block's last change did, a row per checkpoint; "" if nothing was measured."""
    pairs = [one for one in series.pairs if any(block.repairs_nats for block in one.blocks)]
    if not pairs:
        return ""

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        values = [[b.repairs_nats.mean if b.repairs_nats else 0.0 for b in one.blocks] for one in pairs]
        largest = max(abs(v) for row in values for v in row) or 1.0
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                size = 16 * (abs(value) / largest) ** 0.5
                colour = COLOURS["red"] if value > 0 else COLOURS["green"]
                axes.plot([x], [y], "s" if value > 0 else "o", color=colour, markersize=max(size, 1.5))
        axes.set_yticks(range(len(pairs)), [safe_label(one.model.name) for one in pairs], color=COLOURS["ink"])
        axes.set_ylim(len(pairs) - 0.4, -0.6)
        axes.set_xlabel("block")
        axes.set_title(f"largest: {largest:.3g} nats", loc="right", fontsize=11, fontweight="normal")

    return draw("time", "Effect of each block's change over time", (WIDTH, 90 + 34 * len(pairs)), paint)


def _intervals(
    axes: Axes,
    parts: Sequence[BlockChange | EndChange],
    intervals: Sequence[Interval | None],
    hurt: Sequence[int],
    margin: float,
) -> None:
    axes.axhline(0, color=COLOURS["ink"], linewidth=1)
    for side in (-margin, margin):
        axes.axhline(side, color=COLOURS["muted"], linewidth=1, linestyle=":")
    for place, (part, one) in enumerate(zip(parts, intervals, strict=True)):
        if one is None:
            continue
        named = isinstance(part, BlockChange) and part.index in hurt
        colour = COLOURS["red"] if named else COLOURS["accent"]
        if part.kind_of_change == "unchanged":
            axes.plot([place], [0], "o", color=COLOURS["muted"], markersize=4)
            continue
        axes.plot([place, place], [one.low, one.high], color=colour, linewidth=2)
        axes.plot([place], [one.mean], "s" if named else "o", color=colour, markersize=8 if named else 6)


def _ticks(axes: Axes, parts: Sequence[BlockChange | EndChange]) -> None:
    every = -(-len(parts) // _MOST_TICKS)
    shown = [
        (place, str(part.index) if isinstance(part, BlockChange) else _ENDS[part.unit])
        for place, part in enumerate(parts)
        if not isinstance(part, BlockChange) or part.index % every == 0
    ]
    axes.set_xticks([place for place, _ in shown], [name for _, name in shown])
    for label in axes.get_xticklabels():
        if not label.get_text().isdigit():
            label.set_rotation(90)
    axes.set_xlim(-0.8, len(parts) - 0.2)
