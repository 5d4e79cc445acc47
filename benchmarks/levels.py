"""Do the intervals of levels hold on a real run? Against a dense measurement with many tokens, at ten moments.

    python benchmarks/levels.py [--seeds 0 1] [--steps 1000] [--each 4096] [--every 40] [--again | --add]

The GPT of `peelwise demo-training` without its fault, half a cosine, one thread. Every so many steps another part of a
rolling probe is measured as a monitor does, and the level of every block's solo gain is kept up. At ten moments, some
of them between two measurements, the gain of witnesses of the same kind is measured densely: five of them, each from a
part of its own, on 320 sequences that the rolling measurements never come to. Counted: intervals of levels, and of the
latest single measurement, that hold the dense mean, allowing for its own error; and how wide they are. `--again` makes
the levels anew from the measurements that the result file has; `--add` keeps those and adds other seeds.
"""

from __future__ import annotations

import argparse
import copy
import math
from dataclasses import replace
from statistics import mean, stdev

import torch
from torch.nn import functional as F

import peelwise
from common import earlier, write
from peelwise.cli.demo_training import BATCH, CONTEXT, Plan, SmallGPT
from peelwise.engine.fading import FadingSums
from peelwise.evidence.intervals import Paired
from peelwise.evidence.levels import Levels
from peelwise.model.architectures import find_blocks
from peelwise.probe.rolling import Roll
from peelwise.probe.rows import Split
from peelwise.probe.texts import reference_prose
from peelwise.tasks.monitor import measure as measuring

DRAWS, DENSE, MOMENTS = 5, 320, 10


def alone(model, blocks, probe, kept):
    """Return the loss and the solo gain of every block, as a monitor measures it."""
    every = range(len(blocks))
    found = measuring.measure(model, blocks, probe, "alone", every, micro_batch_tokens=2048, kept=kept)
    return found.loss, found.alone


def dense(model, blocks, roll, options, many, kept, step):
    """Return per block the mean gain of several witnesses of the same kind on many tokens, and its standard error."""
    gains = {block.index: [] for block in blocks}
    for _ in range(DRAWS):
        sums = copy.deepcopy(kept)
        sums.begin(step)
        for index, value in alone(model, blocks, replace(roll.take(options.each).probe, report=many), sums)[1].items():
            gains[index].append(value)
    return {
        index: (mean(v.mean for v in found),
                math.hypot(mean(v.standard_error for v in found), stdev(v.mean for v in found) / len(found) ** 0.5))
        for index, found in gains.items() if len(found) == DRAWS
    }  # fmt: skip


def holds(value: Paired, truth: float, error: float) -> bool:
    """Whether the interval holds a truth that is known up to an error of its own."""
    interval = replace(value, standard_error=math.hypot(value.standard_error, error)).interval()
    return interval.low <= truth <= interval.high


def run(seed, stream, options):
    """Return what was measured densely, a row per moment and block, and every rolling measurement."""
    torch.manual_seed(seed)
    model = SmallGPT()
    blocks, optimizer = find_blocks(model), torch.optim.AdamW(model.parameters(), lr=Plan().rate)
    whole = peelwise.Probe.rolling(stream, tokens=360_000, sequence_length=CONTEXT, in_distribution=True, seed=seed)
    many = Split(whole.report.ids[-DENSE:], whole.report.mask[-DENSE:])
    roll, others = Roll(whole), Roll(whole)
    measurements = options.steps // options.every
    used = sum(roll.take(options.each).probe.report.sequences for _ in range(measurements))
    assert used + whole.fixed.sequences + DENSE <= whole.report.sequences, "the rolling measurements come too far"
    others.take(options.each * measurements)  # so that the dense ones fit on other parts
    roll, kept = Roll(whole), FadingSums()
    dense_rows, measured = [], []
    for step in range(1, options.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = Plan().rate * (0.02 + 0.49 * (1 + math.cos(math.pi * step / options.steps)))
        starts = torch.randint(len(stream) - CONTEXT, (BATCH, 1))
        batch = stream[starts + torch.arange(CONTEXT + 1)]
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % options.every == 0:
            kept.begin(step)
            _, found = alone(model, blocks, roll.take(options.each).probe, kept)
            values = {i: [v.mean, v.standard_error, v.sequences, v.skewness] for i, v in found.items()}
            measured.append({"seed": seed, "step": step, "values": values})
        if step % (options.steps // MOMENTS) == 0:
            for index, (truth, error) in dense(model, blocks, others, options, many, kept, step).items():
                dense_rows.append({"seed": seed, "step": step, "block": index, "truth": truth, "truth_error": error})
            print(
                seed,
                step,
                [f"{r['truth']:.4f}+-{r['truth_error']:.4f}" for r in dense_rows[-len(blocks) :]],
                flush=True,
            )
    return dense_rows, measured


def compared(dense_rows, measured):
    """Return the rows with the level and the latest single measurement that a monitor has at that moment."""
    rows = []
    for seed, step in dict.fromkeys((row["seed"], row["step"]) for row in dense_rows):
        levels = Levels()
        for one in measured:
            if one["seed"] == seed and one["step"] <= step:
                latest = {int(index): Paired(*value) for index, value in one["values"].items()}
                levels.add(one["step"], latest)
        at = levels.at(step)
        for row in dense_rows:
            if (row["seed"], row["step"]) == (seed, step):
                level, single = at[row["block"]], latest[row["block"]]
                known = {key: row[key] for key in ("seed", "step", "block", "truth", "truth_error")}
                rows.append(known | {
                    "level": level.mean, "level_error": level.standard_error,
                    "level_holds": holds(level, row["truth"], row["truth_error"]),
                    "single": single.mean, "single_error": single.standard_error,
                    "single_holds": holds(single, row["truth"], row["truth_error"]),
                })  # fmt: skip
    return rows


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--each", type=int, default=4096)
    parser.add_argument("--every", type=int, default=40)
    parser.add_argument("--name", default="levels")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--add", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    measuring._affordable = lambda session, order, seconds, evaluations: list(
        order
    )  # all blocks, however long it takes
    before, dense_rows, measured = None, [], []
    if options.again or options.add:
        known = earlier(options.name)
        before, dense_rows, measured = known["command"], known["rows"], known["measurements"]
    if not options.again:
        stream = torch.tensor(list("\n\n".join(reference_prose()).encode()))
        for seed in options.seeds:
            of_seed = run(seed, stream, options)
            dense_rows, measured = [*dense_rows, *of_seed[0]], [*measured, *of_seed[1]]
    rows = compared(dense_rows, measured)
    result = {
        "cells": len(rows),
        "levels_hold": mean(row["level_holds"] for row in rows),
        "singles_hold": mean(row["single_holds"] for row in rows),
        "level_error": mean(row["level_error"] for row in rows),
        "single_error": mean(row["single_error"] for row in rows),
        "off_level": mean((row["level"] - row["truth"]) ** 2 for row in rows) ** 0.5,
        "off_single": mean((row["single"] - row["truth"]) ** 2 for row in rows) ** 0.5,
    }
    print(result)
    write(options.name, result | {"rows": rows, "measurements": measured}, before=before, show=False)


if __name__ == "__main__":
    main()
