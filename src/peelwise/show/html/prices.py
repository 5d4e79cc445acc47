"""One picture of what each linear layer costs: a grid of blocks and layers, for a page or a file of its own.

It is an SVG without scripts or references, which brings its colours along, so that it can stand in a release note too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from peelwise.show.html.markup import esc

_CELL, _ROW, _LEFT, _RIGHT, _LEGEND = 26, 24, 150, 16, 46
_MOST_WIDE = 64  # blocks in a row of full cells; more make them narrower
_LEAST_WIDE = 620  # that letters can still be read in; a narrower page scrolls
_FAINT = 0.06  # shade of the smallest price
_MOST_DECADES = 3  # that shades tell apart
_DARK = 0.6  # from this shade on a number is in the colour of the page
_MOST_LETTERS = 20  # of a layer's name, which must fit beside the cells
_LETTER, _LARGE = 6.8, 10.5  # about the width of a letter of text and of the heading
_STYLE = (
    "<style>.p{font:12px system-ui,sans-serif;fill:#171a21}.p.m{fill:#596172}.p.w{fill:#fff}.c{fill:#b3261e}"
    ".o{fill:none;stroke:#dde1e8}.p.t{font-size:17px;font-weight:650}"
    "@media (prefers-color-scheme:dark){.p{fill:#eceff4}.p.m{fill:#a3adbb}.p.w{fill:#12151b}.c{fill:#ff8a80}"
    ".o{stroke:#323a46}}</style>"
)


@dataclass(frozen=True)
class Price:
    """What one layer costs.

    Attributes:
        block: its block.
        layer: its name within the block.
        value: the price; 0 and below is drawn as nothing.
        mark: a short text in the cell, such as its bits.
        said: the same in words, for those who hear the picture.
    """

    block: int
    layer: str
    value: float
    mark: str = ""
    said: str = ""


def picture(prices: Iterable[Price], title: str, lines: tuple[str, ...], unit: str) -> str:
    """Return a grid of prices as one SVG: blocks from left to right, layers from top to bottom, darker is dearer.

    Shades are logarithmic over as many decades below the largest price as the prices have, three at most.

    Args:
        prices: one per layer.
        title: the heading.
        lines: sentences below it.
        unit: of the prices.
    """
    prices = list(prices)
    blocks = sorted({price.block for price in prices})
    layers = list(dict.fromkeys(price.layer for price in prices))
    cell = _CELL if len(blocks) <= _MOST_WIDE else max(6, _CELL * _MOST_WIDE // len(blocks))
    top = 42 + 18 * len(lines)
    words = max([_LARGE * len(title), *(_LETTER * len(line) for line in lines)])
    width = max(_LEFT + cell * len(blocks) + _RIGHT, _LEFT + 96 * (_MOST_DECADES + 1), round(words) + 16)
    height = top + 18 + _ROW * len(layers) + _LEGEND
    scale = Shades.of(price.value for price in prices)
    at = {block: _LEFT + cell * i for i, block in enumerate(blocks)}
    row = {layer: top + 18 + _ROW * i for i, layer in enumerate(layers)}
    body = [
        f'<text class="p t" x="8" y="24">{esc(title)}</text>',
        *(f'<text class="p m" x="8" y="{46 + 18 * i}">{esc(line)}</text>' for i, line in enumerate(lines)),
        *(_number(block, at[block], top + 12, cell) for block in blocks if _is_numbered(block, len(blocks))),
        *(f'<text class="p" x="8" y="{row[layer] + 16}">{esc(_short(layer))}</text>' for layer in layers),
        *(_square(price, at[price.block], row[price.layer], cell, scale) for price in prices),
        _legend(height - _LEGEND + 18, scale, unit),
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'style="width:{width}px;max-width:100%;min-width:{min(width, _LEAST_WIDE)}px;height:auto" role="img" '
        f'aria-label="{esc(title)}">{_STYLE}{"".join(body)}</svg>'
    )


def within(name: str, block: int) -> str:
    """Return the name of a layer within its block."""
    return name.partition(f".{block}.")[2] or name


@dataclass(frozen=True)
class Shades:
    """How dark prices are drawn.

    Attributes:
        largest: the price of the darkest; 0 if nothing costs anything.
        decades: below it that shades tell apart.
    """

    largest: float
    decades: int = _MOST_DECADES

    @classmethod
    def of(cls, prices: Iterable[float]) -> Shades:
        """Return the shades of some prices: those of a narrow range are told apart within it."""
        above = [price for price in prices if price > 0]
        if not above:
            return cls(0.0)
        return cls(max(above), min(max(math.ceil(math.log10(max(above) / min(above))), 1), _MOST_DECADES))

    def __call__(self, price: float) -> float:
        """Return how dark a price is drawn, from 0 (nothing) to 1 (the largest)."""
        if price <= 0 or self.largest <= 0:
            return 0.0
        return max(1 + math.log10(price / self.largest) / self.decades, _FAINT)


def _square(price: Price, x: int, y: int, cell: int, shades: Shades) -> str:
    inner = cell - 2
    said = esc(f"block {price.block}, {price.layer}: {price.said or f'{price.value:.3g}'}")
    opacity = shades(price.value)
    text = ""
    if price.mark and cell >= _CELL:
        kind = "p w" if opacity > _DARK else "p"
        text = f'<text class="{kind}" x="{x + cell // 2}" y="{y + 15}" text-anchor="middle">{esc(price.mark)}</text>'
    return (
        f'<g><title>{said}</title><rect class="o" x="{x + 1}" y="{y + 1}" width="{inner}" height="{_ROW - 2}" rx="3"/>'
        f'<rect class="c" x="{x + 1}" y="{y + 1}" width="{inner}" height="{_ROW - 2}" rx="3" '
        f'fill-opacity="{opacity:.3f}"/>{text}</g>'
    )


def _number(block: int, x: int, y: int, cell: int) -> str:
    return f'<text class="p m" x="{x + cell // 2}" y="{y}" text-anchor="middle">{block}</text>'


def _is_numbered(block: int, blocks: int) -> bool:
    return blocks <= _MOST_WIDE // 2 or block % (5 if blocks <= _MOST_WIDE else 20) == 0


def _legend(y: int, shades: Shades, unit: str) -> str:
    """Return squares from the largest price down, with the price that each stands for."""
    if shades.largest <= 0:
        return f'<text class="p m" x="8" y="{y + 14}">No layer costs anything here.</text>'
    parts = []
    for i in range(_MOST_DECADES + 1):
        value, x = shades.largest * 10 ** -((_MOST_DECADES - i) * shades.decades / _MOST_DECADES), _LEFT + 96 * i
        box = f'x="{x}" y="{y}" width="24" height="18" rx="3"'
        parts.append(
            f'<rect class="o" {box}/><rect class="c" {box} fill-opacity="{shades(value):.3f}"/>'
            f'<text class="p m" x="{x + 30}" y="{y + 14}">{value:.2g}</text>'
        )
    return f'<text class="p m" x="8" y="{y + 14}">{esc(unit)}</text>{"".join(parts)}'


def _short(layer: str) -> str:
    return layer if len(layer) <= _MOST_LETTERS else f"…{layer[1 - _MOST_LETTERS :]}"
