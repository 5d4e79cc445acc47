"""Are the diagnoses of the small GPT still what they were? Its cases once more, without rivals, beside those on record.

    python benchmarks/truth/again.py [--training]     # cases of faults that begin during a training too

Cases of the stages in examples/small_gpt come first, since they need no training. Resumable: the result file
(`benchmarks/results/truth/again.json`) holds every finished case; the summary is of the same cases on both sides.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import figures
import own
from cases import KEPT_SEED, SMALL, Case, probe_of, small_cases
from common import RESULTS, environment
from run import SETTINGS

RECORD, RESULT = RESULTS / "truth" / "cases.json", RESULTS / "truth" / "again.json"


def measured(case: Case) -> dict[str, Any]:
    """Return what peelwise says of a case, with what the fault costs."""
    tokens, joint, alone = SETTINGS[case.family]
    model, probe = case.model(), probe_of(case.family, tokens)
    row: dict[str, Any] = {"name": case.name, "cost_of_fault": None, "rivals": {}}
    row |= {key: getattr(case, key) for key in ("family", "group", "kind", "seed", "step", "block")}
    if case.block is not None:
        row["cost_of_fault"] = own.cost_of_fault(model, case.healthy(), probe.report)
    started = time.perf_counter()
    row["own"] = own.diagnosis(own.audited(model, probe, joint_rounds=joint, solo_rounds=alone).record)
    row["own"]["whole_seconds"] = time.perf_counter() - started
    return row


def compared(now: list[dict[str, Any]], record: list[dict[str, Any]]) -> dict[str, Any]:
    """Return figures of the cases measured now, and of the same cases on record."""
    names = {row["name"] for row in now}
    before = [row | {"rivals": {}} for row in record if row["name"] in names]
    return {when: _figures(rows) for when, rows in (("on record", before), ("now", now))}


def _figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    found = figures.summary(rows)["families"][SMALL]
    chosen = ("cases", "healthy", "faults", "localisation", "false_flags", "verdicts")
    return {key: found[key] for key in chosen} | {"seconds": sum(row["own"]["whole_seconds"] for row in rows)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--training", action="store_true", help="also faults that begin during a training")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = json.loads(RESULT.read_text())["rows"] if RESULT.exists() else []
    record = json.loads(RECORD.read_text())
    done = {row["name"] for row in rows}
    wanted = [case for case in small_cases() if options.training or case.group != "during training"]
    for case in sorted(wanted, key=lambda case: case.seed != KEPT_SEED):
        if case.name not in done:
            rows.append(measured(case))
            summary = compared(rows, record)
            RESULT.write_text(json.dumps(environment() | {"summary": summary, "rows": rows}, indent=1) + "\n")
            print(f"{len(rows)} of {len(wanted)}  {case.name}  {rows[-1]['own']['whole_seconds']:.0f} s", flush=True)
    print(json.dumps(compared(rows, record), indent=1))


if __name__ == "__main__":
    main()
