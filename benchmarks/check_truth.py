"""Does `peelwise check` name the block that was damaged? Kinds of damage on SmolLM2-135M, one half of them held back.

    python benchmarks/check_truth.py            # every case that is not done yet, then the table
    python benchmarks/check_truth.py --table    # the table of what is done

Kinds in `truth.kinds.DEVELOPMENT` were looked at while the rule of `evidence/unlike.py` was made, at blocks 4, 15 and
both ends; those of `HELD_BACK` were run once, after it was fixed, at other blocks and both ends. Each case is saved
when it is done, so the run can be stopped and goes on where it was. What a case computes is what `run_check` does,
but that signals of weights are computed again for changed blocks alone.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import RESULTS, environment
from peelwise.api.inputs import open_both
from peelwise.engine.clock import Clock
from peelwise.engine.depth.gains import screened
from peelwise.engine.depth.joint import gates_of
from peelwise.engine.depth.look import both, stream_width
from peelwise.engine.depth.table import BlockWeights, block_weights, joined, pass_table, weight_table
from peelwise.engine.session import Session
from peelwise.evidence.unlike import THRESHOLD, named, to_screen, unlikeness, with_gains
from peelwise.evidence.verdict import default_margin
from peelwise.model.architectures import find_blocks
from peelwise.model.parts import parts_of
from peelwise.model.runner import Runner, Trace
from peelwise.probe.options import ProbeOptions
from peelwise.records.signals import SIGNALS
from peelwise.tasks.check.settings import CHECK_TOKENS
from truth.kinds import DEVELOPMENT, HELD_BACK, damaged

OUT = Path("out/check_truth")
BLOCKS = {"development": (4, 15, 29, 0), "held back": (19, 6, 29, 0)}
# Gradients of weights and what the rule does not count: half of the time, and no part of the score.
SKIPPED = {
    *("weight_gradient_norm", "gradient_rank", "fisher_trace", "gradient_alignment"),
    *("linear_cka", "recoverability", "station_rank"),
}
WANTED = [name for name in SIGNALS if name not in SKIPPED]
RIVALS = {
    "own evidence": lambda u, table: u.own,
    "structure": lambda u, table: np.max(list(u.structure.values()), axis=0),
    "largest t-value": lambda u, table: _largest(table, "gain_t"),
    "gain slope": lambda u, table: _largest(table, "gain_slope"),
    "channel evidence": lambda u, table: _largest(table, "gain_evidence"),
    "block influence": lambda u, table: _largest(table, "block_influence"),
    "size of weights": lambda u, table: u.structure["weight_rms"],
}


class Bench:
    """The model, opened once, and what does not change from case to case."""

    def __init__(self, seed: int) -> None:
        target, self.probe = open_both("smollm2", ProbeOptions(tokens=CHECK_TOKENS, seed=seed))
        self.model = target.model.requires_grad_(False)
        self.blocks = find_blocks(self.model)
        self.parts = [parts_of(block) for block in self.blocks]
        self.runner = Runner(self.model, self.blocks)
        self.traces = [self.runner.trace(part) for part in (self.probe.fit, self.probe.select, self.probe.report)]
        self.weights = [self._weights(index) for index in range(len(self.blocks))]

    def _weights(self, index: int) -> BlockWeights:
        return block_weights(self.parts[index], stream_width(self.parts), WANTED)

    def case(self, changed: set[int]) -> dict[str, Any]:
        """Return what a check says of the model as it is now, with the weights of ``changed`` not as they were."""
        began = time.perf_counter()
        start = min(changed, default=0)
        fit, select, report = (self.runner.refreshed(trace, start) for trace in self.traces)
        passed = pass_table(self.runner, self.parts, both(fit, select), signals=WANTED)
        weights = [self._weights(i) if i in changed else found for i, found in enumerate(self.weights)]
        table = joined(weight_table(weights, WANTED), passed)
        plain = unlikeness(table.values, len(self.blocks), [len(gates_of(parts)) for parts in self.parts])
        assert plain is not None
        session = Session(self.runner, report, self.probe, fit, select, Clock(1e9, self.runner.work), 0)
        gains = screened(session, [self.parts[index] for index in to_screen(plain.scores)], table)
        found = with_gains(plain, gains, default_margin(select.mean))
        return {
            "loss": report.mean,
            "difference": _difference(self.traces[2], report),
            "scores": [round(float(score), 3) for score in found.scores],
            "named": named(found.scores),
            "gains": {str(block): round(gain, 4) for block, gain in gains.items()},
            "rivals": {name: _rounded(rival(plain, table.values)) for name, rival in RIVALS.items()},
            "seconds": round(time.perf_counter() - began, 1),
        }


def _difference(before: Trace, after: Trace) -> float:
    return float((after.losses - before.losses).sum() / after.tokens.sum())


def _largest(values: Any, signal: str) -> np.ndarray:
    rows = [[np.nan if v is None else abs(v) for v in row] for (name, _), row in values.items() if name == signal]
    return np.nanmax(np.array(rows), axis=0)


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(v), 3) for v in values]


def at_fault(kind: str, index: int, count: int) -> set[int]:
    """Return the blocks that a kind of damage changes."""
    if kind.startswith("swapped"):
        return {index, index + 1 if index + 1 < count else index - 1}
    return {index}


def run(seed: int, half: str | None) -> None:
    """Run every case that is not done yet."""
    OUT.mkdir(parents=True, exist_ok=True)
    bench: Bench | None = None
    todo: list[tuple[str, str, int]] = [("healthy", "as packaged", -1)]
    for name, kinds in (("held back", HELD_BACK), ("development", DEVELOPMENT)):
        if half in (None, name):
            todo += [(name, kind, index) for index in BLOCKS[name] for kind in kinds]
    for group, kind, index in todo:
        path = OUT / f"{seed}-{group}-{kind}-{index}.json".replace(" ", "_").replace("/", "-of-")
        if path.exists():
            continue
        bench = bench or Bench(seed)
        changed = set() if index < 0 else at_fault(kind, index, len(bench.blocks))
        with damaged(bench.model, bench.blocks, kind, index) if changed else nullcontext():
            found = bench.case(changed)
        found |= {"group": group, "kind": kind, "block": index, "changed": sorted(changed), "seed": seed}
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(found))
        os.replace(temporary, path)
        print(f"{group:12} {kind:26} {index:3} {found['difference']:+.3f} nats, named {found['named']}", flush=True)


def verdict(case: dict[str, Any], scores: list[float]) -> tuple[bool, bool, float, bool]:
    """Return whether the block at fault is first, within one block, its area under the curve, and if it is named."""
    changed, s = set(case["changed"]), np.array(scores)
    first = int(np.argmax(s))
    worst = max(changed, key=lambda i: s[i])
    others = np.array([s[i] for i in range(len(s)) if i not in changed])
    area = float((s[worst] > others).mean() + 0.5 * (s[worst] == others).mean())
    return first in changed, any(abs(first - i) <= 1 for i in changed), area, bool(changed & set(case["named"]))


def figures(cases: list[dict[str, Any]], rival: str | None = None) -> dict[str, float]:
    """Return the shares of cases in which the block was found."""
    rows = [verdict(case, case["rivals"][rival] if rival else case["scores"]) for case in cases]
    first, within, area, name = (float(np.mean(column)) for column in zip(*rows, strict=True))
    found = {"cases": len(cases), "first": round(first, 3), "within_one": round(within, 3), "area": round(area, 3)}
    return found if rival else found | {"named": round(name, 3)}


def table() -> dict[str, Any]:
    """Return what all cases that cost more than the margin say together."""
    cases = [json.loads(path.read_text()) for path in sorted(OUT.glob("*.json"))]
    healthy = [case for case in cases if case["group"] == "healthy"]
    result: dict[str, Any] = {"threshold": THRESHOLD, "tokens": CHECK_TOKENS}
    for group in ("held back", "development"):
        own = [c for c in cases if c["group"] == group]
        costly = [c for c in own if c["difference"] > default_margin(c["loss"] - c["difference"])]
        if not costly:
            continue
        ends = [c for c in costly if c["block"] in (0, 29)]
        inside = [c for c in costly if c["block"] not in (0, 29)]
        result[group] = {
            "all": figures(costly),
            "inside": figures(inside),
            "ends": figures(ends) if ends else {},
            "block 0": figures(z) if (z := [c for c in ends if c["block"] == 0]) else {},
            "cost too little": len(own) - len(costly),
            "rivals": {rival: figures(costly, rival) for rival in RIVALS},
            "kinds": {k: figures([c for c in costly if c["kind"] == k]) for k in sorted({c["kind"] for c in costly})},
            "cases": [{k: c[k] for k in ("kind", "block", "difference", "named", "seconds")} for c in costly],
        }
    result["healthy"] = [
        {"kind": c["kind"], "seed": c["seed"], "named": c["named"], "highest": max(c["scores"])} for c in healthy
    ]
    return result


def main() -> None:
    """Run what is asked for, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="only make the table of what is done")
    parser.add_argument("--seed", type=int, default=0, help="of the probe (default: 0)")
    parser.add_argument("--half", choices=list(BLOCKS), help="only this half of the kinds")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if not options.table:
        with torch.no_grad():
            run(options.seed, options.half)
    result = environment() | table()
    (RESULTS / "check_truth.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "machine"}, indent=1)[:4000])


if __name__ == "__main__":
    main()
