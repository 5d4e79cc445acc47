"""The page of the documentation about signals, made from their table. No torch."""

from __future__ import annotations

from peelwise.records.signals import OVER_DEPTH, Kind, Signal, of_kinds

_HEAD = """# The signals: every number of a block, what it means and how it is compared

Made from the table in `src/peelwise/records/signals.py` when the documentation is built. Names are those
of the [run history](run-history.md), of trackers (`peelwise/NAME/block_07`) and, where no older key exists, of
certificates; they stay. Titles are for people.

*Compared*: what `to_median` and `to_trend` hold in the run history, a quotient (2 means twice as much) or a difference;
of codes, steps and the edges of the cloud both are null. *Event*: a lasting change against all other blocks is told,
see [monitor](monitor.md). *Trackers*: it goes to live loggers too.

*Over depth*: what [`peelwise check`](check.md) compares with the blocks around, a query matrix with query matrices, as
a quotient or a difference. A part is a linear layer, a norm, attention or the MLP, and the key is `NAME.PART`. They
stand in the record of a check, and in the run history where a monitor is asked for them with `signals=`; there a block
has one value of all its parts: the mean of quotients, of differences the one farthest from 0, and of a signal for which
one side alone is unlike the others the one farthest to it.
"""
_KINDS: dict[Kind, str] = {
    "refinement": "Measured by refining blocks, on the report part, with 95 % intervals",
    "backward": "From the gradients of one sweep, free",
    "forward": "From the inputs of a block's layers, free",
    "weights": "From the weights, free",
    "codes": "From the codes of low-bit layers in training, free",
    "drift": "From the weights of a run and those of its earlier measurements, free; by monitors only",
    "model": "Of the whole model (block -1)",
    "score": "Over depth: all signals below in one number; by monitors that are asked for all of them",
    "matrix": "Over depth: of each linear layer's weights",
    "neurons": "Over depth: of the MLP's neurons, from the weights",
    "gain": "Over depth: of each norm's gains",
    "kin": "Over depth: of a weight beside the same weight of other blocks",
    "stream": "Over depth: of a block's input and output, from a pass forward",
    "update": "Over depth: of what attention and MLP add to the stream, from a pass forward",
    "gate": "Over depth: of each part's output and its gradient, from a pass backward",
    "joint": "Over depth: of the gain slopes of all blocks together, from a pass backward",
}
_TITLES = "| name | title | unit | meaning | compared | event | trackers | monitors |"


def page() -> str:
    """Return the whole page as Markdown."""
    parts = [_HEAD]
    for kind, title in _KINDS.items():
        rows = of_kinds([kind])
        if rows:
            lines = [f"## {title}", "", _TITLES, "|" + "---|" * _TITLES.count(" | ") + "---|", *map(_row, rows)]
            parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _row(signal: Signal) -> str:
    compared = "quotient" if signal.quotient else "difference"
    marks = ("yes" if each else "" for each in (signal.watched, signal.tracked))
    cells = (
        f"`{signal.name}`",
        signal.title,
        signal.unit,
        signal.meaning,
        compared,
        *marks,
        "when asked" if signal.kind in OVER_DEPTH else "yes" if signal.in_history else "",
    )
    return f"| {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |")


def _monitors(signal: Signal) -> str:
    """Return whether monitors record it."""
    if signal.kind in OVER_DEPTH:
        return "when asked"
    return "yes" if signal.in_history else ""
