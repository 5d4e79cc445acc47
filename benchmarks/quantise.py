"""How much of the parent a model loses in low-bit formats without training, by how the codes are found.

All arms get the same tokens and are measured on the same report text, paired by sequence:

    rounding          every weight rounded to nearest, the format's own rule for scales
    parent-inputs     all layers at once for the parent's inputs: error feedback and descent, damping chosen on select
    error-feedback    one layer after the other, error feedback at damping 0.01, scales of rounding (arXiv:2210.17323)
    asymmetric        the same, with the target that makes up for the layers before it (arXiv:2504.02692)
    peelwise          `peelwise quantise`
    no-curvature      the same without weighing by the loss

Models: SmolLM2-135M as packaged (its own four-bit blocks are the parent) and the small GPT of the examples, in which
groups of 64 are of 32. Resumable: each finished arm is a row of the JSON file. Examples:

    python benchmarks/quantise.py --model small-gpt --tokens 4096 --text docstrings --seeds 0 1 2
    python benchmarks/quantise.py --formats int3:group=64 int4:group=64 --tokens 4096 --text prose
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common import RESULTS, environment
from peelwise.engine.in_order import Walk
from peelwise.engine.session import Changes, ReportSession, change_to
from peelwise.evidence.intervals import paired
from peelwise.formats.base import Encoded, Format
from peelwise.formats.membership import scaled_part
from peelwise.formats.table import parse_format
from peelwise.model.architectures import find_blocks
from peelwise.model.checkpoints import open_model
from peelwise.model.runner import Runner
from peelwise.model.trace import Trace
from peelwise.probe.options import ProbeOptions
from peelwise.probe.probe import Probe
from peelwise.probe.rows import Split
from peelwise.references.asymmetric import InputSums, Target, coded
from peelwise.references.descent import Descent
from peelwise.stats.linalg import DampedFactor
from peelwise.tasks.quantise.run import run_quantise
from peelwise.tasks.quantise.settings import QuantiseSettings

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

from small_gpt.text import training_documents  # noqa: E402

FILES = {"smollm2": RESULTS / "quantise.json", "small-gpt": RESULTS / "quantise_small.json"}
SELECT, REPORT, LENGTH = 1_024, 8_192, 128
PUBLISHED_DAMPING = 0.01
FORMATS = [f"{family}:{layout}" for family in ("int4", "int3", "int2", "ternary") for layout in ("group=64", "channel")]

Solve = Callable[[Tensor, Format, InputSums, InputSums], Encoded]


def probe_of(tokenizer: Any, text: str, tokens: int, seed: int) -> Probe:
    """Return the text: the same report and select for every number of fit tokens."""
    documents = None if text == "prose" else training_documents()
    options = ProbeOptions(tokens=2 * (tokens + SELECT + REPORT), sequence_length=LENGTH, seed=seed)
    drawn = Probe.from_options(options, tokenizer, documents=documents)
    ids, mask = (torch.cat([getattr(s, k) for s in (drawn.report, drawn.fit, drawn.select)]) for k in ("ids", "mask"))
    parts, start = [], 0
    for wanted in (REPORT, SELECT, tokens):
        weights = (mask[start:, 1:]).sum(1).cumsum(0)
        stop = start + int((weights <= wanted).sum())
        parts.append(Split(ids[start:stop], mask[start:stop]))
        start = stop
    return replace(drawn, report=parts[0], select=parts[1], fit=parts[2])


class Bench:
    """The model on one text: traces of its parts, and the losses of the parent on report."""

    def __init__(self, model: Any, tokenizer: Any, text: str, tokens: int, seed: int) -> None:
        self.probe = probe_of(tokenizer, text, tokens, seed)
        self.model = model
        self.runner = Runner(model, find_blocks(model))
        self.traces = [self.runner.trace(part) for part in (self.probe.fit, self.probe.select, self.probe.report)]
        self.session = ReportSession(self.runner, self.traces[2])
        self.linears = [linear for block in self.runner.blocks for linear in block.linears]

    def rounding(self, form: Format) -> Tensor:
        """Return the losses of rounding to nearest."""
        return self._losses({linear: change_to(linear, form.project(linear.weight())) for linear in self.linears})

    def in_order(self, form: Format, solve: Solve) -> Tensor:
        """Return the losses with every layer solved for what it gets from those before it."""
        twins = {linear: linear for linear in self.linears}
        walk = Walk(self.runner, self.runner, twins, self.traces[:2], self.traces[:2])
        for block in self.runner.blocks:
            for group, (fit, select) in walk.groups(block):
                for linear in group:
                    walk.changes[linear] = change_to(
                        linear, form.decode(solve(linear.weight().float(), form, fit, select))
                    )
            walk.leave(block)
        return self._losses(walk.changes)

    def parent_inputs(self, form: Format) -> Tensor:
        """Return the losses with every layer solved for the parent's inputs."""
        found: Changes = {}
        twins = {linear: linear for linear in self.linears}
        walk = Walk(self.runner, self.runner, twins, self.traces[:2], self.traces[:2])
        for block in self.runner.blocks:
            for group, sums in walk.groups(block):  # nothing is put in place, so these are the parent's inputs
                fit, select = (InputSums(each.zz) for each in sums)
                for linear in group:
                    W = linear.weight().float()
                    found[linear] = change_to(linear, form.decode(coded(W, Target(W), fit, select, form).encoded))
            walk.leave(block)
        return self._losses(found)

    def ours(self, form: Format, curvature: bool) -> Tensor:
        """Return the losses of `peelwise quantise`."""
        settings = QuantiseSettings(form, curvature=curvature)
        codes = run_quantise(self.model, "smollm2", None, self.probe, settings).codes
        by_name = {linear.name: linear for linear in self.linears}
        return self._losses(
            {by_name[n]: change_to(by_name[n], form.decode(encoded)) for n, (_, encoded) in codes.items()}
        )

    def _losses(self, changes: Changes) -> Tensor:
        return self.session.losses(self.traces[2], changes)


