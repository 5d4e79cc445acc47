"""One training of a small GPT under one arm: the loop, its batches, and what it cost.

Costs are seconds of the processor on one thread (``time.process_time``): other work on the machine hardly moves them.
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples" / "small_gpt"))
sys.path.insert(0, str(ROOT / "benchmarks"))

from evaluate import token_losses, token_stream, windows  # noqa: E402
from text import held_out_documents, training_documents  # noqa: E402
from train import Settings, new_model, train_tokenizer  # noqa: E402

HELD_OUT_WINDOWS = 128
CURVE = (0.5, 0.6, 0.7, 0.8, 0.9)  # of the budget, where the held-out loss is also taken
WARMUP = 0.05


@dataclass(frozen=True)
class Size:
    """How large everything is: the model, a step, and the budget in steps of the uniform arm."""

    name: str
    blocks: int
    width: int
    mlp_width: int
    batch: int
    context: int
    steps: int
    every: int  # steps from one map, witness or measurement to the next

    @property
    def settings(self) -> Settings:
        """What examples/small_gpt makes a model from."""
        return replace(Settings(), blocks=self.blocks, width=self.width, mlp_width=self.mlp_width,
                       batch=self.batch, context=self.context)  # fmt: skip


SIZES = {
    size.name: size
    for size in (
        Size("smoke", 3, 32, 64, 4, 32, 24, 6),
        Size("small", 6, 64, 176, 8, 64, 600, 100),
        Size("deep", 12, 48, 128, 8, 64, 600, 100),
    )
}


@cache
def texts(context: int) -> tuple[Tensor, Tensor]:
    """Return the training text as one stream of tokens, and held-out text as windows ``[w, context + 1]``."""
    tokenizer = train_tokenizer(training_documents(), Settings())
    stream = token_stream(tokenizer, training_documents())
    held_out = windows(token_stream(tokenizer, held_out_documents()), context)
    spread = torch.linspace(0, len(held_out) - 1, HELD_OUT_WINDOWS).long()  # from all documents
    return stream, held_out[spread]


def fresh(size: Size, seed: int) -> nn.Module:
    """Return the model of a seed before its first step."""
    return new_model(replace(size.settings, seed=seed)).train()


def batch_of(stream: Tensor, size: Size, seed: int, step: int) -> Tensor:
    """Return the tokens ``[batch, context + 1]`` of a step: the same for all arms of a seed."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(len(stream) - size.context, (size.batch, 1), generator=generator)
    return stream[starts + torch.arange(size.context + 1)]


def shape_of_rate(step: int, steps: int) -> float:
    """Return the rate of a step over the highest: linear warm-up, half a cosine down to 2 %."""
    warm = max(1, round(WARMUP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


@torch.no_grad()
def held_out_losses(model: nn.Module, test: Tensor) -> Tensor:
    """Return the loss of every window ``[w]`` in nats per token."""
    model.eval()
    found = torch.cat([token_losses(model, part).double().view(len(part), -1).mean(1) for part in test.split(32)])
    model.train()
    return found


class Loop:
    """A training as it runs, with the clock that stands still while held-out losses are taken.

    Attributes:
        model, optimizer: that train.
        base: highest rates of the optimiser's groups.
        step: steps taken so far.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, size: Size, seed: int, steps: int) -> None:
        self.model, self.optimizer, self.size, self.seed, self.steps = model, optimizer, size, seed, steps
        self.stream, self.test = texts(size.context)
        self.base = [group["lr"] for group in optimizer.param_groups]
        self.step = 0
        self.processor = self.wall = 0.0
        self.training_loss = float("nan")

    def advance(self, after_backward: Any = None) -> None:
        """Take one step."""
        for group, rate in zip(self.optimizer.param_groups, self.base, strict=True):
            group["lr"] = rate * shape_of_rate(self.step, self.steps)
        loss = token_losses(self.model, batch_of(self.stream, self.size, self.seed, self.step)).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if after_backward is not None:
            after_backward(self)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.training_loss = loss.item()

    def run(self, after_backward: Any = None, after_step: Any = None) -> list[dict[str, float]]:
        """Train to the end; return the curve of held-out losses with steps and seconds."""
        curve = []
        marks = {max(1, round(share * self.steps)) for share in CURVE} | {self.steps}
        while self.step < self.steps:
            began, began_wall = time.process_time(), time.perf_counter()
            self.advance(after_backward)
            if after_step is not None:
                after_step(self)
            self.processor += time.process_time() - began
            self.wall += time.perf_counter() - began_wall
            if self.step in marks:
                losses = held_out_losses(self.model, self.test)
                curve.append({"step": self.step, "seconds": self.processor, "held_out": float(losses.mean())})
        return curve
