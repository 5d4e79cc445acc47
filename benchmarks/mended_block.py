"""What helps a block that was damaged in a training, once the cause is gone?

    python benchmarks/mended_block.py [--seeds 0 1 2 3 4]

The small GPT of ``peelwise demo-training``: from step 400 to 680 block 2 gets no gradient and its weights grow; then it
trains again. From there every arm sees the same batches: it trains on as it is; it begins with the weights that an
audit of that block finds (`apply_witness_`), with moments as documented or kept; the block is drawn anew; its rate is
five times the others', beside which stands such a rate of all blocks. Held-out losses are of text that is not
trained on, nothing is chosen on it, and differences are paired by sequence. What the audit costs is counted in steps of
the same training. Resumable: finished arms are kept in ``out/mended_block``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common import RESULTS, environment, rounded
from peelwise import AuditSettings, Probe, audit
from peelwise.act import apply_witness_
from peelwise.cli.demo_training import BATCH, CONTEXT, Plan, SmallGPT, _rate
from peelwise.evidence.intervals import Paired, paired
from peelwise.probe.texts import reference_prose

FILE, OUT = RESULTS / "mended_block.json", RESULTS.parents[1] / "out" / "mended_block"
PLAN = Plan()
MARKS = (0, 10, 20, 40, 80, 160, 320)  # steps after the block trains again
HELD_OUT, WINDOWS = 0.1, 256
RATE = 5.0
ARMS = (
    "training alone",
    "witness",
    "witness, moments kept",
    "block drawn anew",
    "rate of the block x 5",
    "rate of all x 5",
)


def texts() -> tuple[Tensor, Tensor]:
    """Return bytes to train on, and windows ``[w, context + 1]`` of the last tenth."""
    stream = torch.tensor(list("\n\n".join(reference_prose()).encode()))
    cut = round((1 - HELD_OUT) * len(stream))
    starts = torch.linspace(cut, len(stream) - CONTEXT - 1, WINDOWS).long()[:, None]
    return stream[:cut], stream[starts + torch.arange(CONTEXT + 1)]


@torch.no_grad()
def losses(model: nn.Module, windows: Tensor) -> list[float]:
    """Return the loss of each window, nats per byte."""
    logits = model(windows[:, :-1])
    return F.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none").mean(dim=1).tolist()


def steps(
    model: SmallGPT,
    optimizer: torch.optim.Optimizer,
    stream: Tensor,
    seed: int,
    numbers: range,
    factor: tuple[float, float] = (1.0, 1.0),
) -> float:
    """Train, with the damage while it lasts; factors are those of others and of the block. Return seconds a step."""
    began = time.process_time()
    for step in numbers:
        for group in optimizer.param_groups:
            group["lr"] = _rate(step, PLAN) * factor[group["own"]]
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        starts = torch.randint(len(stream) - CONTEXT, (BATCH, 1), generator=generator)
        batch = stream[starts + torch.arange(CONTEXT + 1)]
        F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()).backward()
        if PLAN.from_step <= step < PLAN.mended_at:
            with torch.no_grad():
                for parameter in model.blocks[PLAN.cut_off].parameters():
                    parameter.grad = None
                    parameter.mul_(1 + PLAN.growth)
        optimizer.step()
        optimizer.zero_grad()
    return (time.process_time() - began) / len(numbers)


def optimizer_of(model: SmallGPT) -> torch.optim.AdamW:
    """Return the demonstration's optimiser, with a group for the block."""
    own = list(model.blocks[PLAN.cut_off].parameters())
    others = [p for p in model.parameters() if all(p is not each for each in own)]
    return torch.optim.AdamW([{"params": others, "own": False}, {"params": own, "own": True}], lr=PLAN.rate)


def witness_of(model: SmallGPT, stream: Tensor) -> dict[str, Tensor]:
    """Return what an audit of the block alone finds on training text."""
    probe = Probe.from_tokens(stream, tokens=PLAN.audit_tokens, sequence_length=CONTEXT, in_distribution=True, seed=1)
    for index, block in enumerate(model.blocks):
        block.requires_grad_(index == PLAN.cut_off)
    report = audit(model, probe, AuditSettings(joint_rounds=0, controls=False), budget="10m")
    model.blocks.requires_grad_(True)
    prefix = f"alone/blocks.{PLAN.cut_off}."
    return {name: change for name, change in report.witness.items() if name.startswith(prefix)}


def act(arm: str, model: SmallGPT, optimizer: torch.optim.Optimizer, witness: dict[str, Tensor], seed: int) -> None:
    """Do what an arm does at the step at which the block trains again."""
    if arm.startswith("witness"):
        apply_witness_(model, witness, optimizer, kind="alone", moments="keep" if "kept" in arm else "first")
    if arm == "block drawn anew":
        torch.manual_seed(7_919 + seed)
        fresh = SmallGPT().blocks[PLAN.cut_off]
        model.blocks[PLAN.cut_off].load_state_dict(fresh.state_dict())
        for parameter in model.blocks[PLAN.cut_off].parameters():
            optimizer.state.pop(parameter, None)


