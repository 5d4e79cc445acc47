"""weightwatcher, run as its documentation says: ``WeightWatcher(model=model).analyze()``, nothing tuned.

It fits a power law to the tail of every matrix' spectrum; a large exponent alpha is said to mean little trained (above
6 it warns "under-trained", below 2 "over-trained"). Needs weights only. It lives beside peelwise:

    pip install -r benchmarks/truth/requirements.txt -c constraints.txt
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from torch import nn

from peelwise.model.architectures import find_blocks

WARNINGS = ("under-trained", "over-trained")
INSTALL = "pip install -r benchmarks/truth/requirements.txt -c constraints.txt"


@dataclass(frozen=True)
class Spectra:
    """What weightwatcher says of the matrices of every block.

    Attributes:
        alphas: per block, the exponents of its matrices; those without a fit are left out.
        warnings: kind of warning -> matrices of each block that have it.
        failed: matrices without a fit.
    """

    alphas: list[list[float]]
    warnings: dict[str, list[int]]
    failed: int

    def mean_alphas(self) -> list[float]:
        """Return the mean exponent of each block; one without any fit gets the mean of the others, to say nothing."""
        known = [float(np.mean(block)) for block in self.alphas if block]
        return [float(np.mean(block)) if block else float(np.mean(known)) for block in self.alphas]

    def warned(self) -> list[float]:
        """Return how many matrices of each block are warned of, of whatever kind."""
        return [float(sum(counts)) for counts in zip(*self.warnings.values(), strict=True)]

    def extra(self) -> dict[str, Any]:
        """Return the counts that stand behind the scores."""
        matrices = sum(map(len, self.alphas))
        return {"warned": int(sum(self.warned())), "matrices": matrices, "failed": self.failed, **self.warnings}


@functools.cache
def installed() -> ModuleType | None:
    """Return weightwatcher, or ``None`` and say once how to get it."""
    try:
        with _imported_quietly():
            import weightwatcher
    except ImportError as error:
        print(f"rivals: weightwatcher is left out ({error}). Install it: {INSTALL}", file=sys.stderr)
        return None
    found: ModuleType = weightwatcher
    return found


def spectra_of(model: nn.Module) -> Spectra | None:
    """Return weightwatcher's alphas and warnings by block, or ``None`` where it is not installed."""
    watcher = installed()
    if watcher is None:
        return None
    with warnings.catch_warnings(action="ignore"):  # of pandas, one per matrix
        details = watcher.WeightWatcher(model=model).analyze()
    rows = details[["longname", "alpha", "warning", "status"]].itertuples(index=False)
    names = [f"{block.name}." for block in find_blocks(model)]
    alphas: list[list[float]] = [[] for _ in names]
    warned = {kind: [0] * len(names) for kind in WARNINGS}
    failed = 0
    for name, alpha, warning, status in rows:
        index = next((i for i, prefix in enumerate(names) if name.startswith(prefix)), None)
        if index is None:  # embedding and head
            continue
        if status != "success" or not np.isfinite(alpha):
            failed += 1  # its exponent is then -1, which it would call over-trained
            continue
        alphas[index].append(float(alpha))
        if warning in warned:
            warned[warning][index] += 1
    return Spectra(alphas, warned, failed) if any(alphas) else None


@contextlib.contextmanager
def _imported_quietly() -> Iterator[None]:
    """Keep the import from printing, and from setting up the root logger of the whole process."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
