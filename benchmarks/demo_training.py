"""Does the demonstration keep its broken block red until it is mended, and does it turn green then?

    python benchmarks/demo_training.py [--seeds 0 1 2 3 4] [--arms witness training-alone]

``peelwise demo-training`` on one thread, without its page. Beside it the control: at the same step the block trains
again and gets no replacement weights. Noted: the letters of every measurement, and the first step at which the broken
block is red, the letters that it has until it is mended, and the first step at which it is green then. Resumable: what
the result file holds is not run again.
"""

import argparse
import itertools
import json
import time

import torch

import peelwise
from common import RESULTS, environment
from peelwise.cli import demo_training
from peelwise.cli.demo_training import CONTEXT, Plan, SmallGPT, train
from peelwise.probe.probe import Probe
from peelwise.probe.texts import reference_prose
from peelwise.tasks.monitor.schedules import every


def run(plan, seed):
    torch.manual_seed(seed)
    stream = torch.tensor(list("\n\n".join(reference_prose()).encode()))
    model = SmallGPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.rate)
    probe = Probe.from_tokens(stream, tokens=plan.probe_tokens, sequence_length=CONTEXT, in_distribution=True)
    shown, began = {}, time.perf_counter()
    with peelwise.Monitor(
        model, probe, optimizer=optimizer, budget=plan.budget, schedule=every(plan.every), store=None
    ) as monitor:
        for step in train(monitor, model, optimizer, stream, plan):
            if monitor.last is not None and monitor.last.step == step:
                shown[step] = monitor.last.letters
    return {
        "seconds": time.perf_counter() - began,
        "share": monitor.share,
        **seen(shown, plan),
        "letters": {str(step): letters for step, letters in shown.items()},
        "events": [[e.step, e.kind, e.block] for e in monitor.events if e.level != "info"],
    }


def seen(shown, plan):
    """Return when the block at fault was red and green, and which letters it had in between."""
    own = {step: letters[plan.cut_off] for step, letters in shown.items()}
    red = next(
        (step for step, letter in own.items() if plan.from_step <= step < plan.mended_at and letter == "R"), None
    )
    kept = "".join(letter for step, letter in own.items() if red is not None and red <= step < plan.mended_at)
    green = next((step for step, letter in own.items() if step >= plan.mended_at and letter == "G"), None)
    return {
        "red_at": red,
        "letters_until_mended": kept,
        "red_until_mended": bool(kept) and set(kept) == {"R"},
        "green_at": green,
        "last_letter": list(own.values())[-1] if own else None,
        "other_blocks_red": sorted({block for letters in shown.values() for block, letter in enumerate(letters)
                                    if letter == "R" and block != plan.cut_off}),
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument(
        "--arms", nargs="+", choices=["witness", "training-alone"], default=["witness", "training-alone"]
    )
    parser.add_argument("--name", default="demo_training", help="of the result file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    path, mend = RESULTS / f"{options.name}.json", demo_training.mend
    runs = json.loads(path.read_text())["runs"] if path.exists() else {}
    for arm, seed in itertools.product(options.arms, options.seeds):
        if (key := f"{arm} | {seed}") in runs:
            continue
        demo_training.mend = mend if arm == "witness" else lambda *_: None
        runs[key] = run(Plan(), seed)
        print(key, {name: value for name, value in runs[key].items() if name != "letters"}, flush=True)
        path.write_text(json.dumps(environment() | {"runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
