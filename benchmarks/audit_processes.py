"""How much sooner an audit ends where two processes share it: two of one thread each against one of one thread.

    python benchmarks/audit_processes.py [--repetitions 3] [--tokens 8192] [--minutes 5]

The last stage of the small GPT, all stages of an audit to their end, in turn. Told are ratios, as medians over
repetitions: of wall time, and of processor time, that of one process over that of the busier of two. The former is what
a user waits, on a machine as busy as it was (its load averages are recorded); the latter is what it would be on idle
processors if nobody ever waited for the other. Opening packages and model, which every process does, is left out of
both. Beside them: the verdicts, and the largest differences of losses and gains. Resumable by repetition; none is begun
after so many minutes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from common import RESULTS, write
from peelwise.api.inputs import open_both
from peelwise.distributed.processes import together
from peelwise.probe.options import ProbeOptions
from peelwise.tasks.audit.run import run_audit
from peelwise.tasks.audit.settings import AuditSettings

NAME = "audit_processes"
SMALL = sorted((Path(__file__).parents[1] / "examples/small_gpt/checkpoints").glob("step-*"))[-1]
LOSSES = {"current", "composed", "shuffled", "untrained", "head_control", "without_blocks"}
WAYS = {"one": [], "two": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]}


def measure(tokens, out):
    """Audit in this process, or in all that torchrun has started, and write what it took and found."""
    torch.set_num_threads(1)
    rank = os.environ.get("RANK", "0")
    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo")
    target, probe = open_both(str(SMALL), ProbeOptions(tokens=tokens))
    with together() as processes:
        began, worked = time.perf_counter(), time.process_time()
        record = run_audit(target.model, probe, AuditSettings(3_600.0), processes=processes).record
        took, worked = time.perf_counter() - began, time.process_time() - worked
    gains = [(block.recoverable_nats, block.unique_nats) for block in record.blocks]
    found = {
        "wall_seconds": took,
        "processor_seconds": worked,
        "complete": record.complete,
        "letters": "".join(block.verdict[0] for block in record.blocks),
        "losses": record.loss.model_dump(include=LOSSES),
        "gains": [interval and interval.mean for both in gains for interval in both],
        "stages": {stage.name: stage.wall_seconds for stage in record.cost.stages},
    }
    (out / f"{rank}.json").write_text(json.dumps(found))
    if "RANK" in os.environ:
        torch.distributed.destroy_process_group()


def run(way, tokens):
    """Return what the first process found, the processor seconds of the busiest, and how busy the machine was."""
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *WAYS[way], __file__, "--tokens", str(tokens), "--measure", folder]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
        found = [json.loads(file.read_text()) for file in sorted(Path(folder).glob("*.json"))]
    busiest = max(each["processor_seconds"] for each in found)
    return found[0] | {"processor_seconds": busiest, "load_average": [load, os.getloadavg()[0]]}


def largest(runs, of):
    """Return the largest difference of any number between one process and two, over all repetitions."""
    pairs = [(a, b) for each in runs for a, b in zip(of(each["one"]), of(each["two"]), strict=True)]
    return max(abs(a - b) for a, b in pairs if a is not None and b is not None)


def ratios(runs, key):
    found = [each["one"][key] / each["two"][key] for each in runs]
    return {"median": statistics.median(found), "each": found}


def summary(runs, tokens):
    stages = runs[0]["one"]["stages"].keys() & runs[0]["two"]["stages"].keys()
    return {
        "tokens": tokens,
        "threads_each": 1,
        "speedup_wall": ratios(runs, "wall_seconds"),
        "speedup_processor": ratios(runs, "processor_seconds"),
        "speedup_of_stages_wall": {
            stage: statistics.median(e["one"]["stages"][stage] / e["two"]["stages"][stage] for e in runs)
            for stage in runs[0]["one"]["stages"]
            if stage in stages
        },
        "letters": {way: sorted({each[way]["letters"] for each in runs}) for way in WAYS},
        "complete": all(each[way]["complete"] for each in runs for way in WAYS),
        "largest_difference_nats": {
            "current loss": largest(runs, lambda found: [found["losses"]["current"]]),
            "losses": largest(runs, lambda found: found["losses"].values()),
            "gains": largest(runs, lambda found: found["gains"]),
        },
        "beside_it": "two cores with other benchmarks on them all the time; load averages before and after each run",
        "runs": runs,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=8_192)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure is not None:
        measure(args.tokens, args.measure)
        return
    kept = RESULTS / f"{NAME}.json"
    earlier = json.loads(kept.read_text()) if kept.exists() else {}
    runs = earlier.get("runs", []) if earlier.get("tokens") == args.tokens else []
    until = time.monotonic() + 60 * args.minutes
    while len(runs) < args.repetitions and time.monotonic() < until:
        order = list(WAYS) if len(runs) % 2 == 0 else list(WAYS)[::-1]  # neither is always the first
        runs.append({way: run(way, args.tokens) for way in order})
        write(NAME, summary(runs, args.tokens), show=False)
    told = {key: value for key, value in summary(runs, args.tokens).items() if key != "runs"}
    print(json.dumps(told, indent=2))


if __name__ == "__main__":
    main()
