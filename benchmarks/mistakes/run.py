"""Does a monitor name the mistakes that people make, and say nothing of healthy runs?

    python benchmarks/mistakes/run.py [--steps 300] [--budget 0.03] [--seeds 0 1 2] [--only NAME ..] [--name mistakes]
    python benchmarks/mistakes/run.py --loop trainer --name mistakes_trainer    # in transformers' Trainer

Makes every training of trainings.py with every seed, a monitor beside it as a new user would have it, and notes what it
said and which letters it showed, until 40 steps after its mistake was named. Resumable: what the result file holds is
not run again.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import peelwise
from peelwise.probe.texts import reference_prose

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent / "examples")]
from in_trainer import LEFT_OUT, trained  # noqa: E402
from trainings import CONTEXT, HEALTHY, IGNORED, MISTAKES, TRAININGS  # noqa: E402

from common import RESULTS, environment  # noqa: E402
from monitor import SmallGPT  # noqa: E402

# What may be said of any run: no word about a mistake in it.
ORDINARY = {"cost", "few-tokens", "pilot", "no-longer-red"}


def in_a_loop(training, seed, steps, budget, afterwards, stream):
    """Return events, letters, last loss, seconds and share of a training in a loop of its own."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = SmallGPT()
    training.change(model)
    optimizer = torch.optim.AdamW(training.groups(model, training.rate), lr=training.rate, weight_decay=training.decay)
    base = [group["lr"] for group in optimizer.param_groups]
    probe = peelwise.Probe.from_tokens(stream, sequence_length=CONTEXT, in_distribution=True)
    letters, losses, start = [], [], time.perf_counter()
    with peelwise.Monitor(model, probe, optimizer=optimizer, budget=budget, store=None) as monitor:
        for step in range(steps):
            if any(e.kind in training.kinds and step > e.step + afterwards for e in monitor.events):
                break
            for group, rate in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = rate * training.schedule(step, steps)
            ids, labels = training.batch(stream, step, generator)
            logits = model(ids[:, :-1]).float()
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
            loss.backward()
            if training.clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), training.clip)
            optimizer.step()
            found = monitor.step(step, loss=loss)
            if training.clears:
                optimizer.zero_grad()
            losses.append(loss.item())
            if found is not None:
                letters.append({"step": step, "kind": found.kind, "loss": found.probe_loss, "letters": found.letters})
        seconds = time.perf_counter() - start
    return {"monitor": monitor, "loss": losses[-1], "seconds": seconds, "letters": letters}


def train(training, seed, steps, budget, afterwards, loop):
    stream = torch.tensor(list("\n\n".join(reference_prose()).encode()))
    found = LOOPS[loop](training, seed, steps, budget, afterwards, stream)
    monitor, letters = found["monitor"], found["letters"]
    events = [e for e in monitor.events if e.kind not in ORDINARY]
    named = [e.step for e in events if e.kind in training.kinds]
    return {
        "loss": found["loss"],
        "seconds": found["seconds"],
        "share": monitor.share,
        "named_at": named[0] if named else None,
        "green_cells": sum(each["letters"].count("G") for each in letters),
        "cells": sum(len(each["letters"]) for each in letters),
        "undecided_cells": sum(each["letters"].count("?") for each in letters),
        "events": [
            {"step": e.step, "level": e.level, "kind": e.kind, "block": e.block, "text": str(e)} for e in events
        ],
        "measurements": letters,
    }


LOOPS = {"own": in_a_loop, "trainer": trained}


def summary(runs):
    """Return per training how many seeds named it and when, and what healthy runs were said to suffer from."""
    by = {name: [r for key, r in runs.items() if key.split(" | ")[0] == name] for name in TRAININGS}
    wrong = {name: [e for r in by[name] for e in r["events"] if e["level"] != "info"] for name in HEALTHY}
    return {
        "named": {
            name: {"seeds": len(by[name]), "named": sum(r["named_at"] is not None for r in by[name]),
                   "steps": [r["named_at"] for r in by[name]], "green_cells": sum(r["green_cells"] for r in by[name]),
                   "besides": sorted({e["kind"] for r in by[name] for e in r["events"]} - {*MISTAKES[name].kinds}),
                   "refused": sum("refused" in r for r in by[name])}
            for name in MISTAKES if by[name]
        },
        "healthy": {
            name: {"seeds": len(by[name]), "said": sorted({e["kind"] for e in wrong[name]})}
            for name in HEALTHY if by[name]
        },
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--budget", type=float, default=0.03)
    parser.add_argument("--afterwards", type=int, default=40, help="steps to follow it once its mistake was named")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--loop", choices=list(LOOPS), default="own", help="a plain loop, or transformers' Trainer")
    parser.add_argument("--only", nargs="+", help="trainings, by the beginning of their names")
    parser.add_argument("--name", default="mistakes", help="of the result file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = RESULTS / f"{options.name}.json"
    runs = json.loads(path.read_text())["runs"] if path.exists() else {}
    for seed in options.seeds:
        for name, training in TRAININGS.items():
            key = f"{name} | {seed} | {options.steps} | {options.budget}"
            if key in runs or (options.only and not name.startswith(tuple(options.only))):
                continue
            if options.loop == "trainer" and name in LEFT_OUT:
                continue
            try:
                runs[key] = train(training, seed, options.steps, options.budget, options.afterwards, options.loop)
            except peelwise.errors.UnsupportedModelError as error:  # a monitor that could not be made ends the training
                runs[key] = {"refused": str(error), "named_at": None, "loss": None, "events": [], "green_cells": 0}
            said = [(e["step"], e["kind"]) for e in runs[key]["events"]]
            print(f"{key}: named at {runs[key]['named_at']}, {said[:6]}, loss {runs[key]['loss']}", flush=True)
            path.write_text(json.dumps(environment() | {"summary": summary(runs), "runs": runs}, indent=1) + "\n")
    print(json.dumps(summary(runs), indent=1))


if __name__ == "__main__":
    main()
