"""Which part of a monitored run does the page show "?", at what share of time?

    python benchmarks/undecided.py [--budgets 0.01 0.03 0.1] [--seeds 0] [--steps 1000] [--probes fixed rolling]
                                   [--trainings demo healthy] [--name undecided]

Two trainings on one thread: the one of ``peelwise demo-training`` (960 steps, a block cut off at 400 and mended at
720), and the healthy small GPT of examples/monitor.py, each with the probe that it has there and with a rolling one,
one after the other. Counted after the first tenth of the steps: cells (blocks x measurements) without a colour, and
the same weighted by how long each was on screen; before the first measurement all counts as undecided.
"""

import argparse
import itertools
import sys
import time
from pathlib import Path
from statistics import mean

import torch
from torch.nn import functional as F

import peelwise
from common import write
from peelwise.cli.demo_training import BLOCKS as DEMO_BLOCKS
from peelwise.cli.demo_training import Plan, SmallGPT, train
from peelwise.probe.texts import reference_prose

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
import monitor as example
from peelwise.probe.options import TOKENS


def probe_of(kind, stream, tokens, length):
    """Return a probe of some tokens that all measurements share, or a rolling one."""
    if kind == "rolling":
        return peelwise.Probe.rolling(stream, sequence_length=length, in_distribution=True)
    return peelwise.Probe.from_tokens(stream, tokens=tokens, sequence_length=length, in_distribution=True)


def demo(stream, budget, steps, kind):
    plan, model = Plan(), SmallGPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.rate)
    probe = probe_of(kind, stream, plan.probe_tokens, 64)
    with peelwise.Monitor(
        model, probe, optimizer=optimizer, budget=budget, store=None, on_measurement=None
    ) as watching:
        shown = {}
        for step in train(watching, model, optimizer, stream, plan):
            if watching.last is not None and watching.last.step == step:
                shown[step] = watching.last.letters
    return shown, plan.steps, DEMO_BLOCKS, watching


def healthy(stream, budget, steps, kind):
    model = example.SmallGPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    probe = probe_of(kind, stream, TOKENS, example.CONTEXT)
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
    parser.add_argument("--probes", choices=["fixed", "rolling"], nargs="+", default=["fixed"])
    parser.add_argument("--trainings", choices=["demo", "healthy"], nargs="+", default=["demo", "healthy"])
    parser.add_argument("--name", default="undecided")
    options = parser.parse_args()
    torch.set_num_threads(1)
    stream = torch.tensor(list("\n\n".join(reference_prose()).encode()))
    rows = []
    for budget in options.budgets:
        for name, seed, kind in itertools.product(options.trainings, options.seeds, options.probes):
            run = {"demo": demo, "healthy": healthy}[name]
            torch.manual_seed(seed)
            began = time.perf_counter()
            shown, steps, blocks, watching = run(stream, budget, options.steps, kind)
            events = [[e.step, e.kind, e.block] for e in watching.events if e.level != "info"]
            row = {
                "training": name,
                "probe": kind,
                "seed": seed,
                "budget": budget,
                "share": watching.share,
                "steps": steps,
                "seconds": time.perf_counter() - began,
                **undecided(shown, steps, blocks),
                "events": events,
                "letters": {str(step): letters for step, letters in shown.items()},
            }
            rows.append(row)
            write(options.name, {"means": means(rows), "runs": rows}, show=False)  # what is there if it is stopped
            print({key: value for key, value in row.items() if key != "letters"}, flush=True)
    print(means(rows))


def means(rows):
    """Return the mean over seeds of each training, probe and budget, and how many red events blocks at fault had."""
    found = []
    for key in dict.fromkeys((row["training"], row["probe"], row["budget"]) for row in rows):
        of = [row for row in rows if (row["training"], row["probe"], row["budget"]) == key]
        cells = [row["undecided_cells"] for row in of if row["undecided_cells"] is not None]
        found.append({
            "training": key[0], "probe": key[1], "budget": key[2], "runs": len(of),
            "measurements": mean(row["measurements"] for row in of),
            "undecided_cells": mean(cells) if cells else None,
            "undecided_on_screen": mean(row["undecided_on_screen"] for row in of),
            "share": mean(row["share"] for row in of),
            "runs_with_a_red_block": sum(any("R" in letters for letters in row["letters"].values()) for row in of),
        })  # fmt: skip
    return found


if __name__ == "__main__":
    main()
