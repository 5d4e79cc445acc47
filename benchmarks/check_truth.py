"""Does `peelwise check` name the block that was damaged? Kinds of damage on two models, one half of them held back.

    python benchmarks/check_truth.py                  # SmolLM2-135M: every case that is not done yet, then the table
    python benchmarks/check_truth.py --model small    # the small GPT
    python benchmarks/check_truth.py --seed 1 --half "held back" --blocks 19 0    # another probe
    python benchmarks/check_truth.py --damping --half "held back" --blocks 6 29   # that rival alone
    python benchmarks/check_truth.py --table          # the table of what is done

Kinds in `truth.kinds.DEVELOPMENT` were looked at while the rule of `evidence/unlike.py` was made, at blocks 4, 15 and
both ends; those of `HELD_BACK` were run after it was fixed, at other blocks and both ends. Each case is saved when it
is done, so the run can be stopped and goes on where it was; a half and a probe that were run elsewhere keep their rows
in the result. What a case computes is what `run_check` does, but that signals of weights are computed again for changed
blocks alone.

Rivals: the parts of the score and a few signals by themselves; damping what each block adds by half, without any
reference (arXiv:2512.22174), on a few hundred tokens; and every signal over depth by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from common import RESULTS, environment
from peelwise.api.inputs import open_both
from peelwise.engine.baselines import probe_unigram
from peelwise.engine.clock import Clock
from peelwise.engine.depth.gains import screened
from peelwise.engine.depth.joint import gates_of
from peelwise.engine.depth.look import both, stream_width
from peelwise.engine.depth.table import BlockWeights, block_weights, joined, pass_table, weight_table
from peelwise.engine.factors import scaled_change
from peelwise.engine.session import Session
from peelwise.evidence.unlike import THRESHOLD, deviation, named, to_screen, unlikeness, with_gains
from peelwise.evidence.verdict import default_margin
from peelwise.model.architectures import find_blocks
from peelwise.model.checkpoints import open_model
from peelwise.model.parts import parts_of
from peelwise.model.runner import Runner
from peelwise.model.trace import Trace
from peelwise.probe.options import ProbeOptions
from peelwise.probe.probe import Probe
from peelwise.records.signals import SIGNALS
from peelwise.tasks.check.settings import CHECK_TOKENS
from truth.kinds import DEVELOPMENT, HELD_BACK, Surgery, damaged
from truth.training import training_documents

OUT = Path("out/check_truth")
SMALL_CHECKPOINTS = Path(__file__).parents[1] / "examples" / "small_gpt" / "checkpoints"
BLOCKS = {
    "smollm2": {"development": (4, 15, 29, 0), "held back": (19, 6, 29, 0)},
    "small": {"development": (3, 0), "held back": (2, 4, 5, 0)},
}
UNTIED = "embedding untied, with noise"
_DAMPED_BY, _DAMPED_ON = 0.5, 256  # predicted tokens of select
# Gradients of weights and what the rule does not count: half of the time, and no part of the score.
SKIPPED = {
    *("weight_gradient_norm", "gradient_rank", "fisher_trace", "gradient_alignment"),
    *("linear_cka", "recoverability", "station_rank", "gradient_sharpness", "tokenwise_alignment"),
}
WANTED = [name for name in SIGNALS if name not in SKIPPED]
RIVALS = {
    "own evidence": lambda u, table: u.own,
    "structure": lambda u, table: np.max(list(u.structure.values()), axis=0),
    "largest t-value": lambda u, table: _largest(table, "gain_t"),
    "gain slope": lambda u, table: _largest(table, "gain_slope"),
    "channel evidence": lambda u, table: _largest(table, "gain_evidence"),
    "block influence": lambda u, table: _largest(table, "block_influence"),
    "size of weights": lambda u, table: u.structure["weight_rms"],
}


def opened(name: str, seed: int) -> tuple[nn.Module, Probe]:
    """Return a model and the tokens it is checked on: of the small GPT's training, or foreign prose."""
    if name == "smollm2":
        target, probe = open_both(name, ProbeOptions(tokens=CHECK_TOKENS, seed=seed))
        return target.model, probe
    small = open_model(SMALL_CHECKPOINTS / "step-02400")
    documents = training_documents()
    return small.model, Probe.from_text(
        documents, small.tokenizer, tokens=CHECK_TOKENS, sequence_length=64, in_distribution=True, seed=seed
    )