def damaged(seed: int) -> dict[str, Any]:
    """Return the training of a seed where the block trains again, and what an audit finds; made unless it is there."""
    file = OUT / f"damaged-{seed}.pt"
    if not file.exists():
        stream, _ = texts()
        torch.manual_seed(seed)
        model = SmallGPT()
        optimizer = optimizer_of(model)
        seconds = steps(model, optimizer, stream, seed, range(PLAN.mended_at))
        began = time.process_time()
        witness = witness_of(model, stream)
        found = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "witness": witness,
                 "seconds_of_a_step": seconds, "seconds_of_the_audit": time.process_time() - began}  # fmt: skip
        OUT.mkdir(parents=True, exist_ok=True)
        torch.save(found, file)
    kept: dict[str, Any] = torch.load(file, weights_only=True)
    return kept


def curve_of(arm: str, seed: int, before: dict[str, Any]) -> dict[str, list[float]]:
    """Return the held-out losses of an arm, window by window, at every mark."""
    stream, windows = texts()
    model = SmallGPT()
    model.load_state_dict(before["model"])
    optimizer = optimizer_of(model)
    optimizer.load_state_dict(before["optimizer"])
    act(arm, model, optimizer, before["witness"], seed)
    factor = {"rate of the block x 5": (1.0, RATE), "rate of all x 5": (RATE, RATE)}.get(arm, (1.0, 1.0))
    curve, at = {0: losses(model, windows)}, 0
    for mark in MARKS[1:]:
        steps(model, optimizer, stream, seed, range(PLAN.mended_at + at, PLAN.mended_at + mark), factor)
        curve[mark], at = losses(model, windows), mark
    return {str(mark): [round(x, 5) for x in each] for mark, each in curve.items()}


def summary(runs: dict[str, Any]) -> dict[str, Any]:
    """Return means over seeds, differences from training alone, and how long that takes to be as good."""
    found: dict[str, Any] = {"audit_in_steps": statistics.mean(
        run["seconds_of_the_audit"] / run["seconds_of_a_step"] for run in runs.values())}  # fmt: skip
    for arm in ARMS:
        curves = [run["curves"][arm] for run in runs.values()]
        alone = [run["curves"]["training alone"] for run in runs.values()]
        row: dict[str, Any] = {"held_out": {}, "minus_training_alone": {}, "better_on_seeds": {}}
        for mark in map(str, MARKS):
            pairs = [(own[mark], other[mark]) for own, other in zip(curves, alone, strict=True)]
            each = [paired([a - b for a, b in zip(x, y, strict=True)], [1.0] * len(x)).interval() for x, y in pairs]
            means = [one.mean for one in each]
            row["held_out"][mark] = statistics.mean(statistics.mean(x) for x, _ in pairs)
            row["better_on_seeds"][mark] = sum(one.high < 0 for one in each)
            if len(means) > 1:
                one = paired(means, [1.0] * len(means))
                over = Paired(one.mean, one.standard_error, one.sequences).interval()
                row["minus_training_alone"][mark] = {"mean": over.mean, "low": over.low, "high": over.high}
        row["at_equal_cost"] = _at_equal_cost(arm, runs)
        row["steps_of_training_alone_to_its_start"] = [
            _reached(own, other) for own, other in zip(curves, alone, strict=True)
        ]
        found[arm] = row
    return found


def _at_equal_cost(arm: str, runs: dict[str, Any]) -> dict[str, Any]:
    """Return an arm minus training alone where both have cost the same: the audit's steps are taken off a witness's."""
    audits = [run["seconds_of_the_audit"] / run["seconds_of_a_step"] for run in runs.values()]
    cost = max(audits) if arm.startswith("witness") else 0.0
    mark = max(each for each in MARKS if each + cost <= MARKS[-1])
    each = [
        paired([a - b for a, b in zip(run["curves"][arm][str(mark)], run["curves"]["training alone"][str(MARKS[-1])],
                                      strict=True)], [1.0] * WINDOWS).interval()
        for run in runs.values()
    ]  # fmt: skip
    means = [one.mean for one in each]
    found: dict[str, Any] = {"mark": mark, "of": MARKS[-1], "per_seed": means, "mean": statistics.mean(means),
                             "better_on_seeds": sum(one.high < 0 for one in each)}  # fmt: skip
    if len(means) > 1:
        one = paired(means, [1.0] * len(means))
        over = Paired(one.mean, one.standard_error, one.sequences).interval()
        found |= {"low": over.low, "high": over.high}
    return found


def _reached(own: dict[str, list[float]], alone: dict[str, list[float]]) -> int | None:
    """Return after how many steps training alone is first as good as an arm is at once; ``None``: never so far."""
    goal = statistics.mean(own["0"])
    return next((mark for mark in MARKS if statistics.mean(alone[str(mark)]) <= goal), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    options = parser.parse_args()
    torch.set_num_threads(1)
    file = OUT / "curves.json"
    runs: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    for seed in map(str, options.seeds):
        for arm in ARMS:
            if arm in runs.get(seed, {"curves": {}})["curves"]:
                continue
            before = damaged(int(seed))
            run = runs.setdefault(seed, {key: before[key] for key in ("seconds_of_a_step", "seconds_of_the_audit")})
            run.setdefault("curves", {})[arm] = curve_of(arm, int(seed), before)
            file.write_text(json.dumps(runs) + "\n")
            print(seed, arm, round(statistics.mean(run["curves"][arm][str(MARKS[-1])]), 4), flush=True)
    whole = {seed: run for seed, run in runs.items() if set(ARMS) <= set(run["curves"])}
    result = environment() | {"seeds": sorted(map(int, whole)), "arms": rounded(summary(whole))}
    FILE.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
