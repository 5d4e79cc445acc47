"""What share of the wall time does a monitor take, against the share that was asked for?

    python benchmarks/monitor_share.py [--seconds 300] [--tokens 2400]

Trains the small GPT of examples/small_gpt on from step 600, once per budget, for so many seconds each, and notes the
share of time spent inside ``Monitor.step`` and what the visits cost.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

import peelwise
from common import write

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
from small_gpt.evaluate import token_stream  # noqa: E402
from small_gpt.text import training_documents  # noqa: E402

FOLDER = ROOT / "examples" / "small_gpt" / "checkpoints" / "step-00600"


def train(budget, seconds, tokens):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).train()
    stream = token_stream(AutoTokenizer.from_pretrained(FOLDER), training_documents())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    probe = peelwise.Probe.from_tokens(stream, tokens=tokens, in_distribution=True)
    visits, start, step, inside = [], time.perf_counter(), 0, 0.0
    with peelwise.Monitor(model, probe, optimizer=optimizer, budget=budget, store=None) as monitor:
        while time.perf_counter() - start < seconds:
            starts = torch.randint(len(stream) - 128, (16, 1))
            ids = stream[starts + torch.arange(129)]
            loss = cross_entropy(model(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            before = time.perf_counter()
            found = monitor.step(step, loss=loss)
            inside += time.perf_counter() - before
            optimizer.zero_grad()
            step += 1
            if found is not None:
                visits.append({"step": step, "kind": found.kind, "seconds": found.seconds, "letters": found.letters})
        whole = time.perf_counter() - start
    return {
        "asked": budget,
        "share": inside / whole,
        "share_of_asked": inside / whole / budget,
        "steps": step,
        "seconds": whole,
        "visits": visits,
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--tokens", type=int, default=2400)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.03, 0.05, 0.1])
    options = parser.parse_args()
    runs = [train(budget, options.seconds, options.tokens) for budget in options.budgets]
    write("monitor_share", {"probe_tokens": options.tokens, "runs": runs})


if __name__ == "__main__":
    main()