def published(asymmetric: bool) -> Solve:
    """Return error feedback as it is published: one damping, scales of rounding to nearest."""

    def solve(W: Tensor, form: Format, fit: InputSums, select: InputSums) -> Encoded:
        T, inner = W, scaled_part(form)
        assert inner is not None
        lacks = InputSums(fit.zz, fit.lost).missing(W) if asymmetric else None
        if lacks is not None:
            T = W + DampedFactor(fit.zz, PUBLISHED_DAMPING).solve_right(lacks).to(W)
        descent = Descent(fit.zz, T, inner, form.encode(W))
        descent.feed_back()
        return descent.encoded()

    return solve


ARMS: dict[str, Callable[[Bench, Format], Tensor]] = {
    "rounding": lambda bench, form: bench.rounding(form),
    "peelwise": lambda bench, form: bench.ours(form, True),
    "error-feedback": lambda bench, form: bench.in_order(form, published(False)),
    "asymmetric": lambda bench, form: bench.in_order(form, published(True)),
    "parent-inputs": lambda bench, form: bench.parent_inputs(form),
    "no-curvature": lambda bench, form: bench.ours(form, False),
}


def _rows(file: Path) -> list[dict[str, Any]]:
    return json.loads(file.read_text())["rows"] if file.is_file() else []


def _commands(file: Path) -> str | None:
    """Return the commands of the rows that are there already, but for this one."""
    own = environment()["command"]
    said = json.loads(file.read_text())["command"].split("; ") if file.is_file() else []
    return "; ".join(each for each in said if each != own) or None


def _paired(bench: Bench, report: Trace, losses: Tensor, against: Tensor) -> list[float]:
    found = bench.session.gain(losses, against).interval()
    return [round(value, 4) for value in (found.mean, found.low, found.high)]


