"""The charts of a peel's report: each takes a record and returns an SVG, or "" if there is nothing to draw."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peelwise.records.peel import MapRecord, PeelRecord, StationRecord
from peelwise.show.audit.charts import WIDTH
from peelwise.show.html.svg import COLOURS, draw, safe_label
from peelwise.show.peel.words import shown_loss, stations
from peelwise.show.words import nats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_ROWS = 24
STATION_MARKS: dict[str, tuple[str, str]] = {  # marker, colour
    "needed": ("o", "ink"),
    "redundant": ("s", "accent"),
    "misleading": ("X", "mark"),
    "undecided": ("D", "muted"),
}


def maps(record: PeelRecord) -> str:
    """Draw the loss of every map against the model and its head control, with paired 95 % intervals."""
    shown = record.maps[:MOST_ROWS]
    if not shown:
        return ""
    control = record.loss.head_control

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        axes.axvline(record.loss.current, color=COLOURS["ink"], linewidth=1.6)
        if control is not None:
            axes.axvline(control, color=COLOURS["ink"], linewidth=1.4, linestyle=(0, (5, 3)))
        for place, one in enumerate(shown):
            _map_row(axes, record, one, place)
        axes.set_yticks(range(len(shown)), [_label(one) for one in shown], color=COLOURS["ink"])
        axes.set_ylim(len(shown) - 0.4, -1.3)
        axes.margins(x=0.06)
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        _reference_labels(axes, record.loss.current, control)
        axes.set_xlabel("loss on report, nats per token (further left is lower)")

    return draw("maps", "Loss of every map against the model", (WIDTH, 110 + 26 * len(shown)), paint)


def station_losses(record: PeelRecord) -> str:
    """Draw what is lost when each block's station is no longer a target, with 95 % intervals and the margin."""
    found = [block for block in record.blocks if block.lost_nats is not None]
    if not found:
        return ""

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        axes.axhline(0, color=COLOURS["muted"], linewidth=1)
        axes.axhline(record.margin_nats, color=COLOURS["ink"], linewidth=1.1, linestyle=(0, (5, 3)))
        axes.annotate(
            "margin",
            (1, record.margin_nats),
            (-2, 5),
            axes.get_yaxis_transform(),
            textcoords="offset points",
            ha="right",
            fontsize=11,
        )
        for verdict in STATION_MARKS:
            _station_dots(axes, [block for block in found if block.verdict == verdict], verdict)
        axes.set_xlim(record.blocks[0].index - 0.7, record.blocks[-1].index + 0.7)
        if len(record.blocks) <= 40:
            axes.set_xticks([block.index for block in record.blocks])
        axes.margins(y=0.14)
        axes.set_xlabel("block whose station is left out")
        axes.set_ylabel("lost, nats per token")

    width = max(560, min(WIDTH, 160 + 28 * len(record.blocks)))
    return draw("stations", "Loss when a block's station is no longer a target", (width, 280), paint)


def unexplained(record: PeelRecord) -> str:
    """Draw which station each reference aims at, stronger where it misses more of its variance."""
    shown = record.maps[:MOST_ROWS]
    if not shown:
        return ""
    blocks = len(shown[0].stations)
    most = max((value for one in shown for value in one.unexplained), default=0.0) or 1.0

    def paint(figure: Figure) -> None:
        from matplotlib.patches import Rectangle

        axes = figure.subplots()
        for row, one in enumerate(shown):
            for column, (station, value) in enumerate(zip(one.stations, one.unexplained, strict=True)):
                strength = 0.75 * min(max(value, 0.0) / most, 1.0)
                axes.add_patch(
                    Rectangle((column - 0.47, row - 0.46), 0.94, 0.92, color=COLOURS["accent"], alpha=strength, lw=0)
                )
                if blocks <= 32:
                    axes.text(column, row, str(station), ha="center", va="center", fontsize=10)
        axes.set_xlim(-0.6, blocks - 0.4)
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.set_yticks(range(len(shown)), [safe_label(one.name, 24) for one in shown], color=COLOURS["ink"])
        if blocks <= 40:
            axes.set_xticks(range(blocks))
        axes.grid(visible=False)
        for side in ("left", "bottom"):
            axes.spines[side].set_visible(False)
        axes.set_xlabel("block")
        scale = f"strongest colour: {100 * most:.0f} % unexplained"
        axes.set_title(scale, loc="right", fontsize=11, fontweight="normal", color=COLOURS["muted"])

    width = max(560, min(WIDTH, 240 + 30 * blocks))
    return draw("unexplained", "What each reference aims at and misses", (width, 90 + 24 * len(shown)), paint)


def _map_row(axes: Axes, record: PeelRecord, one: MapRecord, place: int) -> None:
    value = shown_loss(one).report
    gain, start = (one.gain_over_head, record.loss.head_control), record.loss.current
    interval = gain[0] if gain[0] is not None and gain[1] is not None else one.gain_over_model
    base = gain[1] if gain[0] is not None and gain[1] is not None else start
    colour = "accent" if interval.low > 0 else "muted"
    axes.hlines(place, base - interval.high, base - interval.low, color=COLOURS[colour], linewidth=2.4, alpha=0.6)
    mark: dict[str, Any] = {"markersize": 8, "color": COLOURS[colour], "markeredgewidth": 1.5}
    axes.plot([value], [place], "o", markerfacecolor=COLOURS[colour if one.loss else "page"], **mark)
    end = max(base - interval.low, value)
    # On a patch of the page's own colour, so that the lines of model and head control do not run through it.
    patch: dict[str, Any] = {"facecolor": COLOURS["page"], "edgecolor": "none", "pad": 1.5}
    where: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 11}
    axes.annotate(nats(value), (end, place), (8, 0), bbox=patch, **where)


def _reference_labels(axes: Axes, current: float, control: float | None) -> None:
    """Write above the two lines what they are, on the sides away from each other."""
    right = control is None or current >= control
    pairs = [(current, f"model {nats(current)}", right)]
    if control is not None:
        pairs.append((control, f"with a new head {nats(control)}", not right))
    for value, text, to_right in pairs:
        offset, align = ((5, 0), "left") if to_right else ((-5, 0), "right")
        axes.annotate(
            text,
            (value, -0.85),
            offset,
            textcoords="offset points",
            ha=align,
            va="center",
            fontsize=11,
            fontweight="bold",
        )


def _station_dots(axes: Axes, found: list[StationRecord], verdict: str) -> None:
    intervals = [(block.index, block.lost_nats) for block in found if block.lost_nats is not None]
    if not intervals:
        return
    marker, colour = STATION_MARKS[verdict]
    places = [place for place, _ in intervals]
    low, high = [v.low for _, v in intervals], [v.high for _, v in intervals]
    axes.vlines(places, low, high, color=COLOURS[colour], linewidth=2, alpha=0.65)
    axes.plot(places, [v.mean for _, v in intervals], marker, color=COLOURS[colour], markersize=8, linestyle="none")


def _label(one: MapRecord) -> str:
    short = stations(one.stations).replace("×", "x") if len(one.stations) <= 12 else one.name
    return safe_label(short, 34)
