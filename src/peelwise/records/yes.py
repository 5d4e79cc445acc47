"""What YES bounds are: frozen numbers, which know neither networks nor tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from peelwise.records.base import Interval

StationMap = tuple[int, ...]  # per layer, the station whose values it is fitted to
Cloud = Literal["red", "yellow", "green"]
Mode = Literal["default", "published"]


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
class YesRecord:
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


@dataclass(frozen=True)
class YesRow:
    """One measurement of a training run: the present bounds and, apart from them, their running minimum."""

    step: int
    loss: float
    yes_0: float
    present: dict[int, float]
    running: dict[int, float]
    cloud: Cloud
    best_map: dict[int, StationMap]
    informative: dict[int, bool]
