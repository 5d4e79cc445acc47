"""Train the small Llama in full precision, binary and ternary, at a good learning rate and at one far too low.

    python examples/small_gpt/low_bit.py ternary-tuned ternary-stuck

Same data, same batches, same recipe; only the format of the weights and the learning rate differ. The low-bit ones
are trained straight through the rounding (arXiv:1308.3432). Some ten minutes on one core for each run.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from train import HERE, Run, Settings, train

from peelwise.formats.signals import LowBitSignals
from peelwise.model.checkpoints import open_model
from peelwise.nn import quantize_
from peelwise.tasks.monitor.codewatch import CodeWatch


@dataclass(frozen=True)
class LowBitSettings(Settings):
    """Everything that decides the result of a run."""

    steps: int = 1200
    batch: int = 16
    early_step: int = 1200
    middle_step: int = 1200
    evaluate_every: int = 40
    form: str = "dense"
    start: str = ""  # stage of the full-precision model whose weights are taken over; without one, from scratch


# Highest learning rates. Tuned: the best of 4e-3, 1e-2 and, inside a format, 2e-2 in runs of 120 steps.
TUNED = {"dense": 4e-3, "binary": 1e-2, "ternary": 1e-2}
STUCK = 2e-4
RUNS = {
    f"{form}-{state}": LowBitSettings(form=form, peak_rate=rate)
    for form, tuned in TUNED.items()
    for state, rate in (("tuned", tuned), ("stuck", STUCK))
}
# A good rate that has decayed long before the end: stuck further down.
# The finished full-precision model taken over into ternary and trained on, and the same at a rate far too low.
_CONVERTED = LowBitSettings(form="ternary", steps=240, early_step=240, middle_step=240, warmup=20, start="step-02400")
RUNS["converted-tuned"] = replace(_CONVERTED, peak_rate=2e-3)
RUNS["converted-stuck"] = replace(_CONVERTED, peak_rate=2e-5)
RUNS["ternary-cooled"] = LowBitSettings(form="ternary", peak_rate=TUNED["ternary"], decayed_by=240, floor=0.01)


class LowBitRun(Run):
    """A training run inside a format, whose codes are watched."""

    settings: LowBitSettings
    largest_rounding = 1e-2  # a latent weight next to a threshold takes another code, which is no rounding error

    def __init__(self, settings: LowBitSettings, resume_file: Path, fresh: bool) -> None:
        super().__init__(settings, resume_file, fresh)
        self.watch = CodeWatch(self.model)
        self.watch.measure()

    def new_model(self) -> nn.Module:
        if self.settings.start:
            stage = HERE / "checkpoints" / self.settings.start
            return in_format(open_model(str(stage), device="cpu", dtype="float32").model, self.settings.form)
        return in_format(super().new_model(), self.settings.form)

    def evaluate(self, test: Tensor) -> None:
        super().evaluate(test[::4])  # a point of the curve; stages are measured on everything
        if signals := self.watch.measure():
            self.curve[-1] |= overall(self.model, signals)

    def opened(self, folder: Path) -> nn.Module:
        return open_model(str(folder), device="cpu", dtype="float32").model


def overall(model: nn.Module, signals: dict[str, LowBitSignals]) -> dict[str, float]:
    """Return the signals of all layers together: shares of all weights, the mean over scales, the sum of dead rows."""
    sizes = [model.get_submodule(name).weight.numel() for name in signals]
    layers = list(signals.values())

    def mean(values: list[float | None]) -> float:
        return round(sum(n * (v or 0.0) for n, v in zip(sizes, values, strict=True)) / sum(sizes), 6)

    return {
        "flipped": mean([s.flipped for s in layers]),
        "near_threshold": mean([s.near_threshold for s in layers]),
        "scale_drift": mean([s.scale_drift for s in layers]),
        "dead_rows": sum(s.dead_rows for s in layers),
    }


def in_format(model: nn.Module, form: str) -> nn.Module:
    """Let all linear layers but the head compute inside a format."""
    if form != "dense":
        quantize_(model, form)
    return model


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("runs", nargs="+", choices=RUNS, help="what to train", metavar="run")
    parser.add_argument("--steps", type=int, help="training steps of 2,048 tokens; default: 1200, converted 240")
    parser.add_argument("--rate", type=float, help="another highest learning rate, to try")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument(
        "--out", type=Path, default=HERE.parents[1] / "out" / "low_bit", help="a folder per run goes here"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    transformers.utils.logging.disable_progress_bar()
    if options.steps is not None and options.steps < 1:
        parser.error(f"--steps must be at least 1, got {options.steps}")
    for name in options.runs:
        settings = replace(RUNS[name], steps=options.steps or RUNS[name].steps)
        if options.rate:
            settings = replace(settings, peak_rate=options.rate)
        print(f"{name}: {settings.form}, rate {settings.peak_rate:g}")
        train(LowBitRun(settings, options.out / name / "resume.pt", fresh=False), options.out / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
