"""What every stage of an audit computes, how fast against this machine's matrix speed, and what is left to win.

    python benchmarks/audit_stages.py [--models small-gpt smollm2] [--rounds 1] [--budget 60m]

One audit on one thread, to its end or that of its budget. Operations of matrix products, attention and decompositions
are counted as they run, by stage and by size. The same run then multiplies float32 matrices of the sizes that were most
of each stage: what a stage's operations would take at that speed, over what it took, is the share that it achieves; the
rest is left to win.
Seconds are the processor's, so that other work on the machine counts little. Counting costs time itself, which is why
the small model, whose operations are short, is audited once more without it. Resumable by model.
"""

import argparse
import json
import math
import time
from collections import Counter, defaultdict
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import peelwise
from common import RESULTS, environment
from peelwise.engine.clock import Clock
from peelwise.model.checkpoints import open_model
from peelwise.probe.texts import reference_prose

SMALL = sorted((Path(__file__).parents[1] / "examples/small_gpt/checkpoints").glob("step-*"))[-1]
MODELS = {"small-gpt": (str(SMALL), 24_000), "smollm2": ("smollm2", 5_120)}
COVERED, REPEAT_SECONDS = 0.9, 0.3  # part of a stage's operations whose sizes are measured; processor's time for each

aten = torch.ops.aten


def attention(shape):
    """Return operations and size of attention ``[.., heads, length, width]``: two products, forward."""
    *batch, length, width = shape
    many = math.prod(batch)
    return 4 * many * length**2 * width, (many, length, width, length)


def square(times):
    """Return what counts a decomposition of ``n x n`` as so many ``n^3``."""

    def counted(A, *rest):
        n, many = A.shape[-1], math.prod(A.shape[:-2])
        return many * times * n**3, (many, n, n, n)

    return counted


def singular(A, full=False, vectors=True, *rest):
    """Count a singular value decomposition of ``m x n`` (Golub and Van Loan, Matrix Computations, section 8.6)."""
    n, m = sorted(A.shape[-2:])
    many = math.prod(A.shape[:-2])
    return many * (6 * m * n**2 + 20 * n**3 if vectors else 2 * m * n**2 + 2 * n**3), (many, m, n, n)


def triangular(A, B, *rest):
    n, many, m = A.shape[-1], math.prod(A.shape[:-2]), B.shape[-1]
    return many * n * n * m, (many, n, n, m)


def halves(B, A, *rest):
    """Count a solve with a Cholesky factor: two triangular ones."""
    n, many, m = A.shape[-1], math.prod(A.shape[:-2]), B.shape[-1]
    return 2 * many * n * n * m, (many, n, n, m)


OTHERS = {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, *_: attention(q.shape),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, *_: (
        2.5 * attention(q.shape)[0],
        attention(q.shape)[1],
    ),
    aten._linalg_eigh: lambda A, uplo="L", vectors=True: square(9 if vectors else 4 / 3)(A),
    aten._linalg_svd: singular,
    aten.linalg_cholesky_ex: square(1 / 3),
    aten.linalg_inv_ex: square(2),
    aten._linalg_solve_ex: square(2 / 3),
    aten.linalg_solve_triangular: triangular,
    aten._cholesky_solve_helper: halves,
}


def product_size(name, args):
    """Return ``(many, m, k, n)`` of a matrix product."""
    a, b = args[1:3] if name in ("addmm", "baddbmm") else args[:2]
    return (a.shape[0] if a.dim() == 3 else 1), a.shape[-2], a.shape[-1], b.shape[-1]


class Counting(TorchDispatchMode):
    """Counts operations by stage and size; `seconds` are those of each stage without the stages inside of it."""

    def __init__(self):
        super().__init__()
        self.stage = "before"
        self.operations = defaultdict(Counter)
        self.kinds = defaultdict(Counter)
        self.seconds, self.wall = Counter(), Counter()
        self._since = time.process_time(), time.perf_counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        packet = aten.addmm if packet is aten.addmm_ else packet  # in place it computes as much
        name = packet.__name__
        if packet in OTHERS:
            operations, size = OTHERS[packet](*args)
        elif packet in flop_registry and name in ("mm", "addmm", "bmm", "baddbmm"):
            operations, size = flop_registry[packet](*args, **(kwargs or {}), out_val=out), product_size(name, args)
        else:
            return out
        self.operations[self.stage][size] += operations
        self.kinds[self.stage][name.strip("_")] += operations
        return out

    def enter(self, stage):
        """Charge the time since the last change to the stage that ends or pauses now."""
        now = time.process_time(), time.perf_counter()
        self.seconds[self.stage] += now[0] - self._since[0]
        self.wall[self.stage] += now[1] - self._since[1]
        self._since, self.stage = now, stage


