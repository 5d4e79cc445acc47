"""The charts of the report: each takes a record and returns an SVG, or "" if there is nothing to draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from peelwise.records.audit import AuditRecord, BlockRecord, MatrixRecord
from peelwise.records.base import Colour, Interval
from peelwise.records.signals import RANKED_BY, SIGNALS
from peelwise.show.html.svg import COLOURS, draw, safe_label
from peelwise.show.words import (
    NOT_IN_BUDGET,
    VERDICTS,
    in_title,
    is_bounded,
    is_interaction,
    is_measured,
    nats,
    ranking,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 912
MOST_MATRICES = 20
MARKERS: dict[Colour, str] = {"red": "s", "yellow": "^", "green": "o", "grey": "D", "frozen": "s"}
OTHERS = "(others)"


def recoverable(record: AuditRecord) -> str:
    """Draw the solo and the marginal gain of each block, with 95 % intervals and the margin."""
    blocks = record.blocks
    if not any(is_measured(block) for block in blocks):
        return ""

    def paint(figure: Figure) -> None:
        top, bottom = figure.subplots(2, 1, sharex=True)
        _intervals(top, blocks, [block.recoverable_nats for block in blocks], record.margin_nats, _bounds(blocks))
        top.set_title("Solo gain: this block refined, all others as they are")
        _intervals(bottom, blocks, [block.unique_nats for block in blocks], record.margin_nats)
        bottom.set_title("Marginal gain: what it adds once all others are refined")
        _depth_axis(bottom, blocks)
        figure.supylabel(f"recoverable loss{_unit(record)}", fontsize=12)

    return draw("recoverable", "Recoverable loss of each block", (_width(len(blocks)), 480), paint)


def losses(record: AuditRecord) -> str:
    """Draw the losses that share a scale: now, with the witness, with a new head, from shuffled targets."""
    loss = record.loss
    candidates = (
        ("shuffled targets", loss.shuffled, "muted"),
        ("new head only", loss.head_control, "muted"),
        ("whole witness", loss.composed, "accent"),
    )
    rows = [(name, value, colour) for name, value, colour in candidates if value is not None]
    if not rows:
        return ""

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        axes.axvline(loss.current, color=COLOURS["ink"], linewidth=1.6)
        for place, (_, value, colour) in enumerate(rows):
            axes.plot([loss.current, value], [place, place], color=COLOURS[colour], linewidth=3)
            axes.plot([value], [place], "o", color=COLOURS[colour], markersize=9)
            # On the side away from the line at "now", so that the two never cross.
            aside, align = (-10, "right") if value < loss.current else (10, "left")
            axes.annotate(nats(value), (value, place), (aside, 0), textcoords="offset points", ha=align, va="center")
        axes.set_yticks(range(len(rows)), [name for name, _, _ in rows], color=COLOURS["ink"])
        axes.set_ylim(-0.6, len(rows) - 0.2)
        axes.margins(x=0.12)
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.set_title(f"now {nats(loss.current)}", loc="center", x=_share(axes, loss.current))
        axes.set_xlabel(f"loss on report{_unit(record)} (further left is lower)")

    return draw("losses", "Loss now, with the witness and of the controls", (WIDTH, 110 + 45 * len(rows)), paint)


def _unit(record: AuditRecord) -> str:
    return in_title(record).replace("$", r"\$")  # which begins a formula


def matrices(record: AuditRecord) -> str:
    """Draw each linear layer's share of its block's input-whitened score, stronger for more."""
    blocks = [block for block in record.blocks if block.matrices]
    if not blocks:
        return ""
    rows = _matrix_rows(blocks)

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        _share_cells(axes, blocks, rows)
        axes.set_yticks(range(len(rows)), [safe_label(row) for row in rows], color=COLOURS["ink"])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(visible=False)
        for side in ("left", "bottom"):
            axes.spines[side].set_visible(False)
        _depth_axis(axes, record.blocks)

    size = (_width(len(record.blocks)), 90 + 24 * len(rows))
    return draw("matrices", "Share of each linear layer within its block", size, paint)


def energy(record: AuditRecord) -> str:
    """Draw what ranks blocks before anything is evaluated, against depth."""
    blocks = [(block, value) for block in record.blocks if (value := ranking(block)) is not None and value > 0]
    if not blocks:
        return ""

    def paint(figure: Figure) -> None:
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        axes = figure.subplots()
        axes.plot([b.index for b, _ in blocks], [v for _, v in blocks], color=COLOURS["line"], linewidth=2)
        for colour in VERDICTS:
            some = [(b.index, v) for b, v in blocks if b.verdict == colour]
            axes.plot([i for i, _ in some], [v for _, v in some], **_marker(colour))
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylabel(f"{SIGNALS[RANKED_BY].column} (log)")
        _depth_axis(axes, record.blocks)

    title = f"{SIGNALS[RANKED_BY].column.capitalize()} of each block"
    return draw("energy", title, (_width(len(record.blocks)), 260), paint)


def rounds(record: AuditRecord) -> str:
    """Draw the loss on select after each joint round."""
    if not record.rounds:
        return ""
    values = [record.rounds[0].select_before, *(one.select_after for one in record.rounds)]

    def paint(figure: Figure) -> None:
        from matplotlib.ticker import MaxNLocator

        axes = figure.subplots()
        axes.plot(range(len(values)), values, "o-", color=COLOURS["accent"], linewidth=2, markersize=6)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.margins(x=0.06, y=0.15)
        axes.set_xlabel("joint round")
        axes.set_ylabel("loss on select")

    return draw("rounds", "Loss on select after each joint round", (520, 230), paint)


def split(record: AuditRecord) -> str:
    """Draw what is recoverable in each low-bit block at the same bit width, and the quantisation gap on top of it."""
    blocks = [block for block in record.blocks if block.split is not None]
    if not blocks:
        return ""
    parts = (
        ("left_on_the_table", "recoverable at the same bit width, certified", 1.0),
        ("price_of_precision", "quantisation gap, upper bound", 0.35),
    )

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        base = [0.0] * len(blocks)
        for part, label, strength in parts:
            heights = [max(float(getattr(block.split, part)), 0.0) for block in blocks]  # noise may be below 0
            places = [block.index for block in blocks]
            axes.bar(places, heights, 0.78, base, color=COLOURS["accent"], alpha=strength, label=label)
            base = [low + height for low, height in zip(base, heights, strict=True)]
        axes.set_ylabel("nats per token")
        _depth_axis(axes, record.blocks)
        figure.legend(loc="outside upper left", ncols=3)

    return draw(
        "split",
        "What is recoverable in each low-bit block, and its quantisation gap",
        (_width(len(record.blocks)), 280),
        paint,
    )


def _width(blocks: int) -> int:
    """Few blocks need no wide chart, in which two dots would be lost."""
    return max(560, min(WIDTH, 160 + 28 * blocks))


def _share(axes: Axes, value: float) -> float:
    low, high = axes.get_xlim()
    return (value - low) / (high - low)


def _depth_axis(axes: Axes, blocks: Sequence[BlockRecord]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("block")
    if not blocks:
        return
    first, last = blocks[0].index, blocks[-1].index
    axes.set_xlim(first - 0.7, last + 0.7)
    if len(blocks) <= 40:
        axes.set_xticks([block.index for block in blocks])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=20, integer=True, steps=[1, 2, 5, 10]))


def _marker(colour: Colour) -> dict[str, Any]:
    hollow = colour in ("grey", "frozen")
    return {
        "linestyle": "none",
        "marker": MARKERS[colour],
        "markersize": 8 if colour == "red" else 6,
        "color": COLOURS[colour],
        "markerfacecolor": COLOURS["page" if hollow else colour],
        "markeredgewidth": 1.4,
    }


def _bounds(blocks: Sequence[BlockRecord]) -> dict[int, float]:
    """Return by index the upper end of the first-order bound, of blocks that have no solo gain."""
    return {b.index: b.first_order_nats.high for b in blocks if b.first_order_nats and is_bounded(b)}


def _intervals(
    axes: Axes,
    blocks: Sequence[BlockRecord],
    values: Sequence[Interval | None],
    margin: float,
    bounds: Mapping[int, float] | None = None,
) -> None:
    bounds = bounds or {}
    axes.axhline(0, color=COLOURS["muted"], linewidth=1)
    found = [(b, value) for b, value in zip(blocks, values, strict=True) if value is not None]
    for block, value in zip(blocks, values, strict=True):
        if block.index in bounds:
            high, colour = bounds[block.index], COLOURS[block.verdict]
            axes.vlines(block.index, 0, high, colors=colour, linestyles=(0, (2, 2)), linewidth=1.4)
            axes.plot(block.index, high, marker="v", markersize=9, color=colour, linestyle="none")
        elif value is None:
            axes.axvspan(block.index - 0.5, block.index + 0.5, color=COLOURS["muted"], alpha=0.12, linewidth=0)
    if not found and not bounds:
        axes.text(
            0.5,
            0.5,
            NOT_IN_BUDGET,
            transform=axes.transAxes,
            ha="center",
            va="center",
            color=COLOURS["muted"],
        )
        axes.set_yticks([])
        return
    axes.axhline(margin, color=COLOURS["ink"], linewidth=1.1, linestyle=(0, (5, 3)))
    axes.annotate(
        "margin",
        (1, margin),
        (-2, 5),
        axes.get_yaxis_transform(),
        textcoords="offset points",
        ha="right",
        fontsize=11,
    )
    for colour in VERDICTS:
        some = [(b, value) for b, value in found if b.verdict == colour and not is_interaction(value)]
        _bars(axes, some, COLOURS[colour], _marker(colour))
    odd = [(b, value) for b, value in found if is_interaction(value)]
    cross: dict[str, Any] = {"linestyle": "none", "marker": "X", "markersize": 9, "color": COLOURS["mark"]}
    _bars(axes, odd, COLOURS["mark"], cross)
    axes.margins(y=0.12)


def _bars(axes: Axes, found: Sequence[tuple[BlockRecord, Interval]], colour: str, marker: dict[str, Any]) -> None:
    if not found:
        return
    places = [block.index for block, _ in found]
    axes.bar(places, [v.mean for _, v in found], 0.72, color=colour, alpha=0.25, linewidth=0)
    axes.vlines(places, [v.low for _, v in found], [v.high for _, v in found], color=colour, linewidth=2)
    axes.plot(places, [v.mean for _, v in found], **marker)


def _short_name(block: BlockRecord, matrix: MatrixRecord) -> str:
    """A matrix is called the same in every block once the block's own name is taken off."""
    return matrix.name.removeprefix(f"{block.name}.")


