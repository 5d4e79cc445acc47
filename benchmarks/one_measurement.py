"""What one measurement of a monitor costs, in steps of training, and how many blocks it refines.

    python benchmarks/one_measurement.py

The GPT of `peelwise demo-training` after thirty steps, one thread, processor time, the median of five: measurements of
either kind on 1,024 tokens and on all 7,000.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch.nn import functional as F

import peelwise
from common import write
from peelwise.cli.demo_training import Plan, SmallGPT
from peelwise.model.architectures import find_blocks
from peelwise.probe.texts import reference_prose
from peelwise.tasks.monitor.measure import measure
from peelwise.tasks.monitor.sizes import part_of, tokens_of

REPETITIONS, LENGTH, SEQUENCES = 5, 64, 16


def seconds(work: Callable[[], object]) -> float:
    """Return the median processor time of some repetitions."""
    taken = []
    for _ in range(REPETITIONS):
        began = time.process_time()
        work()
        taken.append(time.process_time() - began)
    return median(taken)


def main() -> None:
    """Measure, print every row, and write the JSON."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    stream = torch.tensor(list("\n\n".join(reference_prose()).encode()))
    model = SmallGPT()
    blocks = find_blocks(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=Plan().rate)

    def train() -> None:
        starts = torch.randint(len(stream) - LENGTH, (SEQUENCES, 1))
        batch = stream[starts + torch.arange(LENGTH + 1)]
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    for _ in range(30):
        train()
    step = seconds(train)
    probe = peelwise.Probe.from_tokens(stream, tokens=Plan().probe_tokens, sequence_length=LENGTH, in_distribution=True)
    rows = []
    for tokens in (1024, tokens_of(probe)):
        few = part_of(probe, tokens)
        for kind in ("ranking", "alone"):
            found: list[Any] = []
            order = list(range(len(blocks)))
            taken = seconds(
                lambda kind=kind, few=few, found=found, order=order: found.append(
                    measure(model, blocks, few, kind, order, micro_batch_tokens=2048)
                )
            )
            row = {
                "tokens": tokens_of(few),
                "kind": kind,
                "steps_of_training": round(taken / step, 1),
                "blocks_refined": len(found[-1].alone),
                "blocks": len(blocks),
            }
            rows.append(row)
            print(row, flush=True)
    write("one_measurement", {"rows": rows})


if __name__ == "__main__":
    main()
