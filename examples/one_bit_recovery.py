"""One-bit unrolled networks for sparse recovery: error, bits per weight, and YES bounds over training.

    python examples/one_bit_recovery.py [--out docs/figures] [--results benchmarks/results] [--quick]

Measurements ``y = A x + noise`` of sparse, non-negative ``x``; ``A`` is block-diagonal, as it is where parts of a signal are
measured apart. Twelve steps of gradient descent with a threshold are a network with weights ``W_k`` to learn:

    h_{k+1} = relu(h_k + W_k (y - A h_k) - t_k)          the last step without threshold and ReLU

``W_k`` has the support of ``A^T``, which the problem gives. One bit per weight on it and one scale for the whole network is
the format of arXiv:2502.01908. A few minutes on one core.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
from torch import Tensor, nn

from peelwise.formats.table import parse_format
from peelwise.nn import quantize_, share_scale_
from peelwise.pipeline.yes.bounds import yes_bounds
from peelwise.pipeline.yes.result import YesBounds

matplotlib.use("Agg")

matplotlib.rcParams["svg.hashsalt"] = "peelwise"  # the same file at every run
ROOT = Path(__file__).resolve().parents[1]
ONE_BIT = "binary:model,blocks=4"
FORMATS = [
    "dense",
    "dense:blocks=4",
    "ternary:tensor",
    "ternary:tensor,blocks=4",
    "ternary:channel,blocks=4",
    "binary:channel",
    "binary:channel,blocks=4",
    "binary:tensor,blocks=4",
    ONE_BIT,
]


@dataclass(frozen=True)
class Task:
    """Everything that decides the result."""

    signal: int = 96
    measured: int = 48
    blocks: int = 4
    density: float = 0.1  # share of entries that are not zero
    noise: float = 0.02  # standard deviation; measurements have about 0.45
    layers: int = 12
    steps: int = 1500
    batch: int = 128
    rates: tuple[float, ...] = (1e-3, 3e-3)  # the better one on validation data counts
    seeds: tuple[int, ...] = (0, 1, 2)
    held_out: int = 4096


QUICK = Task(signal=24, measured=16, blocks=4, layers=4, steps=20, batch=32, rates=(3e-3,), seeds=(0,), held_out=256)


class Problem:
    """A measurement matrix ``A [measured, signal]`` and signals to draw."""

    def __init__(self, task: Task, seed: int) -> None:
        self.task, self._generator = task, torch.Generator().manual_seed(seed)
        rows, columns = task.measured // task.blocks, task.signal // task.blocks
        blocks = [torch.randn(rows, columns, generator=self._generator) / rows**0.5 for _ in range(task.blocks)]
        self.A = torch.block_diag(*blocks)

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Return measurements ``[count, measured]`` and signals ``[count, signal]``."""
        shape = (count, self.task.signal)
        there = torch.rand(shape, generator=self._generator) < self.task.density
        x = there * torch.randn(shape, generator=self._generator).abs()
        noise = torch.randn(count, self.task.measured, generator=self._generator)
        return x @ self.A.T + self.task.noise * noise, x


class Unrolled(nn.Module):
    """Gradient steps with a threshold, each with weights of its own; begins as the algorithm it is made from."""

    def __init__(self, A: Tensor, layers: int) -> None:
        super().__init__()
        self.register_buffer("A", A)
        self.steps = nn.ModuleList(nn.Linear(A.shape[0], A.shape[1], bias=False) for _ in range(layers))
        self.thresholds = nn.Parameter(torch.full((layers,), 0.01))
        length = 1 / torch.linalg.matrix_norm(A, 2) ** 2
        for step in self.steps:
            step.weight.data = length * A.T.contiguous()

    def forward(self, y: Tensor) -> Tensor:
        h = y.new_zeros(y.shape[0], self.A.shape[1])
        for k, step in enumerate(self.steps):
            h = h + step(y - h @ self.A.T)
            if k < len(self.steps) - 1:
                h = torch.relu(h - self.thresholds[k])
        return h

    @torch.no_grad()
    def as_chain(self) -> nn.Sequential:
        """Return the same function as a chain of affine maps and ReLUs, with ``y`` carried along as it is.

        The state is ``[h, y+, y-]``, all of it non-negative, so that ReLU lets the measurements pass. The output is
        ``[x, y, -y]``: references that aim at it need not lose the measurements either.
        """
        measured, signal = self.A.shape
        eye, none = torch.eye(measured), torch.zeros(measured, signal)
        modules: list[nn.Module] = []
        for k, step in enumerate(self.steps):
            W = step.effective_weight() if hasattr(step, "effective_weight") else step.weight
            if k == 0:
                rows = [W, eye, -eye]
            else:
                last = k == len(self.steps) - 1
                plus = torch.cat([none, eye, -eye if last else 0 * eye], 1)
                minus = torch.cat([none, -eye if last else 0 * eye, eye], 1)
                rows = [torch.cat([torch.eye(signal) - W @ self.A, W, -W], 1), plus, minus]
            matrix = torch.cat(rows)
            affine = nn.Linear(matrix.shape[1], matrix.shape[0])
            affine.weight.copy_(matrix)
            affine.bias.zero_()
            if k < len(self.steps) - 1:
                affine.bias[:signal] = -self.thresholds[k]
            modules += [affine, nn.ReLU()]
        return nn.Sequential(*modules[:-1])


