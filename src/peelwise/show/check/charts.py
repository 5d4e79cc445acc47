"""Small charts of signals over depth, drawn as SVG by hand: a hundred of them are a page of a few hundred kilobytes.

Their colours are classes of the style sheet, so that they are right on a light page, on a dark one and on paper.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from peelwise.records.check import CheckRecord
from peelwise.records.signals import SIGNALS, title_of
from peelwise.show.check.words import ATTENTION, MLP, part_words
from peelwise.show.html.markup import esc
from peelwise.show.words import significant

WIDTH, HEIGHT = 288, 132
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 12, 8, 18
_ATTENTION_WORDS = ("attn", "attention")
_DASHES = ("", "6 2.5", "1.5 2.5", "9 2.5 1.5 2.5")
_SMALLEST = 1e-30
_DENSE = 48  # blocks above which lines are thinner
Row = tuple[float | None, ...]  # one value per block


@dataclass(frozen=True, slots=True)
class Style:
    """How the line of a part is drawn: classes that give its colour and width, and its dashes."""

    group: str
    dash: str
    whole: bool  # of a block or a branch, not of a layer in it

    @property
    def classes(self) -> str:
        """The classes of the style sheet."""
        return f"{self.group} whole" if self.whole else self.group


def rows_of(record: CheckRecord) -> dict[str, dict[str, Row]]:
    """Return the values over depth by signal and part."""
    keys = dict.fromkeys(key for block in record.blocks for key in block.signals)
    found: dict[str, dict[str, Row]] = {}
    for key in keys:
        signal, _, part = key.partition(".")
        found.setdefault(signal, {})[part] = tuple(block.signals.get(key) for block in record.blocks)
    return found


def styles_of(record: CheckRecord) -> dict[str, Style]:
    """Return how each part is drawn: a colour per group, dashes that tell its parts apart."""
    linears = dict.fromkeys(matrix.part for matrix in record.matrices)
    parts = dict.fromkeys([ATTENTION, MLP, *linears, *(p for rows in rows_of(record).values() for p in rows)])
    seen: dict[str, int] = {}
    styles = {}
    for part in parts:
        group = _group(part, linears)
        whole = part in ("", ATTENTION, MLP)
        place = 0 if whole else seen.get(group, 0)
        seen[group] = seen.get(group, 0) + (not whole)
        styles[part] = Style(group, _DASHES[place % len(_DASHES)], whole)
    return styles


def chart(signal: str, rows: Mapping[str, Row], styles: Mapping[str, Style], marked: Collection[int]) -> str:
    """Return one signal over depth: a line for each part, a band at each marked block; "" if there is nothing to draw.

    Logarithmic where the signal is a quotient, else linear near the median and logarithmic far away, so that one block
    far out leaves the others legible.

    Args:
        signal: its name.
        rows: one value per block, by part.
        styles: of the parts.
        marked: blocks that are named.
    """
    values = known(rows)
    if not values:
        return ""
    scale = _Scale.of(values, log=signal in SIGNALS and SIGNALS[signal].quotient)
    blocks = max(map(len, rows.values()))
    x = [_LEFT + (WIDTH - _LEFT - _RIGHT) * (i + 0.5) / blocks for i in range(blocks)]
    lines = "".join(
        _line(part, [None if v is None else scale.y(v) for v in row], x, styles[part]) for part, row in rows.items()
    )
    label = f"{title_of(signal)} of each block, {significant(min(values))} to {significant(max(values))}"
    return (
        f'<svg class="signal{" dense" if blocks > _DENSE else ""}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{esc(label)}">'
        f"{_bands(marked, x, blocks)}{scale.ticks()}{lines}{_numbers(marked, x, blocks)}</svg>"
    )


def known(rows: Mapping[str, Row]) -> list[float]:
    """Return all values of a signal."""
    return [value for row in rows.values() for value in row if value is not None]


def legend(parts: Iterable[str], styles: Mapping[str, Style]) -> str:
    """Return the parts with the lines they are drawn with."""
    entries = "".join(
        f'<li><svg class="signal key" viewBox="0 0 30 10" aria-hidden="true">{_stroke("M1 5H29", styles[part])}</svg>'
        f"{esc(part_words(part) or 'the block as a whole')}</li>"
        for part in styles
        if part in set(parts)
    )
    return f'<ul class="keys">{entries}</ul>'


@dataclass(frozen=True, slots=True)
class _Scale:
    """From values to heights; ``spread`` is ``None`` for a logarithmic scale."""

    low: float
    high: float
    middle: float
    spread: float | None

    @classmethod
    def of(cls, values: Sequence[float], *, log: bool) -> _Scale:
        middle = median(values)
        if log and min(values) > 0:
            return cls(min(values), max(values), middle, None)
        spread = 3 * 1.4826 * median(abs(value - middle) for value in values)
        spread = spread or max(abs(value - middle) for value in values) or 1.0
        return cls(min(values), max(values), middle, spread)

    def _place(self, value: float) -> float:
        if self.spread is None:
            return math.log(max(value, _SMALLEST))
        return math.asinh((value - self.middle) / self.spread)

    def y(self, value: float) -> float:
        """Return the height of a value, counted from the top."""
        low, high = self._place(self.low), self._place(self.high)
        share = (self._place(value) - low) / (high - low) if high > low else 0.5
        return HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM)

    def ticks(self) -> str:
        """Return lines with their values: the extremes and, where it stands apart from them, the median."""
        ends = [self.low] if self.low == self.high else [self.low, self.high]
        apart = all(abs(self.y(self.middle) - self.y(end)) > 13 for end in ends)
        shown = [*ends, *([self.middle] if apart else [])]
        return "".join(
            f'<path class="grid" d="M{_LEFT} {self.y(v):.1f}H{WIDTH - _RIGHT}"/>'
            f'<text x="{_LEFT - 5}" y="{self.y(v) + 3.5:.1f}" text-anchor="end">{esc(label)}</text>'
            for v, label in zip(shown, _labels(shown), strict=True)
        )


def _line(part: str, heights: Sequence[float | None], x: Sequence[float], style: Style) -> str:
    """Return the line of a part, with gaps where there is no value; a value by itself is a dash."""
    runs: list[list[tuple[float, float]]] = [[]]
    for place, height in zip(x, heights, strict=True):
        if height is None:
            runs.append([])
        else:
            runs[-1].append((place, height))
    path = "".join(map(_run, filter(None, runs)))
    if not path:
        return ""
    name = f"<title>{esc(part_words(part) or 'the block as a whole')}</title>"
    return f"<g>{name}{_stroke(path, style)}</g>"


def _run(points: Sequence[tuple[float, float]]) -> str:
    """Return a line through neighbouring values; of one value by itself a short dash."""
    if len(points) == 1:
        return f"M{points[0][0] - 2:.1f} {points[0][1]:.1f}h4"
    return "M" + "L".join(f"{place:.1f} {height:.1f}" for place, height in points)


def _stroke(path: str, style: Style) -> str:
    dashes = f' stroke-dasharray="{style.dash}"' if style.dash else ""
    return f'<path class="{style.classes}" d="{path}"{dashes}/>'


def _bands(marked: Collection[int], x: Sequence[float], blocks: int) -> str:
    width = max(4.0, (WIDTH - _LEFT - _RIGHT) / blocks)
    return "".join(
        f'<rect class="band" x="{x[block] - width / 2:.1f}" y="{_TOP - 4}" width="{width:.1f}" '
        f'height="{HEIGHT - _BOTTOM - _TOP + 8}"/>'
        for block in sorted(marked)
        if block < blocks
    )


def _numbers(marked: Collection[int], x: Sequence[float], blocks: int) -> str:
    """Return the numbers of marked blocks below, and of the first and last where there is room beside them."""
    shown: list[int] = []
    for block in [*marked, 0, blocks - 1]:
        if block < blocks and all(abs(x[block] - x[other]) > 20 for other in shown):
            shown.append(block)
    return "".join(
        f'<text class="{"named" if block in marked else ""}" x="{x[block]:.1f}" y="{HEIGHT - 4}" '
        f'text-anchor="middle">{block}</text>'
        for block in shown
    )


def _group(part: str, linears: Collection[str]) -> str:
    if not part:
        return "block"
    branch = part.partition(".")[0]
    if branch in (ATTENTION, MLP) and part not in linears:
        return branch
    if part not in linears:
        return "norm"
    return ATTENTION if any(word in part.lower() for word in _ATTENTION_WORDS) else MLP


def _labels(values: Sequence[float]) -> list[str]:
    """Return the values in the room beside a chart, with as many digits as it takes to tell them apart."""
    for digits in range(3, 6):
        texts = [_short(value, digits) for value in values]
        if len(set(texts)) == len(texts):
            break
    return texts


def _short(value: float, digits: int) -> str:
    text = f"{value:.{digits}g}"
    return (text if len(text) <= 7 else f"{value:.1e}").replace("e-0", "e-").replace("e+0", "e")
