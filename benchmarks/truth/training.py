"""Small GPTs trained with one block at fault, and healthy ones, for the benchmark of diagnoses.

    python benchmarks/truth/training.py --help

All runs share the recipe of ``examples/small_gpt`` with half its batch and a third of its steps, so that a run takes
three minutes on one core. A finished run is kept and not repeated; an interrupted one begins again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples" / "small_gpt"))

from evaluate import token_losses, token_stream, windows  # noqa: E402
from text import held_out_documents, training_documents  # noqa: E402
from train import Settings, learning_rate, new_model, train_tokenizer  # noqa: E402

RUNS = ROOT / "out" / "truth" / "runs"
RECIPE = Settings(steps=800, early_step=200, middle_step=400, batch=16, warmup=40)
SEEDS = (101, 102, 103)
FAULTY_BLOCKS = (1, 4)
AT_FAULT_FROM = 200  # step, for a fault that begins when training is resumed


@dataclass(frozen=True)
class Fault:
    """How the training of one block goes wrong.

    Attributes:
        name: for people.
        begin: changes the fresh model.
        rate, decay: factors of the block's learning rate and weight decay at a step.
        before: changes the block's gradients before each optimiser step.
        after: changes the block's weights after each optimiser step.
    """

    name: str
    begin: Callable[[nn.Module], None] | None = None
    rate: Callable[[int], float] = lambda step: 1.0
    decay: float = 1.0
    before: Callable[[nn.Module], None] | None = None
    after: Callable[[nn.Module], None] | None = None


@torch.no_grad()
def _too_large(block: nn.Module) -> None:
    for p in block.parameters():
        if p.dim() > 1:
            p.mul_(10.0)


def _clip_to_nothing(block: nn.Module) -> None:
    nn.utils.clip_grad_norm_(block.parameters(), 1e-8)  # Adam undoes any scale above its epsilon


@torch.no_grad()
def _store_in_eight_bits(block: nn.Module) -> None:
    for p in block.parameters():
        p.copy_(p.to(torch.float8_e4m3fn).float())


FAULTS = (
    Fault("frozen", rate=lambda step: 0.0),
    Fault("left out of the optimiser", rate=lambda step: float(step < AT_FAULT_FROM)),
    Fault("learning rate / 30", rate=lambda step: 1 / 30),
    Fault("weight decay x 50", decay=50.0),
    Fault("initialised 10 times too large", begin=_too_large),
    Fault("gradients clipped to nothing", before=_clip_to_nothing),
    Fault("weights kept in float8", after=_store_in_eight_bits),
)


@dataclass(frozen=True)
class RunName:
    """Which run: a seed, and the fault of one block unless it is healthy."""

    seed: int
    fault: Fault | None = None
    block: int | None = None

    @property
    def folder(self) -> Path:
        """Where its stages lie."""
        what = (
            "healthy"
            if self.fault is None
            else f"{self.fault.name.replace(' / ', '-over-').replace(' ', '-')}-{self.block}"
        )
        return RUNS / f"{what}-seed{self.seed}"

    def stage(self, step: int) -> Path:
        """Return the weights' file after a step."""
        return self.folder / f"step-{step:05d}.safetensors"


def all_runs() -> list[RunName]:
    """Return the healthy runs, then every fault in every faulty block."""
    return [RunName(seed) for seed in SEEDS] + [
        RunName(SEEDS[0], fault, block) for fault in FAULTS for block in FAULTY_BLOCKS
    ]


@cache
def texts() -> tuple[Tensor, Tensor]:
    """Return the training text as one stream of tokens, and held-out text as windows ``[w, context + 1]``."""
    tokenizer = train_tokenizer(training_documents(), RECIPE)
    stream = token_stream(tokenizer, training_documents())
    return stream, windows(token_stream(tokenizer, held_out_documents()), RECIPE.context)


def train(run: RunName) -> None:
    """Train one run unless it is there; ``result.json`` is written last and says that it is."""
    result = run.folder / "result.json"
    if result.exists():
        return
    stream, test = texts()
    settings = replace(RECIPE, seed=run.seed)
    model = new_model(settings)
    block = None if run.block is None else model.model.layers[run.block]
    fault = run.fault or Fault("none")
    if block is not None and fault.begin is not None:
        fault.begin(block)
    optimizer = _optimizer(model, block, settings, fault)
    run.folder.mkdir(parents=True, exist_ok=True)
    model.train()
    for step in range(settings.steps):
        _step(model, block, optimizer, fault, settings, step, stream)
        if step + 1 in settings.stages:
            save_file(_own_tensors(model), run.stage(step + 1))
        if (step + 1) % 50 == 0:
            print(f"\r{run.folder.name}: step {step + 1} of {settings.steps}", end="", flush=True)
    losses = held_out_losses(model, test)
    result.write_text(json.dumps({"held_out": float(losses.mean()), "by_window": losses.tolist()}) + "\n")
    print(f"\r{run.folder.name}: {float(losses.mean()):.4f} nats per token on held-out text", flush=True)


def _optimizer(model: nn.Module, block: nn.Module | None, settings: Settings, fault: Fault) -> torch.optim.AdamW:
    own = set() if block is None else set(block.parameters())
    groups = []
    for matrices in (True, False):
        decay = settings.weight_decay if matrices else 0.0
        for faulty in (True, False):
            members = [p for p in model.parameters() if (p.dim() > 1) == matrices and (p in own) == faulty]
            factor = fault.decay if faulty else 1.0
            groups.append({"params": members, "weight_decay": decay * factor, "faulty": faulty})
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=settings.peak_rate, betas=(0.9, 0.95))


def _step(
    model: nn.Module,
    block: nn.Module | None,
    optimizer: torch.optim.AdamW,
    fault: Fault,
    settings: Settings,
    step: int,
    stream: Tensor,
) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, settings) * (fault.rate(step) if group["faulty"] else 1.0)
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
    starts = torch.randint(len(stream) - settings.context, (settings.batch, 1), generator=generator)
    token_losses(model, stream[starts + torch.arange(settings.context + 1)]).mean().backward()
    nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
    if block is not None and fault.before is not None:
        fault.before(block)
    optimizer.step()
    optimizer.zero_grad()
    if block is not None and fault.after is not None:
        fault.after(block)


def _own_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}  # a tied head is listed once


def opened(run: RunName, step: int) -> nn.Module:
    """Return the model of a stage, in evaluation mode, trained if need be; step 0 is its initialisation."""
    model = new_model(replace(RECIPE, seed=run.seed))
    if step:
        train(run)
        model.load_state_dict(load_file(run.stage(step)), strict=False)
        model.tie_weights()
    return model.eval()


def initial_of_kept(seed: int) -> nn.Module:
    """Return the initialisation of a run of ``examples/small_gpt``: its recipe's model at this seed."""
    return new_model(replace(RECIPE, seed=seed)).eval()


@torch.no_grad()
def held_out_losses(model: nn.Module, test: Tensor) -> Tensor:
    """Return the loss of every window ``[w, context + 1]`` of held-out text in nats per token."""
    model.eval()
    return torch.cat([token_losses(model, part).double().view(len(part), -1).mean(1) for part in test.split(32)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    for run in all_runs():
        train(run)


if __name__ == "__main__":
    main()
