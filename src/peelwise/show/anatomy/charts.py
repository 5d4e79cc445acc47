"""The charts of an anatomy: ablation over depth, and how far each block bends."""

from __future__ import annotations

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
        axes.set_yscale("symlog", linthresh=max(record.margin_nats, 1e-3))
        axes.minorticks_off()
        axes.set_ylabel("nats per token (log)")
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
        axes.set_yscale("symlog", linthresh=max(record.margin_nats, 1e-3))
        axes.minorticks_off()
        axes.set_xlabel("factor on all matrices of the block")
        axes.set_ylabel("nats per token (log)")

    return draw("scaling", "What scaling each block costs", (WIDTH, 300), paint)


def _ticks(axes: Axes, record: AnatomyRecord) -> None:
    step = -(-len(record.blocks) // _MOST_TICKS)
    axes.set_xticks([block.index for block in record.blocks][::step])
    axes.set_xlabel("block")
