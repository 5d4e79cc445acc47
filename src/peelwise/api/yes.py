"""YES bounds as they are handed out: the record of the numbers, which shows itself."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec

from peelwise.model.offloaded import measures_offloaded
from peelwise.records.yes import YesRecord
from peelwise.tasks.yes import bounds as _bounds

_P = ParamSpec("_P")


@dataclass(frozen=True)
class YesBounds(YesRecord):
    """A record that prints itself, in a terminal and in a notebook. See `YesRecord` for what it holds."""

    def __str__(self) -> str:
        from peelwise.show.yes import text

        return text(self)

    def _repr_html_(self) -> str:
        from peelwise.show.notebook import bounds_html

        return bounds_html(self)


def _shown(measure: Callable[_P, YesRecord]) -> Callable[_P, YesBounds]:
    """Return the same function with a result that shows itself."""

    @functools.wraps(measure)
    def measured(*args: _P.args, **options: _P.kwargs) -> YesBounds:
        return YesBounds(**vars(measure(*args, **options)))

    return measured


yes_bounds = _shown(measures_offloaded(_bounds.yes_bounds))
