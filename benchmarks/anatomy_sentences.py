"""What can ten sentences tell of a block? Costs of 20,000 tokens of SmolLM2-135M, and many draws of ten from them.

    python benchmarks/anatomy_sentences.py [--tokens 20000] [--minutes 60]

arXiv:2603.19348 replaces each block's matrices by the mean of its neighbours' and evaluates on ten sentences. Here the
same is done on sequences of 32 tokens, all of the reference prose and drawn by number; each draw of ten of them is one
evaluation of the paper's size. Resumable: sequences are measured in pieces of 1,024 tokens, all blocks on each, and the
result file holds the cost of every block on every sequence.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np
import torch

import peelwise
from common import RESULTS, environment
from peelwise.api.inputs import open_both
from peelwise.engine.opening import checked_blocks, open_report
from peelwise.evidence.intervals import paired
from peelwise.model.guard import untouched
from peelwise.model.parts import parts_of
from peelwise.model.splice import frozen
from peelwise.tasks.anatomy.ablate import averaged

FILE = RESULTS / "anatomy_sentences.json"
SENTENCE, PIECE, DRAWN, DRAWS = 32, 32, 10, 10_000  # tokens; sequences in a piece; of a draw; how many draws
CORE, LEFT_OUT = (8, 9, 10, 11), (14, 17)


def measure(tokens: int, minutes: float) -> dict[str, Any]:
    """Return tokens and costs of every sequence that is measured: those on record, and more while there is time."""
    found = json.loads(FILE.read_text()) if FILE.exists() else {"tokens": [], "losses": [], "costs": []}
    began = time.monotonic()
    if sum(found["tokens"]) >= tokens:
        return found
    target, probe = open_both("smollm2", peelwise.ProbeOptions(tokens=57_000, sequence_length=SENTENCE), None)
    blocks, report = checked_blocks(target.model, probe), probe.report
    with untouched(target.model), frozen([m for b in blocks for m in b.linears]), torch.no_grad():
        parts = [parts_of(block) for block in blocks]
        for start in range(len(found["tokens"]), report.sequences, PIECE):
            if sum(found["tokens"]) >= tokens or time.monotonic() - began > 60 * minutes:
                break
            session = open_report(target.model, blocks, report.at(slice(start, start + PIECE)))
            trace, costs = session.report, []
            for index in range(len(blocks)):
                beside = [parts[i] for i in (index - 1, index + 1) if 0 <= i < len(blocks)]
                costs.append(session.losses(trace, averaged(parts[index], beside), index) - trace.losses)
            found["tokens"] += [int(n) for n in trace.tokens]
            found["losses"] += [round(x, 3) for x in trace.losses.tolist()]
            found["costs"] += [[round(x, 3) for x in each] for each in torch.stack(costs, dim=1).tolist()]
            kept = {key: found[key] for key in ("tokens", "losses", "costs")}
            FILE.write_text(json.dumps(environment() | summary(kept) | kept) + "\n")
            print(time.strftime("%H:%M:%S"), sum(found["tokens"]), "tokens", flush=True)
    return found


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Return what all sequences say of each block, and how often ten of them say what the paper does."""
    tokens, costs = np.array(found["tokens"], float), np.array(found["costs"])  # [sequences], [sequences, blocks]
    generator = np.random.default_rng(0)
    drawn = np.stack([generator.choice(len(tokens), DRAWN, replace=False) for _ in range(DRAWS)])
    of_draws = costs[drawn].sum(axis=1) / tokens[drawn].sum(axis=1)[:, None]  # [draws, blocks], nats per token
    order = np.argsort(-of_draws, axis=1)
    blocks = []
    for index in range(costs.shape[1]):
        whole, draws = paired(costs[:, index], tokens).interval(), of_draws[:, index]
        low, high = np.quantile(draws, [0.025, 0.975])
        blocks.append({
            "block": index, "mean": whole.mean, "low": whole.low, "high": whole.high,
            "ten_low": float(low), "ten_high": float(high), "ten_better_without": float((draws < 0).mean()),
            "ten_most_important": float((order[:, 0] == index).mean()),
        })  # fmt: skip
    inner = [i for i in range(costs.shape[1]) if 2 <= i < costs.shape[1] - 2]  # without the ends, which lead everywhere
    first = [set(np.array(inner)[np.argsort(-row[inner])][: len(CORE)].tolist()) for row in of_draws]
    return {
        "sequences": len(tokens),
        "tokens_in_all": int(tokens.sum()),
        "draws": DRAWS,
        "of_each": DRAWN,
        "blocks": [{key: round(value, 5) for key, value in each.items()} for each in blocks],
        "both_better_without": float((of_draws[:, list(LEFT_OUT)] < 0).all(axis=1).mean()),
        "any_better_without": float((of_draws < 0).any(axis=1).mean()),
        "core_among_inner_four": float(np.mean([len(each & set(CORE)) for each in first])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--minutes", type=float, default=60.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(options.tokens, options.minutes)
    print({key: value for key, value in summary(found).items() if key != "blocks"})


if __name__ == "__main__":
    main()
