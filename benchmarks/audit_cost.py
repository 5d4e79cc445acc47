"""What an audit costs, as ratios within one run: statistics pass, block round, anytime curve, peak memory.

Example: python benchmarks/audit_cost.py --tokens 2048 --repetitions 3
"""

import argparse
import math
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

import peelwise
from common import earlier, interleaved, median_ratio, write
from peelwise.engine.clock import Clock
from peelwise.engine.refine import take_round, unrefined
from peelwise.engine.session import Session
from peelwise.engine.sweep import block_moments, sweep
from peelwise.model.architectures import find_blocks
from peelwise.model.checkpoints import open_model
from peelwise.model.guard import untouched
from peelwise.model.runner import Runner
from peelwise.model.trace import Trace
from peelwise.probe.probe import Probe
from peelwise.probe.rows import Split
from peelwise.probe.texts import reference_prose

SMALL = sorted((Path(__file__).parents[1] / "examples/small_gpt/checkpoints").glob("step-*"))[-1]
GOAL = 1.7


def bare(model: torch.nn.Module, split: Split, per_batch: int) -> None:
    """Forward and backward as in training, weight gradients included."""
    for rows in range(0, split.sequences, per_batch):
        logits = model(split.inputs[rows : rows + per_batch], use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1), split.targets[rows : rows + per_batch].flatten()).backward()
    model.zero_grad(set_to_none=True)


def statistics_pass(model: torch.nn.Module, split: Split, *, with_F: bool) -> None:
    """All sums of all blocks: one forward, one backward by blocks, S, C and, if asked, F."""
    with untouched(model):
        runner = Runner(model, find_blocks(model))
        trace = runner.trace(split)
        above = [runner.tail_gradients(trace)]
        for block in reversed(runner.blocks):
            _, above = block_moments(runner, block, trace, above, keep=True, with_F=with_F)


def pass_ratios(source: str, tokens: int, repetitions: int) -> dict[str, object]:
    """Ratios of the statistics pass to a bare forward and backward on the same tokens."""
    opened = open_model(source, dtype="float32", device="cpu")
    probe = Probe.from_text(reference_prose(), opened.tokenizer, tokens=2 * tokens)
    model, split = opened.model, probe.fit
    per_batch = Runner(model, find_blocks(model)).micro_batch_tokens // split.inputs.shape[1]
    times = interleaved(
        {
            "bare": partial(bare, model.train(), split, per_batch),
            "with S, C": partial(statistics_pass, model, split, with_F=False),
            "with S, C, F": partial(statistics_pass, model, split, with_F=True),
        },
        repetitions,
    )
    return {
        "model": opened.name,
        "tokens": split.tokens,
        "goal_at_most": GOAL,
        "ratio_S_C": median_ratio(times, "with S, C", "bare"),
        "ratio_S_C_F": median_ratio(times, "with S, C, F", "bare"),
        "median_seconds": {name: statistics.median(t) for name, t in times.items()},
    }


def bare_from(runner: Runner, index: int, trace: Trace) -> None:
    """Forward and backward from the cached input of one block, as training that block alone would."""
    weights = [m.module.weight for m in runner.blocks[index].linears]
    for batch in trace.batches:
        hidden = batch.stations[index]
        for block in runner.blocks[index:]:
            hidden = runner.run_block(block, hidden, batch)
        logits = runner.logits(batch, hidden)
        loss = F.cross_entropy(logits[batch.weights], batch.targets[batch.weights], reduction="sum")
        torch.autograd.grad(loss, weights)


def block_round(session: Session, index: int) -> None:
    """One round of one block: sums from the top down to it, both directions, and the search for the step."""
    (proposals,) = sweep(session.runner, session.fit, session.select, only=[index])
    take_round(session, unrefined(session.select, index), proposals, output_changes={})


