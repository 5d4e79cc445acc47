"""Ternary GPTs stuck at a low learning rate: the loss curve, the audit, peel maps, and signals of their codes.

    python examples/low_bit.py                      # the committed ternary models; some fifteen minutes on one core
    python examples/low_bit.py --draw               # the figure alone, from the numbers measured before

The runs are those of examples/small_gpt/low_bit.py: same tokens, same recipe, other learning rates. Each finished model
is audited on its training text, at its own bits; what the audit wins is applied and measured again on held-out text.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

import peelwise
from peelwise.evidence.intervals import paired
from peelwise.model.checkpoints import open_model
from peelwise.nn import dense_
from peelwise.records.audit import AuditRecord
from peelwise.records.base import Interval

matplotlib.use("Agg")
from matplotlib import pyplot as plt

matplotlib.rcParams["svg.hashsalt"] = "peelwise"  # the same file at every run
HERE = Path(__file__).resolve().parent
GPT = HERE / "small_gpt"
sys.path.insert(0, str(HERE))  # run from anywhere

from small_gpt.evaluate import token_losses, token_stream, windows  # noqa: E402
from small_gpt.text import held_out_documents, training_documents  # noqa: E402

CPU = peelwise.OpenOptions(device="cpu")
CONVERTED = ("converted-tuned", "converted-stuck")  # a full-precision model converted to ternary and fine-tuned
FROM_SCRATCH = (
    *(f"{form}-{state}" for form in ("dense", "binary", "ternary") for state in ("tuned", "stuck")),
    "ternary-cooled",
)
MEASURED = (*CONVERTED, "ternary-tuned", "ternary-stuck", "ternary-cooled")
MARKERS = {"tuned": ("C2", "o"), "stuck": ("C3", "s"), "cooled": ("C4", "^")}
COLOURS = {"dense": "k", "binary": "C0", "ternary": "C1", "converted": "C1"}
LINES = {"tuned": "-", "stuck": "--", "cooled": ":"}
CONTEXT = 127  # a sequence of the probe is what the model was trained on: 128 tokens


def measure(folder: Path, run: str, options: argparse.Namespace) -> dict[str, Any]:
    """Audit a finished model on training text, apply the witness, and see what it does on held-out text."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(GPT / "checkpoints" / "tokenizer")
    rows = drawn(windows(token_stream(tokenizer, training_documents()), CONTEXT), options.tokens // 128)
    probe = peelwise.Probe.from_tokens(rows, tokens=None, in_distribution=True, source="training text")
    held_out = windows(token_stream(tokenizer, held_out_documents()), CONTEXT)[:: options.every]
    report = peelwise.audit(
        folder, probe, peelwise.AuditSettings(options.budget, options.rounds, solo_rounds=1), opening=CPU, name=run
    )
    print(report)
    before = losses(open_model(folder, device="cpu", with_tokenizer=False).model, held_out)
    after = before
    if report.record.loss.composed_gain is not None and any(k.startswith("composed/") for k in report.witness):
        with tempfile.TemporaryDirectory() as scratch:
            certificate = report.save(Path(scratch) / "certificate")
            print(peelwise.verify(certificate, folder, opening=CPU).status)
            peelwise.apply(certificate, folder, Path(scratch) / "applied")
            after = losses(open_model(Path(scratch) / "applied", device="cpu", with_tokenizer=False).model, held_out)
    per_sequence = [CONTEXT] * len(held_out)
    gain = paired((before - after).sum(1).tolist(), per_sequence).interval()
    found = {
        "audit": of_audit(report.record),
        "held_out": {"current": round(float(before.mean()), 4), "gain": of(gain)},
        "steps": worth(curve(run), curve(run.split("-")[0] + "-tuned"), max(0.0, gain.mean)),
    }
    peel = peelwise.peel(folder, probe, peelwise.PeelSettings(options.budget, maps(folder), rounds=1), name=run)
    print(peel)
    loss = peel.record.loss
    found["peel"] = {
        "bound": loss.bound,
        "head_control": loss.head_control,
        "over_head_control": of(loss.over_head_control),
        "shuffled": loss.shuffled,
        "untrained": loss.untrained,
        "conclusion": peel.conclusion,
    }
    return found


def parts(folder: Path, options: argparse.Namespace) -> dict[str, list[float]]:
    """Train parts of the finished model alone, in full precision: held-out loss before and after 20, 40 and 60 steps.

    What no witness finds in the blocks may not be there, or may not have been found. This tells which: it is slow, and
    takes training text and steps that a witness does without.
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(GPT / "checkpoints" / "tokenizer")
    stream = token_stream(tokenizer, training_documents())
    held_out = windows(token_stream(tokenizer, held_out_documents()), CONTEXT)[:: 3 * options.every]
    found = {}
    for part in ("maps of the blocks", "embedding, head and gains"):
        model = open_model(folder, device="cpu", with_tokenizer=False).model
        dense_(model)
        chosen = [p for name, p in model.named_parameters() if ("_proj" in name) == part.startswith("maps")]
        optimiser = torch.optim.AdamW(chosen, betas=(0.9, 0.95), weight_decay=0.0)
        found[part] = [round(float(losses(model, held_out).mean()), 4)]
        for step in range(60):
            optimiser.param_groups[0]["lr"] = 5e-3 * min(1.0, (step + 1) / 10, (60 - step) / 20)
            starts = torch.randint(len(stream) - 128, (16, 1), generator=torch.Generator().manual_seed(step))
            model.zero_grad()
            token_losses(model, stream[starts + torch.arange(129)]).mean().backward()
            optimiser.step()
            if step % 20 == 19:
                found[part].append(round(float(losses(model, held_out).mean()), 4))
        print(part, found[part])
    return found


def drawn(rows: Tensor, count: int) -> Tensor:
    """Return ``count`` rows in random order, the same at every run."""
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:count]]


def maps(folder: Path) -> list[tuple[int, ...]]:
    """The model itself, everything to the last station, and first and last."""
    layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    return [tuple(range(1, layers + 1)), (layers,) * layers, (1, *(layers,) * (layers - 1))]


@torch.no_grad()
def losses(model: nn.Module, rows: Tensor) -> Tensor:
    """Return ``[rows, tokens]`` losses in nats, float64."""
    model.eval()
    parts = [token_losses(model, part).double().view(len(part), -1) for part in rows.split(32)]
    return torch.cat(parts)


def of(interval: Interval | None) -> list[float] | None:
    return None if interval is None else [round(v, 4) for v in (interval.mean, interval.low, interval.high)]


def of_audit(record: AuditRecord) -> dict[str, Any]:
    loss = record.loss
    return {
        "tokens": [record.probe.fit_tokens, record.probe.select_tokens, record.probe.report_tokens],
        "complete": record.complete,
        "current": loss.current,
        "composed_gain": of(loss.composed_gain),
        "shuffled_gain": of(loss.shuffled_gain),
        "untrained_gain": of(loss.untrained_gain),
        "split": None if loss.split is None else {k: round(v, 4) for k, v in loss.split.model_dump().items()},
        "price": of(loss.price),
        "head_alone": of(record.head.recoverable_nats) if record.head else None,
        "verdicts": [block.verdict for block in record.blocks],
        "alone": [of(block.recoverable_nats) for block in record.blocks],
        "margin": record.margin_nats,
        "seconds": round(record.cost.wall_seconds),
    }


def curve(run: str) -> list[dict[str, float]]:
    """Return the points of a run's loss curve."""
    points: list[dict[str, float]] = json.loads((GPT / "low_bit" / run / "training.json").read_text())["curve"]
    return points


def worth(own: list[dict[str, float]], tuned: list[dict[str, float]], nats: float) -> dict[str, float]:
    """Return how many steps ``nats`` are worth: at the slope that the run ends with, and on the tuned curve."""
    last, then = own[-1], own[len(own) * 2 // 3]
    slope = (then["held_out"] - last["held_out"]) / (last["step"] - then["step"])
    reached = step_at(tuned, last["held_out"])
    return {
        "slope_per_step": round(slope, 7),
        "at_own_slope": round(nats / slope, 1),
        "tuned_steps_to_this_loss": round(reached, 1),
        "on_the_tuned_curve": round(step_at(tuned, last["held_out"] - nats) - reached, 1),
    }


def step_at(points: list[dict[str, float]], loss: float) -> float:
    """Return the step at which a curve first comes down to ``loss``, by straight lines between its points."""
    for one, two in pairwise(points):
        if two["held_out"] <= loss < one["held_out"]:
            share = (one["held_out"] - loss) / (one["held_out"] - two["held_out"])
            return one["step"] + share * (two["step"] - one["step"])
    return points[0]["step"] if loss >= points[0]["held_out"] else points[-1]["step"]


def draw(results: dict[str, Any], path: Path) -> None:
    figure = plt.figure(figsize=(10.5, 9.5))
    grid = figure.add_gridspec(3, 2, height_ratios=(3, 2.4, 2.4))
    left, right = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1])
    draw_curves(left, CONVERTED, "A trained model, converted to ternary and fine-tuned")
    draw_curves(right, FROM_SCRATCH, "From scratch: same tokens, other formats and rates")
    left = figure.add_subplot(grid[1, 0])
    right = figure.add_subplot(grid[1, 1], sharex=left)
    draw_gains(left, results, CONVERTED)
    draw_gains(right, results, [run for run in FROM_SCRATCH if run in MEASURED])
    right.tick_params(labelleft=False)
    draw_signals(figure.add_subplot(grid[2, :]))
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def draw_curves(axes: plt.Axes, runs: Sequence[str], title: str) -> None:
    for run in runs:
        form, state = run.split("-")
        steps, values = zip(*((p["step"], p["held_out"]) for p in curve(run)), strict=True)
        axes.plot(steps, values, LINES[state], color=COLOURS[form], label=run)
    axes.set(xlabel="training step", ylabel="held-out loss, nats per token")
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8, ncols=2)