def summary(file: Path) -> None:
    """Print damages, and how much more each arm loses than `peelwise quantise`, paired by sequence over all seeds."""
    rows = _rows(file)
    settings = dict.fromkeys((row["model"], row["text"], row["fit_tokens"], row["format"]) for row in rows)
    for setting in settings:
        own = [row for row in rows if (row["model"], row["text"], row["fit_tokens"], row["format"]) == setting]
        by_arm = {arm: {row["seed"]: row for row in own if row["arm"] == arm} for arm in ARMS}
        for arm, found in by_arm.items():
            ours = by_arm["peelwise"]
            both = [seed for seed in found if seed in ours]
            if not found:
                continue
            damage = sum(row["damage"][0] for row in found.values()) / len(found)
            cost = sum(row["processor_seconds"] for row in found.values()) / len(found)
            line = f"{setting} {arm:15} damage {damage:.4f} processor {cost:.0f} s, {len(found)} seeds"
            if both and arm != "peelwise":
                apart = [
                    a - b for s in both for a, b in zip(found[s]["per_sequence"], ours[s]["per_sequence"], strict=True)
                ]
                tokens = [t for s in both for t in found[s]["sequence_tokens"]]
                more = paired(np.array(apart), np.array(tokens, dtype=float)).interval()
                line += f"; {more.mean:+.4f} ({more.low:+.4f} to {more.high:+.4f}) above peelwise"
            print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", choices=["smollm2", "small-gpt"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4_096, 16_384])
    parser.add_argument("--text", nargs="+", default=["prose", "docstrings"], choices=["prose", "docstrings"])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--summary", action="store_true", help="print what the result file says, and measure nothing")
    arguments = parser.parse_args()
    if arguments.summary:
        summary(FILES[arguments.model])
        return
    torch.set_num_threads(arguments.threads)
    small = arguments.model == "small-gpt"
    folder = EXAMPLES / "small_gpt" / "checkpoints"
    opened = open_model(
        folder / "step-02400" if small else "smollm2", device="cpu", tokenizer=folder / "tokenizer" if small else None
    )
    for text, tokens, seed in itertools.product(arguments.text, arguments.tokens, arguments.seeds):
        bench = None
        for name, arm in itertools.product(arguments.formats, arguments.arms):
            form = parse_format(name.replace("group=64", "group=32") if small else name)
            key = {"model": arguments.model, "text": text, "seed": seed, "fit_tokens": tokens}
            key |= {"format": form.name, "arm": arm}
            if any(key.items() <= row.items() for row in _rows(FILES[arguments.model])):
                continue
            bench = bench or Bench(opened.model, opened.tokenizer, text, tokens, seed)
            _write(key | _measured(bench, form, arm))


def _measured(bench: Bench, form: Format, arm: str) -> dict[str, Any]:
    """Return the losses of one arm; per sequence too, so that arms can be compared in pairs later."""
    start, worked = time.perf_counter(), time.process_time()
    losses = ARMS[arm](bench, form)
    report = bench.traces[2]
    return {
        "tokens_fitted": bench.probe.fit.tokens,
        "tokens_selected": bench.probe.select.tokens,
        "tokens_reported": bench.probe.report.tokens,
        "parent": round(report.mean, 4),
        "loss": round(report.mean_of(losses), 4),
        "damage": _paired(bench, report, losses, report.losses),
        "seconds": round(time.perf_counter() - start, 1),
        "processor_seconds": round(time.process_time() - worked, 1),
        "per_sequence": [round(v, 3) for v in losses.tolist()],
        "sequence_tokens": [int(v) for v in report.tokens.tolist()],
    }


def _write(row: dict[str, Any]) -> None:
    file = FILES[row["model"]]
    rows = [*_rows(file), row]
    new = file.with_suffix(".new")
    new.write_text(json.dumps(environment(_commands(file)) | {"rows": rows}, indent=1) + "\n")
    new.replace(file)
    print({k: v for k, v in row.items() if k not in ("per_sequence", "sequence_tokens")}, flush=True)


if __name__ == "__main__":
    main()
