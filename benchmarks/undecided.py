"""Which part of a monitored run does the page show "?", at what share of time?

    python benchmarks/undecided.py [--budgets 0.01 0.03 0.1] [--seeds 0] [--steps 1000] [--name undecided]

Two trainings on one thread: the one of ``peelwise demo-training`` (720 steps, a block cut off at 400), and the healthy
small GPT of examples/monitor.py. Counted after the first tenth of the steps: cells (blocks x measurements) without a
colour, and the same weighted by how long each was on screen; before the first measurement all counts as undecided.
"""

import argparse
import itertools
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F

import peelwise
from common import write
from peelwise.cli.demo_training import BLOCKS as DEMO_BLOCKS
from peelwise.cli.demo_training import Plan, SmallGPT, train
from peelwise.probe.texts import reference_prose

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
import monitor as example


def demo(stream, budget, steps):
    plan, model = Plan(budget=budget), SmallGPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.rate)
    probe = peelwise.Probe.from_tokens(stream, tokens=plan.probe_tokens, sequence_length=64, in_distribution=True)
    with peelwise.Monitor(
        model, probe, optimizer=optimizer, budget=budget, store=None, on_measurement=None
    ) as watching:
        shown = {}
        for step in train(watching, model, optimizer, stream, plan):
            if watching.last is not None and watching.last.step == step:
                shown[step] = watching.last.letters
    return shown, plan.steps, DEMO_BLOCKS, watching


def healthy(stream, budget, steps):
    model = example.SmallGPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    probe = peelwise.Probe.from_tokens(stream, sequence_length=example.CONTEXT, in_distribution=True)
    with peelwise.Monitor(model, probe, optimizer=optimizer, budget=budget, store=None) as watching:
        shown = {}
        for step in range(steps):
            batch = stream[torch.randint(len(stream) - example.CONTEXT, (example.BATCH, 1)) + torch.arange(65)]
            loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            found = watching.step(step, loss=loss)
            optimizer.zero_grad()
            if found is not None:
                shown[step] = found.letters
    return shown, steps, example.BLOCKS, watching


def undecided(shown, steps, blocks):
    """Return the share of cells, and of what was on screen, without a colour, after the first tenth of the run."""
    late = {step: letters for step, letters in shown.items() if step >= steps / 10}
    cells = sum(len(letters) for letters in late.values())
    screen = "?" * blocks
    seen = grey = 0
    for step in range(steps):
        screen = shown.get(step, screen)
        if step >= steps / 10:
            seen, grey = seen + blocks, grey + screen.count("?")
    return {
        "measurements": len(late),
        "undecided_cells": sum(letters.count("?") for letters in late.values()) / cells if cells else None,
        "undecided_on_screen": grey / seen,
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.01, 0.03, 0.1])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--name", default="undecided")
    options = parser.parse_args()
    torch.set_num_threads(1)
    stream = torch.tensor(list("\n\n".join(reference_prose()).encode()))
    rows = []
    for budget in options.budgets:
        for run, seed in itertools.product((demo, healthy), options.seeds):
            torch.manual_seed(seed)
            began = time.perf_counter()
            shown, steps, blocks, watching = run(stream, budget, options.steps)
            events = [[e.step, e.kind, e.block] for e in watching.events if e.level != "info"]
            row = {"training": run.__name__, "seed": seed, "budget": budget, "share": watching.share, "steps": steps,
                   "seconds": time.perf_counter() - began, **undecided(shown, steps, blocks), "events": events,
                   "letters": {str(step): letters for step, letters in shown.items()}}  # fmt: skip
            rows.append(row)
            print({key: value for key, value in row.items() if key != "letters"}, flush=True)
    write(options.name, {"runs": rows})


if __name__ == "__main__":
    main()