def network(problem: Problem, form: str) -> Unrolled:
    net = Unrolled(problem.A, problem.task.layers)
    if form.startswith("dense:"):
        support = problem.A.T != 0
        for step in net.steps:
            step.weight.register_hook(lambda gradient: gradient * support)  # starts at zero there, and stays
    elif form != "dense":
        quantize_(net, form)
    return net


def train(net: Unrolled, problem: Problem, rate: float, watch: dict[int, Unrolled] | None = None) -> None:
    """Train on fresh signals; keep copies of the network after the steps that are keys of ``watch``."""
    steps = problem.task.steps
    optimiser = torch.optim.Adam(net.parameters(), rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for step in range(steps + 1):
        if watch is not None and step in watch:
            watch[step] = copy.deepcopy(net)
        if step == steps:
            return
        y, x = problem.draw(problem.task.batch)
        optimiser.zero_grad()
        (net(y) - x).square().sum(1).mean().backward()
        optimiser.step()
        schedule.step()
        share_scale_(net)


@torch.no_grad()
def relative_error(net: nn.Module, y: Tensor, x: Tensor) -> float:
    """Return ``sum |net(y) - x|^2 / sum |x|^2``."""
    return float((net(y) - x).square().sum() / x.square().sum())


def decibel(ratio: float) -> float:
    return 10 * float(torch.tensor(ratio).log10())


def bits_per_weight(form: str, task: Task) -> float:
    """Return the bits of all weights over the entries of all matrices; a scale of the whole model is charged too."""
    parsed = parse_format(form.replace("blocks=4", f"blocks={task.blocks}"))
    entries = task.layers * task.signal * task.measured
    once = 16 if ":model" in form else 0
    return parsed.bits_per_weight(task.signal, task.measured) + once / entries


def compare(task: Task) -> list[dict[str, object]]:
    """Train every format on every problem; return a row per format."""
    rows = []
    for form in FORMATS:
        started, errors, chosen = time.perf_counter(), [], []
        for seed in task.seeds:
            best = (float("inf"), 0.0, 0.0)
            for rate in task.rates:
                problem = Problem(task, seed)
                validation, held_out = problem.draw(task.held_out), problem.draw(task.held_out)
                net = network(problem, form)
                train(net, problem, rate)
                best = min(best, (relative_error(net, *validation), rate, relative_error(net, *held_out)))
            chosen.append(best[1])
            errors.append(decibel(best[2]))
        bits = bits_per_weight(form, task)
        rows.append(
            {
                "format": form,
                "bits_per_weight": round(bits, 4),
                "kilobytes": round(bits * task.layers * task.signal * task.measured / 8e3, 2),
                "error_db": [round(e, 2) for e in errors],
                "rates": chosen,
                "seconds": round(time.perf_counter() - started, 1),
            }
        )
        print(f"{form:26s} {bits:7.3f} bits/weight  {rows[-1]['error_db']} dB  rates {chosen}", flush=True)
    return rows


def algorithm(task: Task) -> list[float]:
    """Return the error in dB before any training: the algorithm itself with as many steps."""
    found = []
    for seed in task.seeds:
        problem = Problem(task, seed)
        found.append(decibel(relative_error(network(problem, "dense"), *problem.draw(task.held_out))))
    return [round(e, 2) for e in found]


def cloud(task: Task, form: str, rate: float, samples: int, beam: int) -> list[tuple[int, YesBounds]]:
    """Return the YES bounds of the network over its training, each with controls."""
    problem = Problem(task, task.seeds[0])
    y, x = problem.draw(samples)
    targets = torch.cat([x, y, -y], 1)
    moments = [0, *(s for s in (10, 30, 100, 300, 1000) if s < task.steps), task.steps]
    watch = dict.fromkeys(moments)
    train(network(problem, form), problem, rate, watch)
    untrained = watch[0].as_chain()
    found = []
    for step, net in watch.items():
        bounds = yes_bounds(net.as_chain(), y, targets, untrained=untrained, beam_width=beam, seed=1)
        found.append((step, bounds))
        print(f"step {step}: {bounds}", flush=True)
    return found
