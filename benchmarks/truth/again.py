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
from peelwise.evidence.audit import conclusion
from peelwise.evidence.intervals import Paired
from peelwise.evidence.verdict import RULE, default_margin
from peelwise.records.audit import BlockRecord, LookFirst
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


def pointed_at(row: dict[str, Any], rule: int) -> LookFirst | None:
    """Return the block that the conclusion of an audit points at, by a rule for verdicts."""
    own = row["own"]
    paired = {
        name: [
            Paired(mean, error, own["composed"]["sequences"]).interval()
            for mean, error in zip(own["scores"][name], own["errors"][name], strict=True)
        ]
        for name in ("alone", "unique")
    }
    blocks = [
        BlockRecord(index=i, name="", verdict=verdict, recoverable_nats=alone, unique_nats=unique)
        for i, (verdict, alone, unique) in enumerate(zip(own["verdicts"], *paired.values(), strict=True))
    ]
    return conclusion(blocks, default_margin(own["loss"]), rule=rule).look_first


def conclusions(rows: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Count at which block conclusions point where some block is red or yellow and the fault is real, by rule."""
    counts = {}
    for rule in (RULE - 1, RULE):
        found = [
            (pointed_at(row, rule), row["block"])
            for row in rows
            if row["block"] is not None
            and row["cost_of_fault"]["low"] > default_margin(row["own"]["loss"])
            and {"red", "yellow"} & set(row["own"]["verdicts"])
        ]
        counts[f"rule {rule}"] = {
            "cases": len(found),
            "the block at fault alone": sum(p is not None and p.block == b and not p.tied for p, b in found),
            "with others that are not distinguishable": sum(
                p is not None and bool(p.tied) and b in (p.block, *p.tied) for p, b in found
            ),
            "other blocks": sum(p is not None and b not in (p.block, *p.tied) for p, b in found),
            "nowhere": sum(p is None for p, _ in found),
        }
    return counts


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
            summary = compared(rows, record) | {"conclusions": conclusions(rows)}
            RESULT.write_text(json.dumps(environment() | {"summary": summary, "rows": rows}, indent=1) + "\n")
            print(f"{len(rows)} of {len(wanted)}  {case.name}  {rows[-1]['own']['whole_seconds']:.0f} s", flush=True)
    summary = compared(rows, record) | {"conclusions": conclusions(rows)}
    RESULT.write_text(json.dumps(environment() | {"summary": summary, "rows": rows}, indent=1) + "\n")
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
