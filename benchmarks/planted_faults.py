"""How many steps after a fault is planted in a healthy training does a monitor turn red or name it?

    python benchmarks/planted_faults.py [--budget 0.03] [--seeds 0 1 2] [--only NAME ..] [--name planted_faults]

The small GPT of examples/monitor.py learns the reference prose at a constant rate; at step 300 one of ten things
breaks, five in block 2 and five in the whole run. Counted are the steps until block 2 is red (any block, for faults of
the whole run) or an event names the fault's kind, at most 300; a run ends there. What is said before is a false alarm.
Resumable: what the result file holds is not run again.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median

import torch
from torch import nn
from torch.nn import functional as F

import peelwise
from common import RESULTS, environment
from peelwise.probe.texts import reference_prose

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "mistakes"), str(HERE.parent / "examples")]
from trainings import CONTEXT, IGNORED, padded, plain, same_again, shifted_twice  # noqa: E402

from monitor import SmallGPT  # noqa: E402

BLOCK, PLANTED_AT, LONGEST, RATE = 2, 300, 300, 2e-3


class Run:
    """One training; a fault changes what one of its steps does.

    Attributes:
        batch: ids and labels of a step.
        clears: whether gradients are cleared.
        cut_off: whether the block's gradients are dropped.
    """

    def __init__(self):
        self.model = SmallGPT()
        inside = list(self.model.blocks[BLOCK].parameters())
        outside = [p for p in self.model.parameters() if all(p is not q for q in inside)]
        groups = [{"params": outside}, {"params": inside}]
        self.optimizer = torch.optim.AdamW(groups, lr=RATE, weight_decay=0.01)
        self.batch, self.clears, self.cut_off = plain, True, False
        self.growth = 1.0

    def step(self, ids, labels):
        logits = self.model(ids[:, :-1]).float()
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        loss.backward()
        if self.cut_off:
            for parameter in self.model.blocks[BLOCK].parameters():
                parameter.grad = None
                parameter.data.mul_(self.growth)
        self.optimizer.step()
        return loss


def no_gradient(run):
    run.cut_off = True


def grows(run):
    run.cut_off, run.growth = True, 1.004


def too_fast(run):
    run.optimizer.param_groups[1]["lr"] = 100 * RATE


@torch.no_grad()
def redrawn(run):
    for module in run.model.blocks[BLOCK].modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()


@torch.no_grad()
def dead_neurons(run):
    """Close half of the neurons of the feed-forward part for good."""
    bias = run.model.blocks[BLOCK].feed_forward[0].bias
    bias[: len(bias) // 2] = -1e3


def decays(run):
    for group in run.optimizer.param_groups:
        group["weight_decay"] = 20.0


FAULTS = {
    "no gradient": (no_gradient, {"no-gradient"}),
    "no gradient, weights grow": (grows, {"no-gradient"}),
    "100 times the rate": (too_fast, {"rate-too-large"}),
    "re-drawn": (redrawn, {"weights-replaced"}),
    "dead neurons": (dead_neurons, {"dead-units"}),
    "labels shifted twice": (lambda run: setattr(run, "batch", shifted_twice), {"labels-shifted"}),
    "padding in the loss": (lambda run: setattr(run, "batch", padded(masked=False)), {"padding-in-loss"}),
    "the same data again and again": (lambda run: setattr(run, "batch", same_again(48)), {"repeated-data"}),
    "far too strong decay": (decays, {"decay-too-strong"}),
    "gradients never cleared": (lambda run: setattr(run, "clears", False), {"gradients-kept"}),
}
IN_THE_BLOCK = list(FAULTS)[:5]


def planted(name, seed, budget):
    plant, kinds = FAULTS[name]
    torch.manual_seed(seed)
    generator, stream = torch.Generator().manual_seed(seed), torch.tensor(list("\n\n".join(reference_prose()).encode()))
    run, began = Run(), time.perf_counter()
    probe = peelwise.Probe.from_tokens(stream, sequence_length=CONTEXT, in_distribution=True)
    letters, said, found_at = {}, [], None
    with peelwise.Monitor(run.model, probe, optimizer=run.optimizer, budget=budget, store=None) as monitor:
        for step in range(PLANTED_AT + LONGEST + 1):
            if step == PLANTED_AT:
                plant(run)
            loss = run.step(*run.batch(stream, step, generator))
            found = monitor.step(step, loss=loss)
            if run.clears:
                run.optimizer.zero_grad()
            if found is not None:
                letters[step] = found.letters
            told = [[e.step, e.kind, e.block] for e in monitor.events if e.level != "info"]
            said, new = told, [kind for at, kind, _ in told if at >= PLANTED_AT]
            red = step >= PLANTED_AT and found is not None and is_red(found.letters, name)
            if red or kinds & {*new}:
                found_at = step - PLANTED_AT
                break
        share = monitor.share
    return {
        "steps": found_at, "by": None if found_at is None else "red" if red else "event",
        "share": share, "seconds": time.perf_counter() - began,
        "events": said, "before": [e for e in said if e[0] < PLANTED_AT],
        "letters": {str(step): each for step, each in letters.items()},
    }  # fmt: skip


def is_red(letters, name):
    return letters[BLOCK] == "R" if name in IN_THE_BLOCK else "R" in letters


def summary(runs):
    """Return the median of steps over all runs, faults that were not found counting as more than any."""
    steps = [r["steps"] if r["steps"] is not None else float("inf") for r in runs.values()]
    by_fault = {name: [r["steps"] for key, r in runs.items() if key.split(" | ")[0] == name] for name in FAULTS}
    middle = median(steps)
    return {
        "runs": len(steps), "found": sum(r["steps"] is not None for r in runs.values()),
        "median_steps": middle if middle < float("inf") else None, "steps": by_fault,
        "false_before_the_fault": sum(len(r["before"]) for r in runs.values()),
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--budget", type=float, default=0.03)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", help="faults, by the beginning of their names")
    parser.add_argument("--name", default="planted_faults", help="of the result file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = RESULTS / f"{options.name}.json"
    runs = json.loads(path.read_text())["runs"] if path.exists() else {}
    for seed in options.seeds:
        for name in FAULTS:
            key = f"{name} | {seed} | {options.budget}"
            if key in runs or (options.only and not name.startswith(tuple(options.only))):
                continue
            runs[key] = planted(name, seed, options.budget)
            path.write_text(json.dumps(environment() | {"summary": summary(runs), "runs": runs}, indent=1) + "\n")
            print(key, runs[key]["steps"], runs[key]["by"], runs[key]["events"][:5], flush=True)
    print(json.dumps(summary(runs), indent=1))


if __name__ == "__main__":
    main()
