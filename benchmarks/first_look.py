"""Which block does a monitor's first look at SmolLM2-135M name, and what part of a measurement does it cost?

    python benchmarks/first_look.py [--blocks 19 6]

The gain slopes of `tasks.monitor.glance` on eight sequences of 128 tokens of reference prose, for the packaged model
and with one block damaged in each way that the check's rule was not made on (`truth.kinds.HELD_BACK`). A case counts if
the damage costs more than the margin on these tokens. The measurement beside it is an ``alone`` on as few tokens.
One thread, processor time. Resumable: the result file holds every finished case.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch

from check_truth import at_fault
from common import RESULTS, environment
from peelwise.api.inputs import open_both
from peelwise.evidence.unlike import OWN
from peelwise.evidence.verdict import default_margin
from peelwise.model.architectures import find_blocks
from peelwise.probe.options import ProbeOptions
from peelwise.tasks.monitor.chronicle import Chronicle
from peelwise.tasks.monitor.glance import glance
from peelwise.tasks.monitor.measure import measure
from peelwise.tasks.monitor.sizes import part_of
from truth.kinds import HELD_BACK, damaged

RESULT = RESULTS / "first_look.json"
TOKENS, LENGTH, FEW, MICRO_BATCH = 12_000, 128, 1024, 2048
SEEDS = (0, 1, 2)  # probes of the healthy model


def looked(model: Any, blocks: Any, probe: Any) -> dict[str, Any]:
    """Return what a look says, by a monitor's own rule, and what it took."""
    began = time.process_time()
    found = glance(model, blocks, probe, micro_batch_tokens=MICRO_BATCH)
    seconds = time.process_time() - began
    chronicle = Chronicle(len(blocks), margin=None, in_distribution=True)
    told = chronicle.add(0, found, seconds=seconds, share=0.0).events
    return {
        "loss": found.loss,
        "seconds": seconds,
        "scales": [round(found.scales[block.index], 2) for block in blocks],
        "evidence": [None if value is None else round(value, 2) for value in found.free[OWN]],
        "named": [event.block for event in told if event.kind == "unlike-scales"],
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return how often the block at fault has the highest score, or is named, among cases that cost something."""
    healthy = [row for row in rows if row["kind"] == "healthy"]
    base = next(row["loss"] for row in healthy if row["seed"] == 0)
    cases = [row for row in rows if row["block"] >= 0 and row["loss"] - base > default_margin(base)]
    first = within = named = alone = 0
    for row in cases:
        faulty = at_fault(row["kind"], row["block"], len(row["scales"]))
        top = max(range(len(row["scales"])), key=row["scales"].__getitem__)
        first += top in faulty
        within += min(abs(top - block) for block in faulty) <= 1
        named += bool(faulty & set(row["named"]))
        alone += bool(row["named"]) and not faulty & set(row["named"])
    return {
        "cases": len(cases),
        "first": first,
        "within one block": within,
        "named": named,
        "others named alone": alone,
        "named in healthy models": [row["named"] for row in healthy],
        "seconds of a look": sorted(row["seconds"] for row in rows if "seconds" in row)[len(rows) // 2],
    }


def main() -> None:
    """Measure what is not done yet, and print the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="*", default=[19, 6])
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {"rows": []}
    rows, done = result["rows"], {(row["kind"], row["block"], row["seed"]) for row in result["rows"]}
    wanted = [("healthy", -1, seed) for seed in SEEDS] + [(k, block, 0) for block in options.blocks for k in HELD_BACK]
    opened: dict[int, Any] = {}

    def parts(seed: int) -> Any:
        if seed not in opened:
            target, probe = open_both("smollm2", ProbeOptions(tokens=TOKENS, sequence_length=LENGTH, seed=seed))
            opened[seed] = target.model, find_blocks(target.model), part_of(probe, FEW)
        return opened[seed]

    def save() -> None:
        RESULT.write_text(json.dumps({**environment(), **result, "summary": summary(rows)}, indent=1) + "\n")

    for kind, block, seed in (case for case in wanted if case not in done):
        model, blocks, probe = parts(seed)
        if block < 0:
            found = looked(model, blocks, probe)
        else:
            with damaged(model, blocks, kind, block):
                found = looked(model, blocks, probe)
        rows.append({"kind": kind, "block": block, "seed": seed, **found})
        save()
        print(f"{len(rows)} of {len(wanted)}: {kind} at {block}: {found['named']} {found['seconds']:.1f} s", flush=True)
    if "seconds_of_alone" not in result:
        model, blocks, probe = parts(0)
        began = time.process_time()
        refined = measure(model, blocks, probe, "alone", range(len(blocks)), micro_batch_tokens=MICRO_BATCH)
        result |= {"seconds_of_alone": time.process_time() - began, "refined": len(refined.alone)}
        save()
    print(json.dumps(json.loads(RESULT.read_text())["summary"], indent=1), result["seconds_of_alone"])


if __name__ == "__main__":
    main()