@contextmanager
def watched(counting):
    """Tell ``counting`` about the stages of clocks."""
    staged = Clock.stage

    @contextmanager
    def stage(clock, name):
        outer = counting.stage
        counting.enter(name)
        try:
            with staged(clock, name):
                yield
        finally:
            counting.enter(outer)

    Clock.stage = stage
    try:
        yield
    finally:
        Clock.stage = staged


def speed(size):
    """Return float32 operations per second of the processor in products of a size."""
    many, m, k, n = size
    a, b = torch.randn(many, m, k), torch.randn(many, k, n)
    torch.bmm(a, b)
    began, times = time.process_time(), 0
    while (took := time.process_time() - began) < REPEAT_SECONDS:
        torch.bmm(a, b)
        times += 1
    return 2 * many * m * k * n * times / took


def most(sizes):
    """Return the sizes that make up most of a stage's operations, the largest first."""
    chosen, done, whole = [], 0, sum(sizes.values())
    for size, operations in sizes.most_common():
        chosen.append(size)
        done += operations
        if done >= COVERED * whole:
            break
    return chosen


def audited(model, probe, rounds, budget, counting, *, count):
    settings = peelwise.AuditSettings(budget, joint_rounds=rounds, solo_rounds=rounds)
    began = time.perf_counter(), time.process_time()
    counting.enter("between stages")
    with watched(counting):
        if count:
            with counting:
                record = peelwise.audit(model, probe, settings).record
        else:
            record = peelwise.audit(model, probe, settings).record
    counting.enter("after")
    return record, {
        "wall_seconds": time.perf_counter() - began[0],
        "processor_seconds": time.process_time() - began[1],
        "complete": record.complete,
        "verdicts": "".join(b.verdict[0] for b in record.blocks),
    }


def table(counted, timed):
    """Return one row per stage.

    Args:
        counted: has the operations.
        timed: has the seconds.
    """
    speeds, rows = {}, []
    for stage, seconds in timed.seconds.most_common():
        sizes = counted.operations[stage]
        if stage in ("before", "after"):
            continue
        for size in most(sizes):
            speeds.setdefault(size, speed(size))
        known = {size: operations for size, operations in sizes.items() if size in speeds}
        ideal = sum(operations / speeds[size] for size, operations in known.items())
        whole = sum(sizes.values())
        ideal *= whole / sum(known.values()) if known else 0.0
        rows.append({
            "stage": stage, "seconds": seconds, "operations": whole,
            "seconds_at_matrix_speed": ideal, "share": ideal / seconds if seconds else None,
            "left_seconds": seconds - ideal,
            "kinds": {kind: n / whole for kind, n in counted.kinds[stage].most_common(4)},
        })  # fmt: skip
    fastest = {"x".join(map(str, size)): s / 1e9 for size, s in sorted(speeds.items(), key=lambda i: -i[1])[:5]}
    return rows, fastest


def measured(name, rounds, budget):
    source, tokens = MODELS[name]
    opened = open_model(source, dtype="float32", device="cpu")
    probe = peelwise.Probe.from_text(reference_prose(), opened.tokenizer, tokens=tokens, in_distribution=True)
    counted = Counting()
    _, whole = audited(opened.model, probe, rounds, budget, counted, count=True)
    timed = counted
    if name == "small-gpt":
        timed = Counting()
        _, whole = audited(opened.model, probe, rounds, budget, timed, count=False)
    rows, fastest = table(counted, timed)
    return {"tokens": tokens, "rounds": rounds, **whole, "stages": rows, "giga_operations_per_second": fastest}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=1, help="joint and solo rounds, at most")
    parser.add_argument("--budget", default="60m", help="wall time of an audit; what is not done by then has no row")
    parser.add_argument("--name", default="audit_stages", help="of the result file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = RESULTS / f"{options.name}.json"
    found = json.loads(path.read_text())["models"] if path.exists() else {}
    for name in options.models:
        if name in found:
            continue
        found[name] = measured(name, options.rounds, options.budget)
        path.write_text(json.dumps(environment() | {"models": found}, indent=1) + "\n")
    show(found)


def show(found):
    """Print the table of docs/method.md."""
    for name, each in found.items():
        seconds = f"{each['processor_seconds']:.0f} s of the processor, {each['wall_seconds']:.0f} s in all"
        print(f"\n{name}, {each['tokens']:,} tokens: {seconds}, verdicts {each['verdicts']}\n")
        print("| stage | seconds | Gflop | share of matrix speed | left to win, s | mostly |")
        print("|---|---:|---:|---:|---:|---|")
        for row in each["stages"]:
            share = "" if row["share"] is None else f"{row['share']:.0%}"
            kinds = ", ".join(f"{kind.split('_flash')[0]} {part:.0%}" for kind, part in list(row["kinds"].items())[:2])
            numbers = f"{row['seconds']:.1f} | {row['operations'] / 1e9:,.0f} | {share} | {row['left_seconds']:.1f}"
            print(f"| {row['stage']} | {numbers} | {kinds} |")


if __name__ == "__main__":
    main()
