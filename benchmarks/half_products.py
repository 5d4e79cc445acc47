"""What would products in bfloat16 save of a sweep, where the processor has them? SmolLM2-135M, one thread.

    python benchmarks/half_products.py [--tokens 1024] [--repeats 5]

Only what proposes could be computed so: the sums ``C = sum g x^T`` (``S`` and ``F`` in bfloat16 are no longer positive
semi-definite), and the passes forward and back that the gradients come from. For one block: processor seconds in
float32 and in bfloat16 in turn, medians, and how far apart the results are. What that is of an audit follows from
``benchmarks/results/audit_stages.json``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

import peelwise
from common import RESULTS, environment
from peelwise.api.inputs import open_both
from peelwise.engine.opening import checked_blocks
from peelwise.model.guard import untouched
from peelwise.model.runner import Runner

FILE, BLOCK = RESULTS / "half_products.json", 15


def processor_seconds(action: Callable[[], Any]) -> float:
    """Return the processor seconds that an action takes: other work on the machine hardly moves them."""
    began = time.process_time()
    action()
    return time.process_time() - began


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the relative distance of two results in the Frobenius norm."""
    return float((one.float() - other.float()).norm() / one.float().norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    target, probe = open_both("smollm2", peelwise.ProbeOptions(tokens=2 * options.tokens), None)
    runner = Runner(target.model, checked_blocks(target.model, probe), micro_batch_tokens=options.tokens)
    block = runner.blocks[BLOCK]
    with untouched(target.model):
        trace = runner.trace(probe.fit)
        above = runner.tail_gradients(trace)
        for other in reversed(runner.blocks[BLOCK + 1 :]):
            above = [runner.block_gradients(other, trace.batches[0], [above[0]])[1][0][0]]

        def pass_back() -> Any:
            return runner.block_gradients(block, trace.batches[0], [above[0]])

        capture, ((_, grads),) = pass_back()
        pairs = [(grads[m][0].flatten(0, -2), capture.calls[m][0].x.detach().flatten(0, -2)) for m in grads]

        def products(dtype: torch.dtype) -> list[torch.Tensor]:
            return [g.to(dtype).T @ x.to(dtype) for g, x in pairs]

        def narrow() -> Any:
            runner.autocast = torch.bfloat16
            try:
                return pass_back()
            finally:
                runner.autocast = None

        times: dict[str, list[float]] = {"C": [], "C in bfloat16": [], "passes": [], "passes in bfloat16": []}
        for _ in range(options.repeats):
            for name, action in (
                ("C", lambda: products(torch.float32)), ("C in bfloat16", lambda: products(torch.bfloat16)),
                ("passes", pass_back), ("passes in bfloat16", narrow),
            ):  # fmt: skip
                times[name].append(processor_seconds(action))
        both = zip(products(torch.float32), products(torch.bfloat16), strict=True)
        _, ((_, narrowed),) = narrow()
        found = {
            "tokens": probe.fit.tokens,
            "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
            "median processor seconds of one block": {name: round(median(each), 4) for name, each in times.items()},
            "relative distance of C": round(max(apart(a, b) for a, b in both), 5),
            "relative distance of gradients": round(max(apart(grads[m][0], narrowed[m][0]) for m in grads), 4),
        }
    FILE.write_text(json.dumps(environment() | found, indent=1) + "\n")
    print(found)


if __name__ == "__main__":
    main()
