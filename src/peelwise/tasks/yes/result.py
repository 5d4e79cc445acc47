"""What a YES bound says: frozen numbers and their words. Knows neither networks nor tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from peelwise.records.base import Interval
from peelwise.references.maps import StationMap

Cloud = Literal["red", "yellow", "green"]
Mode = Literal["default", "published"]
UNITS = {"squared": "squared error per sample", "cross_entropy": "nats per sample"}


def cloud_of(loss: float, yes_0: float, yes_last: float) -> Cloud:
    """Return red if ``loss > YES-0``, green if ``loss <= YES-(L-1)``, yellow between (arXiv:2410.10984)."""
    if loss > yes_0:
        return "red"
    return "green" if loss <= yes_last else "yellow"


@dataclass(frozen=True)
class YesPart:
    """The network's loss and YES-0..YES-(L-1) on one part of the samples."""

    samples: int
    loss: float
    bounds: tuple[float, ...]


@dataclass(frozen=True)
class YesControls:
    """What a bound must beat before it may be believed, measured like the bounds themselves.

    ``untrained``: YES-0..YES-(L-1) from the stations of the same architecture at initialisation.
    ``shuffled``: the same from targets permuted over samples; in default mode judged on true report
    targets, in published mode, which has no held-out part, on the permuted ones.
    ``head_control``: the loss of the network with its last layer fitted anew.
    """

    untrained: tuple[float, ...]
    shuffled: tuple[float, ...]
    head_control: float

    def informative(self, bounds: tuple[float, ...]) -> tuple[bool, ...]:
        """Return for each ``k`` whether the bound beats all untrained bounds and its shuffled one.

        All untrained ones, because YES-0 does not look at the network and could never beat its own.
        """
        floor = min(self.untrained)
        return tuple(b < floor and b < s for b, s in zip(bounds, self.shuffled, strict=True))


@dataclass(frozen=True)
class YesBounds:
    """YES-0 and YES-k of a network at one moment.

    Values are on report in default mode, and on the samples fitted to in published mode. ``fit`` holds the
    same numbers on the fit part. ``gap[k]`` is the paired difference bound minus network on report:
    significantly negative means that explicit weights of the same shape do better than the network.
    """

    mode: Mode
    objective: str
    loss: float
    yes_0: float
    yes_k: dict[int, float]
    cloud: Cloud
    best_map: dict[int, StationMap]
    maps_visited: int
    maps_total: int
    beam_width: int | None
    fit: YesPart
    report: YesPart | None
    gap: dict[int, Interval]
    controls: YesControls | None
    informative: dict[int, bool]

    @property
    def bounds(self) -> tuple[float, ...]:
        """YES-0..YES-(L-1) as one tuple."""
        return (self.yes_0, *self.yes_k.values())

    def __str__(self) -> str:
        return "\n".join([*self._head(), *self._table(), *self._foot()])

    def _repr_html_(self) -> str:
        from peelwise.show.notebook import bounds_html

        title, *facts = self._head()
        headers, *rows = self._rows()
        return bounds_html(title, self.cloud, [*facts, *self._foot()], headers, rows)

    def _head(self) -> list[str]:
        where = "report" if self.report else "the samples fitted to"
        part = self.report or self.fit
        beam = f", beam of {self.beam_width}" if self.beam_width else ""
        return [
            f"YES bounds ({self.mode}), {UNITS[self.objective]}, {part.samples} samples of {where}",
            f"network {self.loss:.6g}: {self.cloud}; {self.maps_visited} of {self.maps_total} maps{beam}",
        ]

    def _rows(self) -> list[list[str]]:
        columns = ["", "bound", *(["on fit", "bound - network (95 %)"] if self.report else []), "map"]
        rows = [columns]
        for k, bound in enumerate(self.bounds):
            row = [f"YES-{k}", f"{bound:.6g}"]
            if self.report:
                row += [f"{self.fit.bounds[k]:.6g}", _interval_words(self.gap.get(k))]
            flag = "" if self.informative.get(k, True) else "  uninformative"
            rows.append([*row, str(list(self.best_map[k])) + flag])
        return rows

    def _table(self) -> list[str]:
        rows = self._rows()
        widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
        return ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]

    def _foot(self) -> list[str]:
        if self.controls is None:
            return ["controls: not run, so nothing is known about what these bounds are worth"]
        c = self.controls
        return [
            f"controls: untrained {min(c.untrained):.6g}, shuffled {min(c.shuffled):.6g}, "
            f"network with its last layer fitted anew {c.head_control:.6g}"
        ]


@dataclass(frozen=True)
class YesRow:
    """One moment of a training run: the present bounds and, apart from them, their running minimum."""

    step: int
    loss: float
    yes_0: float
    present: dict[int, float]
    running: dict[int, float]
    cloud: Cloud
    best_map: dict[int, StationMap]
    informative: dict[int, bool]


def _interval_words(interval: Interval | None) -> str:
    return "" if interval is None else f"{interval.mean:+.4g} [{interval.low:+.4g}, {interval.high:+.4g}]"