class Bench:
    """A model, and what does not change from case to case."""

    def __init__(self, model: nn.Module, probe: Probe) -> None:
        self.model, self.probe = model.requires_grad_(False), probe
        self.blocks = find_blocks(self.model)
        self.parts = [parts_of(block) for block in self.blocks]
        self.runner = Runner(self.model, self.blocks)
        self.traces = [self.runner.trace(part) for part in (self.probe.fit, self.probe.select, self.probe.report)]
        self.counting = probe_unigram(self.probe, self.model)
        self.weights = [self._weights(index) for index in range(len(self.blocks))]

    def _weights(self, index: int) -> BlockWeights:
        return block_weights(self.parts[index], stream_width(self.parts), WANTED)

    def case(self, changed: set[int], *, damping: bool = True) -> dict[str, Any]:
        """Return what a check says of the model as it is now, with the weights of ``changed`` not as they were.

        With ``damping`` the rival that takes half as long as the check itself is measured too.
        """
        began = time.perf_counter()
        start = min(changed, default=0)
        fit, select, report = (self.runner.refreshed(trace, start) for trace in self.traces)
        passed = pass_table(self.runner, self.parts, both(fit, select), signals=WANTED)
        weights = [self._weights(i) if i in changed else found for i, found in enumerate(self.weights)]
        table = joined(weight_table(weights, WANTED), passed)
        off = max(0.0, select.mean - self.counting)
        plain = unlikeness(table.values, len(self.blocks), [len(gates_of(parts)) for parts in self.parts], off)
        assert plain is not None
        session = Session(self.runner, report, self.probe, fit, select, Clock(1e9, self.runner.work), 0)
        gains = screened(session, [self.parts[index] for index in to_screen(plain.scores)], table)
        found = with_gains(plain, gains, default_margin(select.mean))
        rivals = {name: _rounded(rival(plain, table.values)) for name, rival in RIVALS.items()}
        taken = time.perf_counter() - began
        if damping:
            rivals["residual damping"] = _rounded(self._damped(session))
        return {
            "loss": report.mean,
            "difference": _difference(self.traces[2], report),
            "scores": [round(float(score), 3) for score in found.scores],
            "named": named(found.scores),
            "gains": {str(block): round(gain, 4) for block, gain in gains.items()},
            "rivals": rivals,
            "signals": {"|".join(key): [_digits(v) for v in row] for key, row in table.values.items()},
            "seconds": round(taken, 1),
        }

    def damped_alone(self, changed: set[int]) -> dict[str, Any]:
        """Return what the rival without a reference says of the model as it is now, and nothing else."""
        fit, select, report = (self.runner.refreshed(trace, min(changed)) for trace in self.traces)
        session = Session(self.runner, report, self.probe, fit, select, Clock(1e9, self.runner.work), 0)
        return {
            "loss": report.mean,
            "difference": _difference(self.traces[2], report),
            "changed": sorted(changed),
            "named": [],
            "scores": _rounded(self._damped(session)),
        }

    def _damped(self, session: Session) -> np.ndarray:
        """Return what half of every block's update gains, nats per token: the rival that needs no reference."""
        tokens = session.some_of_select(_DAMPED_ON)
        gains = []
        for index, parts in enumerate(self.parts):
            changes = {b.writer: scaled_change(b.writer, _DAMPED_BY) for b in parts.branches}
            gains.append(tokens.mean - tokens.mean_of(session.losses(tokens, changes, index)))
        return np.nan_to_num(np.array(gains), nan=-1e9)


def _difference(before: Trace, after: Trace) -> float:
    return float((after.losses - before.losses).sum() / after.tokens.sum())


def _largest(values: Any, signal: str) -> np.ndarray:
    rows = [[np.nan if v is None else abs(v) for v in row] for (name, _), row in values.items() if name == signal]
    return np.nanmax(np.array(rows), axis=0)


def _digits(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(v), 3) for v in values]


def at_fault(kind: str, index: int, count: int) -> set[int]:
    """Return the blocks that a kind of damage changes."""
    if kind.startswith("swapped"):
        return {index, index + 1 if index + 1 < count else index - 1}
    return {index}


