"""The benchmark of diagnoses: is the block at fault found, how often is a healthy one blamed, and do certificates hold?

    python benchmarks/truth/run.py            # trains what is needed, then every case, then figures and docs/truth.md
    python benchmarks/truth/run.py --help

Every case is kept under out/truth as soon as it is measured: an interrupted run goes on where it stopped, and two
processes may share the work (--part 1/2 and --part 2/2).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import figures
import own
import render
import rivals
import training
from cases import FRESH_TOKENS, LARGE, SMALL, Case, all_cases, probe_of
from common import environment

OUT = training.ROOT / "out" / "truth" / "cases"
# Tokens of the probe and rounds of refinement, together and alone.
SETTINGS = {SMALL: (9_600, 3, 2), LARGE: (5_120, 1, 0)}


SLOW_RIVALS = ("weightwatcher", "weightwatcher warnings", "peel maps")


def measure(case: Case, *, quick: bool = False) -> dict[str, Any]:
    """Return everything that is known of one case: the truth, what peelwise says, and what its rivals say.

    A quick look has no refinement (energies alone) and leaves the slow rivals out.
    """
    tokens, joint, alone = SETTINGS[case.family]
    if quick:
        joint, alone = 0, 0
    model, probe = case.model(), probe_of(case.family, tokens)
    row: dict[str, Any] = {
        "name": case.name,
        "family": case.family,
        "group": case.group,
        "kind": case.kind,
        "seed": case.seed,
        "step": case.step,
        "block": case.block,
        "quick": quick,
        "cost_of_fault": None,
    }
    if case.block is not None:
        healthy = case.healthy()
        row["cost_of_fault"] = own.cost_of_fault(model, healthy, probe.report)
    started = time.perf_counter()
    outcome = own.audited(model, probe, joint_rounds=joint, solo_rounds=alone)
    row["own"] = own.diagnosis(outcome.record) | {"whole_seconds": time.perf_counter() - started}
    if case.family == SMALL:
        fresh = probe_of(case.family, 2 * FRESH_TOKENS, seed=1)
        row["fresh"] = own.on_fresh_text(model, outcome, own.without(fresh.fit, probe))
    given = rivals.Given(model, probe, case.initial())
    row["rivals"] = rivals.measure(given, without=SLOW_RIVALS if quick else ())
    return row


def remembered(case: Case) -> dict[str, Any] | None:
    """Return the case if it has been measured."""
    file = OUT / f"{case.name}.json"
    return json.loads(file.read_text()) if file.exists() else None


def remember(case: Case, row: dict[str, Any]) -> None:
    """Keep a measured case; an interruption while writing leaves nothing."""
    OUT.mkdir(parents=True, exist_ok=True)
    partial = OUT / f"{case.name}.{os.getpid()}.partial"
    partial.write_text(json.dumps(row) + "\n")
    partial.replace(OUT / f"{case.name}.json")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["small", "smollm2"], help="cases of one model family")
    parser.add_argument("--part", default="1/1", help="which part of the cases, such as 1/2")
    parser.add_argument("--quick", action="store_true", help="no refinement, no slow rivals: a fourth of the time")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument(
        "--figures-only", action="store_true", help="no case is measured; figures and page are made again"
    )
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    part, parts = map(int, options.part.split("/"))
    family = {"small": SMALL, "smollm2": LARGE}.get(options.only)
    wanted = [case for case in all_cases() if family in (None, case.family)][part - 1 :: parts]
    if not options.figures_only:
        for number, case in enumerate(wanted, start=1):
            if remembered(case) is None:
                started = time.perf_counter()
                remember(case, measure(case, quick=options.quick))
                print(f"{number} of {len(wanted)}  {case.name}  {time.perf_counter() - started:.0f} s", flush=True)
    rows = [row for case in all_cases() if (row := remembered(case))]
    if parts == 1:
        render.write(figures.summary(rows) | environment(), rows)


if __name__ == "__main__":
    main()