def _matrix_rows(blocks: Sequence[BlockRecord]) -> list[str]:
    """Return the names to show as rows; beyond ``MOST_MATRICES`` the smaller ones share a row."""
    totals: dict[str, float] = {}
    for block in blocks:
        for matrix in block.matrices:
            name = _short_name(block, matrix)
            totals[name] = totals.get(name, 0.0) + matrix.share
    if len(totals) <= MOST_MATRICES:
        return list(totals)
    largest = sorted(totals, key=lambda name: -totals[name])[: MOST_MATRICES - 1]
    return [name for name in totals if name in largest] + [OTHERS]


def _share_cells(axes: Axes, blocks: Sequence[BlockRecord], rows: Sequence[str]) -> None:
    """Draw one path per twentieth of share: eighty blocks of a dozen matrices stay a few kilobytes."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    place = {name: row for row, name in enumerate(rows)}
    steps: dict[int, list[Path]] = {}
    for block in blocks:
        shares = dict.fromkeys(range(len(rows)), 0.0)
        for matrix in block.matrices:
            shares[place.get(_short_name(block, matrix), len(rows) - 1)] += matrix.share
        for row, share in shares.items():
            x, y = block.index - 0.46, row - 0.46
            cell = Path([(x, y), (x + 0.92, y), (x + 0.92, y + 0.92), (x, y + 0.92), (x, y)], closed=True)
            steps.setdefault(max(1, min(20, round(20 * share))), []).append(cell)
    largest = max(steps)
    for step, cells in sorted(steps.items()):
        path = Path.make_compound_path(*cells)
        axes.add_patch(PathPatch(path, color=COLOURS["accent"], alpha=step / largest, linewidth=0))
    scale = f"strongest colour: about {5 * largest} %"
    axes.set_title(scale, loc="right", fontsize=11, fontweight="normal", color=COLOURS["muted"])
