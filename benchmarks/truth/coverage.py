"""How often do the 95 % intervals of an audit hold on fresh text? Many probes, each with its own report part.

    python benchmarks/truth/coverage.py

The witness of each audit is measured again on fresh training text, whose mean has a small error of its own.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import figures
import own
from cases import KEPT_SEED, SMALL, Case, probe_of
from common import write

CASES = (
    Case(SMALL, "healthy", "healthy", KEPT_SEED, 600),
    Case(SMALL, "healthy", "healthy", KEPT_SEED, 2400),
    Case(SMALL, "after training", "stale", KEPT_SEED, 2400, 3),
)
TOKENS, FRESH_TOKENS, PROBES = 4_800, 24_576, 20


def intervals(case: Case, seed: int) -> list[dict[str, Any]]:
    """Return the intervals of one audit and the same gains on fresh text."""
    model, probe = case.model(), probe_of(SMALL, TOKENS, seed=seed)
    outcome = own.audited(model, probe, joint_rounds=1, solo_rounds=1)
    fresh = own.without(probe_of(SMALL, 2 * FRESH_TOKENS, seed=1000).fit, probe)
    return own.on_fresh_text(model, outcome, fresh)


def main() -> None:
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for seed in range(1, PROBES + 1):
        for case in CASES:
            rows += [{"case": case.name, "probe_seed": seed, **row} for row in intervals(case, seed)]
        by_case = {case.name: figures.coverage([r for r in rows if r["case"] == case.name]) for case in CASES}
        found = {"coverage": figures.coverage(rows), "by_case": by_case, "red": figures.red_checked(rows)}
        # After each probe, so that nothing is lost.
        write("truth/coverage", {"tokens": TOKENS, "fresh_tokens": FRESH_TOKENS, "probes": seed, **found})


if __name__ == "__main__":
    main()
