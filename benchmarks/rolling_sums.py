"""Which sums of earlier measurements may be kept: what a block's witness gains on fresh text, by half-lives of S, C, F.

    python benchmarks/rolling_sums.py [--seeds 0 1] [--steps 800] [--every 40]

The GPT of `peelwise demo-training` without its fault, half a cosine down to a fiftieth of the rate, one thread. Every
so many steps another part of a rolling probe is measured, once per way of keeping sums; every witness is evaluated on
the same 8,192 tokens that no measurement has. Half-lives are in steps, without the monitor's quarter of the run.
Printed: solo gains, means over blocks and the moments of each half of the run, nats per token.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from dataclasses import replace
from statistics import mean

import torch
from torch.nn import functional as F

import peelwise
from common import write
from peelwise.cli.demo_training import BATCH, CONTEXT, Plan, SmallGPT
from peelwise.engine.fading import FadingSums, HalfLives
from peelwise.engine.opening import open_session
from peelwise.engine.sweep import sweep
from peelwise.model.architectures import find_blocks
from peelwise.model.guard import untouched
from peelwise.model.splice import frozen
from peelwise.probe.rolling import Roll
from peelwise.probe.rows import Split
from peelwise.probe.texts import reference_prose
from peelwise.tasks.audit import stages
from peelwise.tasks.audit.findings import Findings

WAYS = {
    "none": HalfLives(),
    "S 400": HalfLives(S=400),
    "F 100": HalfLives(F=100),
    "S F 50": HalfLives(S=50, F=50),
    "S F 100": HalfLives(S=100, F=100),
    "S F 200": HalfLives(S=200, F=200),
    "S F 100, C 10": HalfLives(S=100, F=100, C=10),
    "S F 100, C 50": HalfLives(S=100, F=100, C=50),
}


def solo_gains(model, blocks, probe, kept):
    """Return what every block gains by itself, nats per token of report."""
    with untouched(model), frozen([linear for block in blocks for linear in block.linears]):
        session = open_session(model, blocks, probe, name="the model", budget_seconds=math.inf, micro_batch_tokens=2048,
                               watcher=None, checked=True)  # fmt: skip
        (proposals,) = sweep(session.runner, session.fit, session.select, kept=kept)
        found = Findings(proposals=proposals)
        stages.refine_alone(session, found, rounds=1)
        now = session.report
        return [
            0.0 if (better := found.alone.get(b.index)) is None or better.report_losses is None
            else now.mean - now.mean_of(better.report_losses)
            for b in blocks
        ]  # fmt: skip


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--every", type=int, default=40)
    parser.add_argument("--each", type=int, default=1500)
    parser.add_argument("--name", default="rolling_sums")
    options = parser.parse_args()
    torch.set_num_threads(1)
    stream = torch.tensor(list("\n\n".join(reference_prose()).encode()))
    rows = []
    for seed in options.seeds:
        torch.manual_seed(seed)
        model, gains = SmallGPT(), defaultdict(list)
        blocks, optimizer = find_blocks(model), torch.optim.AdamW(model.parameters(), lr=Plan().rate)
        whole = peelwise.Probe.rolling(stream, tokens=120_000, sequence_length=CONTEXT, in_distribution=True)
        roll = Roll(whole)
        many = Split(whole.report.ids[-128:], whole.report.mask[-128:])  # the roll does not come that far
        kept = {name: FadingSums(half_lives, share=0.0) for name, half_lives in WAYS.items()}
        for step in range(1, options.steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = Plan().rate * (0.02 + 0.49 * (1 + math.cos(math.pi * step / options.steps)))
            starts = torch.randint(len(stream) - CONTEXT, (BATCH, 1))
            batch = stream[starts + torch.arange(CONTEXT + 1)]
            loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % options.every:
                continue
            probe = replace(roll.take(options.each).probe, report=many)
            for name, sums in kept.items():
                sums.begin(step)
                gains[name].append(mean(solo_gains(model, blocks, probe, sums)))
        half = options.steps // options.every // 2
        for name, found in gains.items():
            row = {"seed": seed, "kept": name, "first_half": mean(found[:half]), "second_half": mean(found[half:]),
                   "megabytes": round(kept[name].bytes / 1e6, 2)}  # fmt: skip
            rows.append(row)
            print(row, flush=True)
    write(options.name, {"tokens_of_a_measurement": options.each, "every": options.every, "rows": rows})


if __name__ == "__main__":
    main()