@contextmanager
def healthy_as(model: nn.Module, kind: str) -> Iterator[None]:
    """Run with the model as it is, its weights rounded to bfloat16 for a dense copy, or what is no block changed."""
    damage = {"dense copy in bfloat16": _rounded_to_bfloat16, UNTIED: _untied}.get(kind)
    with nullcontext() if damage is None else damaged(model, find_blocks(model), "", -1, damage=damage):
        yield


def _rounded_to_bfloat16(s: Surgery) -> None:
    for parameter in s.model.parameters():
        s.set(parameter, parameter.to(torch.bfloat16).to(parameter.dtype))


def _untied(s: Surgery) -> None:
    """Give the head a matrix of its own, and the embedding noise: damage that is in no block."""
    embedding, head = s.model.get_input_embeddings(), s.model.get_output_embeddings()
    s.put(head, "weight", nn.Parameter(head.weight.detach().clone(), requires_grad=False))
    s.set(embedding.weight, embedding.weight + 0.5 * s.noise_like(embedding.weight))


def healthy_small(seed: int) -> Iterator[tuple[str, Bench]]:
    """Yield the other healthy models that there are: stages of the small GPT, and one whose MLP was made twice as wide.

    The wide one computes the same: each neuron twice, at half its weight in the last layer.
    """
    model, probe = opened("small", seed)
    for stage in ("step-00100", "step-00600"):
        yield stage, Bench(open_model(SMALL_CHECKPOINTS / stage, with_tokenizer=False).model, probe)
    for block in find_blocks(model):
        for linear in block.linears:
            layer = linear.module
            if linear.name.endswith(("up_proj", "gate_proj")):
                layer.weight = nn.Parameter(torch.cat([layer.weight, layer.weight]))
                layer.out_features *= 2
            elif linear.name.endswith("down_proj"):
                layer.weight = nn.Parameter(torch.cat([layer.weight, layer.weight], dim=1) / 2)
                layer.in_features *= 2
    yield "widened", Bench(model, probe)


def run(name: str, seed: int, half: str | None, blocks: Sequence[int] = (), *, damping: bool = True) -> None:
    """Run every case that is not done yet; only those at ``blocks``, if any are given, in that order."""
    (OUT / name).mkdir(parents=True, exist_ok=True)
    bench: Bench | None = None
    todo: list[tuple[str, str, int]] = [("healthy", "as packaged", -1), ("healthy", "dense copy in bfloat16", -1)]
    todo += [("elsewhere", UNTIED, -1)]
    for group, kinds in (("held back", HELD_BACK), ("development", DEVELOPMENT)):
        if half in (None, group):
            todo += [(group, kind, index) for index in blocks or BLOCKS[name][group] for kind in kinds]
    for group, kind, index in todo:
        path = _path(name, seed, group, kind, index)
        if path.exists():
            continue
        bench = bench or Bench(*opened(name, seed))
        changed = set() if index < 0 else at_fault(kind, index, len(bench.blocks))
        within = damaged(bench.model, bench.blocks, kind, index) if changed else healthy_as(bench.model, kind)
        with within:
            if group == "elsewhere":  # what comes before the blocks is another than that of the traces
                other = Bench(bench.model, bench.probe)
                found = other.case(set(), damping=False)
                found["difference"] = _difference(bench.traces[2], other.traces[2])
            else:
                found = bench.case(changed or set(range(len(bench.blocks))), damping=damping)
        _save(path, found, group, kind, index, sorted(changed), seed)
    if name == "small" and not _path(name, seed, "healthy", "widened", -1).exists():
        for kind, other in healthy_small(seed):
            _save(_path(name, seed, "healthy", kind, -1), other.case(set()), "healthy", kind, -1, [], seed)


def run_damping(name: str, seed: int, half: str, blocks: Sequence[int]) -> dict[str, float]:
    """Return how often damping every block by half finds the one at fault, among cases that cost enough."""
    (OUT / name).mkdir(parents=True, exist_ok=True)
    bench: Bench | None = None
    cases = []
    for index in blocks or BLOCKS[name][half]:
        for kind in HELD_BACK if half == "held back" else DEVELOPMENT:
            path = _path(name, seed, f"damping {half}", kind, index).with_suffix(".damping")
            if not path.exists():
                bench = bench or Bench(*opened(name, seed))
                changed = at_fault(kind, index, len(bench.blocks))
                with damaged(bench.model, bench.blocks, kind, index):
                    _save(path, bench.damped_alone(changed), half, kind, index, sorted(changed), seed)
            cases.append(json.loads(path.read_text()))
    return figures([c for c in cases if c["difference"] > default_margin(c["loss"] - c["difference"])])


