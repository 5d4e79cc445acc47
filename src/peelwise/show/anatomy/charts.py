"""The charts of an anatomy: ablation over depth, and how far each block bends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from peelwise.records.anatomy import ABLATIONS, AnatomyRecord
from peelwise.show.anatomy import words
from peelwise.show.html.svg import COLOURS, draw

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 912
_LOOKS = {
    "skipped": ("ink", "o"),
    "attention": ("accent", "^"),
    "mlp": ("mark", "s"),
    "mean": ("muted", "v"),
    "neighbours": ("red", "x"),
}
_MOST_TICKS = 34


def ablation(record: AnatomyRecord) -> str:
    """Draw what each way of ablating a block costs, over depth; "" if nothing was measured."""
    if not any(block.ablation for block in record.blocks):
        return ""

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for way in ABLATIONS:
            colour, marker = _LOOKS[way]
            found = [(b.index, b.ablation[way]) for b in record.blocks if way in b.ablation]
            if found:
                places, costs = zip(*found, strict=True)
                means = [cost.mean for cost in costs]
                axes.plot(places, means, marker, color=COLOURS[colour], markersize=6, label=words.ABLATIONS[way])
                if way == "skipped":
                    ends = [[c.mean - c.low for c in costs], [c.high - c.mean for c in costs]]
                    axes.errorbar(places, means, yerr=ends, fmt="none", ecolor=COLOURS[colour], elinewidth=1)
        axes.axhline(record.margin_nats, color=COLOURS["muted"], linewidth=1, linestyle=":")
        _costs_axis(axes, [cost.mean for b in record.blocks for cost in b.ablation.values()], record.margin_nats)
        axes.legend(ncols=3)
        _ticks(axes, record)

    return draw("ablation", "What ablating each block costs", (WIDTH, 340), paint)


def scaling(record: AnatomyRecord) -> str:
    """Draw what scaling all matrices of each block costs; "" if it was not measured."""
    curves = {}
    for block in record.blocks:
        points = {1.0: 0.0}
        for bent in block.bent:
            if bent.kind in ("scale-down", "scale-up"):
                points |= dict(zip(bent.strengths, (cost.mean for cost in bent.costs), strict=False))
        if len(points) > 1:
            curves[block.index] = sorted(points.items())
    if not curves:
        return ""

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for index, points in curves.items():
            shade = 0.35 + 0.65 * index / max(1, len(record.blocks) - 1)
            factors, costs = zip(*points, strict=True)
            axes.plot(factors, costs, "o-", color=COLOURS["accent"], alpha=shade, markersize=4, linewidth=1.2)
            axes.annotate(str(index), (factors[0], costs[0]), (-3, 0), textcoords="offset points", ha="right",
                          va="center", fontsize=9, color=COLOURS["muted"])  # fmt: skip
        axes.axhline(record.margin_nats, color=COLOURS["muted"], linewidth=1, linestyle=":")
        _costs_axis(axes, [cost for points in curves.values() for _, cost in points], record.margin_nats)
        axes.set_xlabel("factor on all matrices of the block")

    return draw("scaling", "What scaling each block costs", (WIDTH, 300), paint)


def _costs_axis(axes: Axes, costs: Sequence[float], margin: float) -> None:
    """Make the axis of costs logarithmic beyond the margin, with plain numbers at its ticks."""
    straight = max(margin, 1e-3)
    axes.set_yscale("symlog", linthresh=straight)
    marks = [0.0]
    for sign, most in ((1, max(costs)), (-1, -min(costs))):
        first = math.ceil(math.log10(straight))
        marks += [sign * 10.0**power for power in range(first, first + 8) if 10.0**power <= 1.2 * most]
    axes.set_yticks(sorted(marks), [f"{mark:g}" for mark in sorted(marks)])
    axes.minorticks_off()
    axes.set_ylim(1.6 * min(costs) if min(costs) < -straight else -straight, 1.6 * max(*costs, straight))
    axes.set_ylabel("nats per token (log)")


def _ticks(axes: Axes, record: AnatomyRecord) -> None:
    step = -(-len(record.blocks) // _MOST_TICKS)
    axes.set_xticks([block.index for block in record.blocks][::step])
    axes.set_xlabel("block")
