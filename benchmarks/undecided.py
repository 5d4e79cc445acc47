"""Which part of a monitored run does the page show "?", at what share of time?

    python benchmarks/undecided.py [--budgets 0.01 0.03 0.1] [--seeds 0] [--steps NAME=STEPS ..]
                                   [--trainings demo healthy example small-gpt trainer]
                                   [--probes fixed rolling] [--name undecided]

Trainings on one thread, each with its usual probe or with a rolling one: that of ``peelwise demo-training`` (a block
cut off at step 400 and mended at 680), the small GPT of examples/monitor.py healthy and as it is there (a block is
missing from the optimiser), the small Llama of examples/small_gpt from step 600 on, and SmolLM2-135M fine-tuned by
transformers' Trainer. Counted after the first tenth of the steps: cells (blocks x measurements) without a colour, and
the same weighted by how long each was on screen; before the first measurement all counts as undecided. Resumable: what
the result file holds is not run again.
"""

import argparse
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean

import torch
from torch.nn import functional as F

import peelwise
from common import RESULTS, environment
from peelwise.cli.demo_training import CONTEXT, Plan, SmallGPT, train
from peelwise.probe.texts import reference_prose

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
import monitor as example  # noqa: E402
from peelwise.probe.options import TOKENS  # noqa: E402
from small_gpt.evaluate import token_stream  # noqa: E402
from small_gpt.text import training_documents  # noqa: E402

SMALL = ROOT / "examples" / "small_gpt" / "checkpoints" / "step-00600"
STEPS = {"demo": Plan().steps, "healthy": 1500, "example": 1500, "small-gpt": 300, "trainer": 80}
ORDINARY = 128  # tokens of a sequence of models that have a tokenizer


def probe_of(kind, stream, tokens, length):
    """Return a probe of some tokens that all measurements share, or a rolling one."""
    if kind == "rolling":
        return peelwise.Probe.rolling(stream, sequence_length=length, in_distribution=True)
    return peelwise.Probe.from_tokens(stream, tokens=tokens, sequence_length=length, in_distribution=True)


def prose():
    return torch.tensor(list("\n\n".join(reference_prose()).encode()))


def demo(budget, steps, kind):
    plan, model, stream = Plan(), SmallGPT(), prose()
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.rate)
    probe = probe_of(kind, stream, plan.probe_tokens, CONTEXT)
    with peelwise.Monitor(model, probe, optimizer=optimizer, budget=budget, store=None) as watching:
        shown = {}
        for step in train(watching, model, optimizer, stream, plan):
            if watching.last is not None and watching.last.step == step:
                shown[step] = watching.last.letters
    return shown, watching


def loop(model, optimizer, stream, length, budget, steps, kind, tokens):
    """Train on random windows of a stream."""
    probe = probe_of(kind, stream, tokens, length)
    with peelwise.Monitor(model, probe, optimizer=optimizer, budget=budget, store=None) as watching:
        shown = {}
        for step in range(steps):
            batch = stream[torch.randint(len(stream) - length, (example.BATCH, 1)) + torch.arange(length + 1)]
            out = model(batch[:, :-1])
            loss = F.cross_entropy(getattr(out, "logits", out).flatten(0, 1), batch[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            found = watching.step(step, loss=loss)
            optimizer.zero_grad()
            if found is not None:
                shown[step] = found.letters
    return shown, watching


def healthy(budget, steps, kind):
    model = example.SmallGPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    return loop(model, optimizer, prose(), example.CONTEXT, budget, steps, kind, TOKENS)


def starved(budget, steps, kind):
    model = example.SmallGPT()
    fed = [p for name, p in model.named_parameters() if not name.startswith(f"blocks.{example.STARVED}.")]
    optimizer = torch.optim.AdamW(fed, lr=3e-3)
    return loop(model, optimizer, prose(), example.CONTEXT, budget, steps, kind, example.TOKENS)


def small_gpt(budget, steps, kind):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(SMALL, dtype=torch.float32).train()
    stream = token_stream(AutoTokenizer.from_pretrained(SMALL), training_documents())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return loop(model, optimizer, stream, ORDINARY, budget, steps, kind, TOKENS)


def trainer(budget, steps, kind):
    """Fine-tune all weights of SmolLM2 on the reference prose, two sequences of 128 tokens a step."""
    from transformers import Trainer, TrainingArguments

    from peelwise.model.checkpoints import open_model

    opened = open_model("smollm2", dtype="float32", device="cpu")
    stream = token_stream(opened.tokenizer, list(reference_prose()))
    rows = [{"input_ids": row, "labels": row} for row in stream.unfold(0, ORDINARY, ORDINARY)]
    shown = {}
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=2, learning_rate=2e-5, save_strategy="no",
            report_to="none", use_cpu=True, disable_tqdm=True, seed=torch.initial_seed() % 2**31,
        )  # fmt: skip
        made = Trainer(opened.model.train(), arguments, train_dataset=rows)
        probe = probe_of(kind, stream, TOKENS, ORDINARY)
        callback = peelwise.attach(
            made, probe, budget=budget, store=None,
            on_measurement=lambda found: shown.update({found.step: found.letters}),
        )  # fmt: skip
        made.train()
    return shown, callback.monitor


TRAININGS = {"demo": demo, "healthy": healthy, "example": starved, "small-gpt": small_gpt, "trainer": trainer}


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


def measured(name, kind, seed, budget, steps):
    torch.manual_seed(seed)
    began = time.perf_counter()
    shown, watching = TRAININGS[name](budget, steps, kind)
    return {
        "training": name, "probe": kind, "seed": seed, "budget": budget, "steps": steps,
        "share": watching.share, "seconds": time.perf_counter() - began,
        **undecided(shown, steps, len(next(iter(shown.values()), "?"))),
        "events": [[e.step, e.kind, e.block] for e in watching.events if e.level != "info"],
        "letters": {str(step): letters for step, letters in shown.items()},
    }  # fmt: skip


def means(rows):
    """Return the mean over seeds of each training, probe and budget, and in how many runs a block was red."""
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


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.01, 0.03, 0.1])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", nargs="*", default=[], help="such as healthy=3000")
    parser.add_argument("--probes", choices=["fixed", "rolling"], nargs="+", default=["fixed"])
    parser.add_argument("--trainings", choices=list(TRAININGS), nargs="+", default=list(TRAININGS))
    parser.add_argument("--name", default="undecided", help="of the result file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    steps = STEPS | {name: int(count) for name, count in (each.split("=") for each in options.steps)}
    path = RESULTS / f"{options.name}.json"
    rows = json.loads(path.read_text())["runs"] if path.exists() else []
    keys = "training", "probe", "seed", "budget", "steps"
    for name, budget, seed, kind in itertools.product(
        options.trainings, options.budgets, options.seeds, options.probes
    ):
        if (name, kind, seed, budget, steps[name]) in [tuple(row[key] for key in keys) for row in rows]:
            continue
        rows.append(measured(name, kind, seed, budget, steps[name]))
        path.write_text(json.dumps(environment() | {"means": means(rows), "runs": rows}, indent=1) + "\n")
        print({key: value for key, value in rows[-1].items() if key != "letters"}, flush=True)
    for row in means(rows):
        print(row)


if __name__ == "__main__":
    main()