def _path(name: str, seed: int, group: str, kind: str, index: int) -> Path:
    return OUT / name / f"{seed}-{group}-{kind}-{index}.json".replace(" ", "_").replace("/", "-of-")


def _save(path: Path, found: dict[str, Any], group: str, kind: str, index: int, changed: list[int], seed: int) -> None:
    found = found | {"group": group, "kind": kind, "block": index, "changed": changed, "seed": seed}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(found))
    os.replace(temporary, path)
    print(f"{group:12} {kind:26} {index:3} {found['difference']:+.3f} nats, named {found['named']}", flush=True)


def verdict(case: dict[str, Any], scores: list[float]) -> tuple[float, float, float, bool]:
    """Return whether the block at fault is first, within one block, its area under the curve, and if it is named.

    Of several blocks with the highest score each is first by a share: a signal that is the same everywhere finds none.
    """
    changed, s = set(case["changed"]), np.array(scores)
    highest = np.flatnonzero(s == s.max())
    first = float(np.mean([i in changed for i in highest]))
    within = float(np.mean([any(abs(i - j) <= 1 for j in changed) for i in highest]))
    worst = max(changed, key=lambda i: s[i])
    others = np.array([s[i] for i in range(len(s)) if i not in changed])
    area = float((s[worst] > others).mean() + 0.5 * (s[worst] == others).mean())
    return first, within, area, bool(changed & set(case["named"]))


def figures(cases: list[dict[str, Any]], rival: tuple[str, str] | None = None) -> dict[str, float]:
    """Return the shares of cases in which the block was found; for a rival, by its key and name."""
    rows = [verdict(case, case[rival[0]][rival[1]] if rival else case["scores"]) for case in cases]
    first, within, area, name = (float(np.mean(column)) for column in zip(*rows, strict=True))
    found = {"cases": len(cases), "first": round(first, 3), "within_one": round(within, 3), "area": round(area, 3)}
    return found if rival else found | {"named": round(name, 3)}


def signals_alone(case: dict[str, Any]) -> dict[str, list[float]]:
    """Return for every signal over depth how far each block stands out in it alone, over all parts that have it."""
    found: dict[str, list[np.ndarray]] = {}
    for key, row in case["signals"].items():
        signal = SIGNALS[key.split("|")[0]]
        values = np.array([np.nan if v is None else v for v in row])
        found.setdefault(signal.name, []).append(np.nan_to_num(deviation(values, signal)[0]))
    return {name: [float(v) for v in np.max(rows, axis=0)] for name, rows in found.items()}


def table(name: str) -> dict[str, Any]:
    """Return what all cases of a model that cost more than the margin say together, by seed of the probe and half."""
    cases = [json.loads(path.read_text()) for path in sorted((OUT / name).glob("*.json"))]
    result: dict[str, Any] = {"threshold": THRESHOLD, "tokens": CHECK_TOKENS}
    for seed in sorted({case["seed"] for case in cases}):
        for group in ("held back", "development"):
            own = [case for case in cases if case["group"] == group and case["seed"] == seed]
            if own:
                result[_key(group, seed, own, name)] = _half(own) | {"command": environment()["command"]}
    for group in ("healthy", "elsewhere"):  # no block is at fault
        result[group] = [
            {key: c[key] for key in ("kind", "seed", "difference", "named")} | {"highest": max(c["scores"])}
            for c in cases
            if c["group"] == group
        ]
    return result


def _key(group: str, seed: int, own: list[dict[str, Any]], name: str) -> str:
    """Return what a half of the kinds is called, with the probe and the blocks where it is not the usual or not all."""
    blocks = sorted({case["block"] for case in own})
    where = "" if set(blocks) == set(BLOCKS[name][group]) else f", blocks {' '.join(map(str, blocks))}"
    return f"{group}{f', probe {seed}' if seed else ''}{where}"


