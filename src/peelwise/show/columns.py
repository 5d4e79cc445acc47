"""Numbers and names of a table's columns, written alike so that they can be compared by eye."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable


def percents(shares: Iterable[float | None]) -> Callable[[float | None], str]:
    """Return how to write shares in percent: all with the decimals that show three digits of the largest.

    Args:
        shares: all that stand together; ``None`` is written as nothing.
    """
    largest = max((100 * abs(share) for share in shares if share is not None), default=0.0)
    decimals = 1 if largest <= 0 else min(max(2 - math.floor(math.log10(largest)), 1), 5)
    return lambda share: "" if share is None else f"{round(100 * share, decimals) + 0.0:.{decimals}f}"


def short_formats(names: Iterable[str]) -> tuple[dict[str, str], str | None]:
    """Return formats without the options that all of them share, and these: ``int3:group=64,symmetric`` is ``int3``.

    Formats without options stay as they are; so do all if their options differ, if there is one alone, or if they could
    not be told apart.
    """
    names = list(dict.fromkeys(names))
    options = {name.partition(":")[2] for name in names if ":" in name}
    families = {name.partition(":")[0] for name in names}
    if len(options) != 1 or not 1 < len(names) == len(families):
        return {name: name for name in names}, None
    return {name: name.partition(":")[0] for name in names}, options.pop()