def draw_signals(axes: plt.Axes) -> None:
    for state, line in LINES.items():
        points = curve(f"ternary-{state}")
        steps = [p["step"] for p in points]
        for key, colour in (("flipped", "C0"), ("near_threshold", "C2"), ("scale_drift", "C4")):
            label = f"{key.replace('_', ' ')}, {state}"
            axes.plot(steps, [max(p[key], 1e-6) for p in points], line, color=colour, label=label)
    axes.set(yscale="log", ylim=(1e-5, 30), xlabel="training step", ylabel="share of codes; relative change")
    axes.set_title("Ternary codes from scratch: changes in the last 40 steps", fontsize=10)
    axes.legend(fontsize=7, ncols=3, loc="upper center")


def draw_gains(axes: plt.Axes, results: dict[str, Any], runs: Sequence[str]) -> None:
    """What each construction gains: witnesses, null controls, the head."""
    rows = {
        "blocks, same bits": lambda r: r["audit"]["composed_gain"],
        "the same, held-out text": lambda r: r["held_out"]["gain"],
        "head alone": lambda r: r["audit"]["head_alone"],
        "peel map over head control": lambda r: r["peel"]["over_head_control"],
        "control: shuffled targets": lambda r: r["audit"]["shuffled_gain"],
        "control: the untrained model's": lambda r: r["audit"]["untrained_gain"],
    }
    there = [run for run in runs if "audit" in results.get(run, {})]
    for number, run in enumerate(there):
        colour, marker = MARKERS[run.split("-")[1]]
        place = 0.22 * (number - (len(there) - 1) / 2)
        found = [(i + place, get(results[run])) for i, get in enumerate(rows.values())]
        if not any(v for _, v in found):
            continue
        places, values = zip(*((i, v) for i, v in found if v is not None), strict=True)
        errors = [[v[0] - v[1] for v in values], [v[2] - v[0] for v in values]]
        axes.errorbar([v[0] for v in values], places, xerr=errors, fmt=marker, ms=5, color=colour, capsize=3, label=run)
        axes.axvline(results[run]["audit"]["margin"], color=colour, linestyle=":", linewidth=0.9)
    axes.axvline(0, color="0.4", linewidth=0.8)
    axes.set(xlabel="gain, nats per token, 95 %; dotted: the margins")
    axes.set_yticks(range(len(rows)), list(rows), fontsize=8)
    axes.invert_yaxis()
    if there:
        axes.legend(fontsize=8, loc="center right")


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description="Audit low-bit models that were trained well and stuck.")
    parser.add_argument("runs", nargs="*", help=f"default: {' '.join(MEASURED)}")
    parser.add_argument("--models", type=Path, default=GPT / "low_bit", help="where the folders of the runs are")
    parser.add_argument("--tokens", type=int, default=16_000)
    parser.add_argument("--rounds", type=int, default=4, help="most joint rounds")
    parser.add_argument("--budget", default="6m", help="of each audit and each peel")
    parser.add_argument("--every", type=int, default=4, help="of so many held-out windows one is used")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "figures")
    parser.add_argument("--results", type=Path, default=HERE.parent / "benchmarks" / "results")
    parser.add_argument(
        "--parts", action="store_true", help="train parts of the models alone instead; some minutes each"
    )
    parser.add_argument("--draw", action="store_true", help="draw the figure from the numbers that are there")
    options = parser.parse_args(arguments)
    for folder in (options.out, options.results):
        folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    path = options.results / "low_bit_training.json"
    for run in [] if options.draw else options.runs or MEASURED:
        folder = options.models / run
        found = {"parts": parts(folder, options)} if options.parts else measure(folder, run, options)
        results = json.loads(path.read_text()) if path.exists() else {}  # read late: others may have added theirs
        results[run] = results.get(run, {}) | found
        path.write_text(json.dumps(results, indent=1) + "\n")
    results = json.loads(path.read_text()) if path.exists() else {}
    draw(results, options.out / "low-bit-training.svg")
    return results


if __name__ == "__main__":
    main()
