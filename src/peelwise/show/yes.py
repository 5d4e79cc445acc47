"""The words of YES bounds: the lines of a terminal, of which a notebook makes a fragment."""

from __future__ import annotations

from peelwise.records.base import Interval
from peelwise.records.yes import YesRecord

UNITS = {"squared": "squared error per sample", "cross_entropy": "nats per sample"}


def text(bounds: YesRecord) -> str:
    """Return the bounds as lines: what was bounded, a table of the bounds, and the controls."""
    return "\n".join([*head(bounds), *_aligned(rows(bounds)), *foot(bounds)])


def head(bounds: YesRecord) -> list[str]:
    """Return what was bounded, and what the network itself reaches."""
    where = "report" if bounds.report else "the samples fitted to"
    part = bounds.report or bounds.fit
    beam = f", beam of {bounds.beam_width}" if bounds.beam_width else ""
    return [
        f"YES bounds ({bounds.mode}), {UNITS[bounds.objective]}, {part.samples} samples of {where}",
        f"network {bounds.loss:.6g}: {bounds.cloud}; {bounds.maps_visited} of {bounds.maps_total} maps{beam}",
    ]


def rows(bounds: YesRecord) -> list[list[str]]:
    """Return a table's headers and, per bound, its cells."""
    found = [["", "bound", *(["on fit", "bound - network (95 %)"] if bounds.report else []), "map"]]
    for k, bound in enumerate(bounds.bounds):
        row = [f"YES-{k}", f"{bound:.6g}"]
        if bounds.report:
            row += [f"{bounds.fit.bounds[k]:.6g}", _interval_words(bounds.gap.get(k))]
        flag = "" if bounds.informative.get(k, True) else "  uninformative"
        found.append([*row, str(list(bounds.best_map[k])) + flag])
    return found


def foot(bounds: YesRecord) -> list[str]:
    """Return what the controls reach."""
    c = bounds.controls
    if c is None:
        return ["controls: not run, so nothing is known about what these bounds are worth"]
    return [
        f"controls: untrained {min(c.untrained):.6g}, shuffled {min(c.shuffled):.6g}, "
        f"network with its last layer fitted anew {c.head_control:.6g}"
    ]


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    return ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]


def _interval_words(interval: Interval | None) -> str:
    return "" if interval is None else f"{interval.mean:+.4g} [{interval.low:+.4g}, {interval.high:+.4g}]"