def _half(own: list[dict[str, Any]]) -> dict[str, Any]:
    costly = [c for c in own if c["difference"] > default_margin(c["loss"] - c["difference"])]
    last = len(own[0]["scores"]) - 1
    at: dict[str, list[dict[str, Any]]] = {"all": costly}
    at["inside"] = [c for c in costly if c["block"] not in (0, last)]
    at["last block"] = [c for c in costly if c["block"] == last]
    at["first block"] = [c for c in costly if c["block"] == 0]
    for case in costly:
        case["alone"] = signals_alone(case)
    return {
        **{where: figures(some) for where, some in at.items() if some},
        "cost too little": len(own) - len(costly),
        "other blocks named": sum(len(set(c["named"]) - set(c["changed"])) for c in costly),
        "rivals": {
            rival: figures([case for case in costly if rival in case["rivals"]], ("rivals", rival))
            for rival in dict.fromkeys(rival for case in costly for rival in case["rivals"])
        },
        "signals": {signal: figures(costly, ("alone", signal)) for signal in costly[0]["alone"]},
        "kinds": {k: _kind([c for c in costly if c["kind"] == k]) for k in sorted({c["kind"] for c in costly})},
        "cases": [{k: c[k] for k in ("kind", "block", "difference", "named", "seconds")} for c in costly],
    }


def _kind(cases: list[dict[str, Any]]) -> dict[str, float]:
    return figures(cases) | {"seconds": round(float(np.median([c["seconds"] for c in cases])), 1)}


def markdown(found: dict[str, Any], half: str) -> str:
    """Return the tables of the documentation: where the damage was, each rival, and each kind."""

    def line(name: str, of: dict[str, float]) -> str:
        named = f"{of['named']:.0%}" if "named" in of else ""
        seconds = f" {of['seconds']:.0f} |" if "seconds" in of else ""
        shares = f"{of['first']:.0%} | {of['within_one']:.0%} | {of['area']:.3f}"
        return f"| {name} | {of['cases']} | {shares} | {named} |{seconds}"

    part = found[half]
    places = [line(where, part[where]) for where in ("all", "inside", "last block", "first block") if where in part]
    rivals = [line(name, of) for name, of in part["rivals"].items()]
    best = sorted(part["signals"].items(), key=lambda item: -item[1]["first"])
    signals = [line(f"`{name}`", of) for name, of in best]
    kinds = [line(name, of) for name, of in part["kinds"].items()]
    return "\n\n".join("\n".join(each) for each in (places, rivals, signals, kinds))


def main() -> None:
    """Run what is asked for, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="only make the table of what is done")
    parser.add_argument("--model", choices=list(BLOCKS), default="smollm2", help="which model (default: smollm2)")
    parser.add_argument("--seed", type=int, default=0, help="of the probe (default: 0)")
    parser.add_argument("--half", choices=["development", "held back"], help="only this half of the kinds")
    parser.add_argument("--blocks", type=int, nargs="*", default=[], help="only damage at these blocks")
    parser.add_argument("--fast", action="store_true", help="without the rival that costs most, residual damping")
    parser.add_argument("--damping", action="store_true", help="only that rival; its row goes beside the others")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.damping:
        half = options.half or "held back"
        with torch.no_grad():
            row = run_damping(options.model, options.seed, half, options.blocks)
        file = RESULTS / "check_truth.json"
        result = json.loads(file.read_text())
        where = " ".join(map(str, options.blocks or BLOCKS[options.model][half]))
        key = f"residual damping, probe {options.seed}, blocks {where}"
        result["models"][options.model][half]["rivals"][key] = row | {"command": environment()["command"]}
        file.write_text(json.dumps(result, indent=1) + "\n")
        print(key, row)
        return
    if not options.table:
        with torch.no_grad():
            run(options.model, options.seed, options.half, options.blocks, damping=not options.fast)
    found = table(options.model)
    file = RESULTS / "check_truth.json"
    before = json.loads(file.read_text()) if file.exists() else {}
    known = before.get("models", {})
    result = {"models": known | {options.model: known.get(options.model, {}) | environment() | found}}
    file.write_text(json.dumps(result, indent=1) + "\n")
    for half in ("held back", "development"):
        if half in found:
            print(f"{options.model}, {half}\n\n{markdown(found, half)}\n")


if __name__ == "__main__":
    main()
