"""`peelwise compare` on known changes: SmolLM2-135M against copies of it with one block altered.

Every kind of `compare_cases.py` at blocks 0, 6, 19 and 29, on 400 tokens of reference prose (140 of them report). Three
questions: is the changed block the first of those named, is the kind of change right, how long did it take. With
``--converted`` the altered copy is rounded to bfloat16 as a whole, so that every block differs.
``--weights`` asks for the kind alone, from the weights, which takes a second; then "first" says that exactly this block
differs. One file per case, so an interrupted run goes on; ``--summary`` writes the figures of what is there.

Example: python benchmarks/compare_truth.py && python benchmarks/compare_truth.py --summary
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common import RESULTS, environment
from compare_cases import BLOCKS, Known, cases
from peelwise.errors import FewSequencesWarning
from peelwise.model.architectures import find_blocks
from peelwise.model.checkpoints import open_model
from peelwise.probe.probe import Probe
from peelwise.probe.texts import reference_prose
from peelwise.tasks.compare.run import Candidate, run_compare
from peelwise.tasks.compare.settings import CompareSettings
from peelwise.tasks.compare.tensors import block_twins

FOLDER = RESULTS / "compare"
TOKENS, LENGTH = 400, 24
# Every difference of the whole converted copy costs time on both ways; one effect per block says which is first.
SETTINGS = CompareSettings(layers_of=0, path=False)


def compared(model: nn.Module, known: Known, block: int, probe: Probe, converted: bool) -> dict[str, Any]:
    """Return one row."""
    altered = known.alter(model, block)
    if converted:
        altered = altered.to(torch.bfloat16).to(torch.float32)
    began = time.perf_counter()
    record = run_compare(Candidate(model, "SmolLM2"), Candidate(altered, known.name), probe, SETTINGS)
    seconds = time.perf_counter() - began
    changed, found = record.conclusion.changed, record.blocks[block]
    first = record.first_difference
    return {
        "change": known.name,
        "held_back": known.held_back,
        "block": block,
        "converted": converted,
        "first": bool(changed) and changed[0] == block,
        "kind": found.kind_of_change,
        "expected": known.kind,
        "kind_values": found.kind_values,
        "repairs": [round(getattr(found.repairs_nats, key), 5) for key in ("mean", "low", "high")],
        "breaks": round(found.breaks_nats.mean, 5),
        "damage": round(record.loss.damage.mean, 5),
        "first_difference": None if first is None else {"block": first.block, "cause": first.cause},
        "named": len(changed),
        "complete": record.complete,
        "seconds": round(seconds, 1),
    }


def weighed(model: nn.Module, known: Known, block: int, converted: bool) -> dict[str, Any]:
    """Return one row of what the weights alone say."""
    altered = known.alter(model, block)
    if converted:
        altered = altered.to(torch.bfloat16).to(torch.float32)
    began = time.perf_counter()
    twins = block_twins(find_blocks(model), find_blocks(altered))
    kinds = [each.kind for each in twins]
    changed = [index for index, each in enumerate(twins) if not each.same]
    return {
        "change": known.name,
        "held_back": known.held_back,
        "block": block,
        "converted": converted,
        "first": changed == [block] or max(changed, key=lambda i: twins[i].relative, default=-1) == block,
        "kind": kinds[block].code,
        "expected": known.kind,
        "kind_values": kinds[block].values,
        "seconds": round(time.perf_counter() - began, 1),
    }


def weigh(converted: bool, chosen: Iterable[tuple[Known, int]]) -> None:
    """Ask for the kind of every case that changes weights and has no file yet."""
    model = open_model("smollm2", device="cpu", with_tokenizer=False).model
    for known, block in chosen:
        path = _file(known, block, converted, weights=True)
        if path.exists() or known.kind == "config-or-code":
            continue
        row = weighed(model, known, block, converted)
        FOLDER.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(environment() | {"tokens": 0} | row) + "\n")
        print({k: row[k] for k in ("change", "block", "first", "kind", "expected", "seconds")}, flush=True)


def run(converted: bool, chosen: Iterable[tuple[Known, int]]) -> None:
    """Measure every case that has no file yet."""
    opened = open_model("smollm2", device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FewSequencesWarning)
        probe = Probe.from_text(reference_prose(), opened.tokenizer, tokens=TOKENS, sequence_length=LENGTH)
    for known, block in chosen:
        path = _file(known, block, converted)
        if path.exists():
            continue
        row = compared(opened.model, known, block, probe, converted)
        FOLDER.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(environment() | {"tokens": probe.report.tokens} | row) + "\n")
        print({k: row[k] for k in ("change", "block", "first", "kind", "expected", "repairs", "seconds")}, flush=True)


def summary() -> None:
    """Write the figures of all cases that were measured, the two halves of the kinds apart."""
    rows = [json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))]
    parts = {
        f"{half}, {setting}": [r for r in rows if r["held_back"] == held and r["converted"] == converted]
        for half, held in (("development", False), ("held back", True))
        for setting, converted in (("block alone", False), ("copy in bfloat16", True))
    }
    parts = {
        f"{name}, {how}": [r for r in part if (r["tokens"] > 0) == measured]
        for name, part in parts.items()
        for how, measured in (("by the weights", False), ("whole comparison", True))
    }
    result = {name: dict(_figures(part)) for name, part in parts.items() if part}
    text = json.dumps(environment() | {"blocks": BLOCKS, "parts": result, "rows": [_short(r) for r in rows]}, indent=1)
    (RESULTS / "compare_truth.json").write_text(text + "\n")
    print(json.dumps(result, indent=2))


def _figures(rows: list[dict[str, Any]]) -> Iterator[tuple[str, Any]]:
    right = [r["kind"] == r["expected"] for r in rows]
    seconds = [r["seconds"] for r in rows]
    yield "cases", len(rows)
    yield "changed block first, percent", round(100 * statistics.mean(r["first"] for r in rows), 1)
    yield "kind right, percent", round(100 * statistics.mean(right), 1)
    yield (
        "kind wrong",
        sorted({f"{r['change']}, block {r['block']}: {r['kind']}" for r in rows if r["kind"] != r["expected"]}),
    )
    yield "not first", sorted(f"{r['change']}, block {r['block']}" for r in rows if not r["first"])
    yield "seconds, median", statistics.median(seconds)
    yield "seconds, most", max(seconds)
    yield "report tokens", sorted({r["tokens"] for r in rows})


def _short(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in ("command", "machine", "versions")}


def _file(known: Known, block: int, converted: bool, *, weights: bool = False) -> Path:
    name = known.name.replace(" ", "-").replace("'", "")
    return FOLDER / f"{name}-block{block}{'-converted' if converted else ''}{'-weights' if weights else ''}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--converted", action="store_true", help="round the altered copy to bfloat16")
    parser.add_argument("--weights", action="store_true", help="only the kind, from the weights")
    parser.add_argument("--only", default="", help="changes with this in their name")
    parser.add_argument("--half", choices=("development", "held-back"), help="one half of the kinds")
    parser.add_argument("--blocks", type=int, nargs="+", default=BLOCKS, help="in this order; default: all four")
    parser.add_argument("--summary", action="store_true", help="write the figures of what was measured")
    arguments = parser.parse_args()
    if arguments.summary:
        summary()
    else:
        wanted = [(known, block) for known, block in cases(arguments.blocks) if arguments.only in known.name]
        if arguments.half:
            wanted = [(known, block) for known, block in wanted if known.held_back == (arguments.half == "held-back")]
        (weigh if arguments.weights else run)(arguments.converted, wanted)


if __name__ == "__main__":
    main()