def round_ratios(source: str, tokens: int, repetitions: int) -> list[dict[str, object]]:
    """Ratios of one round of a block to a bare forward and backward from that block on the same fit tokens."""
    opened = open_model(source, dtype="float32", device="cpu")
    probe = Probe.from_text(reference_prose(), opened.tokenizer, tokens=2 * tokens)
    opened.model.requires_grad_(False)
    blocks, rows = find_blocks(opened.model), []
    for index in (0, len(blocks) // 2, len(blocks) - 1):
        weights = [m.module.weight.requires_grad_(True) for m in blocks[index].linears]
        runner = Runner(opened.model, blocks)
        fit, select, report = (runner.trace(part) for part in (probe.fit, probe.select, probe.report))
        session = Session(runner, report, probe, fit, select, Clock(math.inf, runner.work), probe.seed)
        times = interleaved(
            {"bare": partial(bare_from, runner, index, fit), "round": partial(block_round, session, index)}, repetitions
        )
        for weight in weights:
            weight.requires_grad_(False)
        rows.append({"model": opened.name, "block": index, "ratio": median_ratio(times, "round", "bare")})
    return rows


def anytime_curve(budgets: list[float]) -> list[dict[str, object]]:
    """What an audit of the small GPT has found within several budgets."""
    opened = open_model(SMALL)
    probe = Probe.from_text(reference_prose(), opened.tokenizer, tokens=24_000, in_distribution=True)
    rows = []
    for budget in budgets:
        record = peelwise.audit(opened.model, probe, budget=budget).record
        found = [b.recoverable_nats.mean for b in record.blocks if b.recoverable_nats]
        rows.append(
            {
                "budget_seconds": budget,
                "wall_seconds": record.cost.wall_seconds,
                "forward_equivalents": record.cost.forward_equivalents,
                "composed_gain_nats": record.loss.composed_gain and record.loss.composed_gain.mean,
                "blocks_unique": sum(b.unique_nats is not None for b in record.blocks),
                "blocks_alone": len(found),
                "mean_alone_nats": statistics.mean(found) if found else None,
                "complete": record.complete,
            }
        )
    return rows


def peak_memory(tokens: int) -> dict[str, float]:
    """Peak resident memory of a process that runs the model, and of one that audits it."""
    forward = "import torch; torch.no_grad().__enter__(); o.model(p.report.inputs[:8], use_cache=False)"
    audit = "peelwise.audit(o.model, p, peelwise.AuditSettings(900, joint_rounds=1, solo_rounds=0))"
    peaks = {name: _peak(code, tokens) for name, code in {"model": forward, "audit": audit}.items()}
    return {**peaks, "ratio": peaks["audit"] / peaks["model"]}


def _peak(code: str, tokens: int) -> float:
    # Opening a GGUF file takes more memory than running the model; the high-water mark is set back after it.
    program = (
        "import peelwise, re\nfrom pathlib import Path\nfrom peelwise.model.checkpoints import open_model\n"
        "from peelwise.probe.texts import reference_prose\no = open_model('smollm2')\n"
        f"p = peelwise.Probe.from_text(reference_prose(), o.tokenizer, tokens={tokens})\n"
        "Path('/proc/self/clear_refs').write_text('5')\n"
        f"{code}\n"
        "kib = re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text()).group(1)\n"
        "print('peak', 1024 * int(kib))"
    )
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True)
    return float(out.stdout.split("peak")[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--budgets", type=float, nargs="*", default=[5, 15, 45, 120])
    parser.add_argument("--only", nargs="*", help="measure these parts again and keep the others of the result file")
    arguments = parser.parse_args()
    tokens, repetitions = arguments.tokens, arguments.repetitions
    models = (("smollm2", tokens), (str(SMALL), 8 * tokens))
    parts: dict[str, Callable[[], object]] = {
        "statistics_pass": lambda: [pass_ratios(source, n, repetitions) for source, n in models],
        "block_round": lambda: [row for source, n in models for row in round_ratios(source, n, repetitions)],
        "anytime_small_gpt": lambda: anytime_curve(arguments.budgets),
        "peak_bytes_smollm2": lambda: peak_memory(3200),
    }
    wanted = arguments.only or list(parts)
    kept = earlier("audit_cost") if arguments.only else {}
    result = {name: parts[name]() if name in wanted else kept[name] for name in parts}
    write("audit_cost", result, before=kept.get("command"))


if __name__ == "__main__":
    main()
