"""One-bit unrolled networks for sparse recovery: error, bits per weight, and YES bounds over training.

    python examples/one_bit_recovery.py [--out docs/figures] [--results benchmarks/results] [--quick]

Measurements ``y = A x + noise`` of sparse, non-negative ``x``; ``A`` is block-diagonal, as where parts of a signal
are measured apart. Twelve steps of gradient descent with a threshold are a network with weights ``W_k`` to learn:

    h_{k+1} = relu(h_k + W_k (y - A h_k) - t_k)          the last step without threshold and ReLU

``W_k`` has the support of ``A^T``, which the problem gives. One bit per weight on it, one scale for the whole network
is the format of arXiv:2502.01908. Some ten minutes on one core.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor, nn

from peelwise.api.yes import YesBounds, yes_bounds
from peelwise.formats.table import parse_format
from peelwise.nn import quantize_, share_scale_

matplotlib.use("Agg")
from matplotlib import pyplot as plt

matplotlib.rcParams["svg.hashsalt"] = "peelwise"  # the same file at every run
COLOURS = {"red": "#f2c9c4", "yellow": "#f6e8b8", "green": "#cfe6cf"}
LABELS = {  # where the name stands, in points from its marker, where the usual place is taken
    "dense": (-7, 5, "right"),
    "binary:model,blocks=4": (-4, 10, "left"),
    "binary:tensor,blocks=4": (-4, -13, "left"),
    "ternary:tensor,blocks=4": (-8, -13, "left"),
    "ternary:channel,blocks=4": (8, -3, "left"),
    "binary:channel,blocks=4": (8, -3, "left"),
}
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
    steps: int = 800
    batch: int = 128
    rates: tuple[float, ...] = (3e-3, 1e-2)  # the better one on validation data of the first seed; 2e-2 diverges
    seeds: tuple[int, ...] = (0, 1, 2)
    held_out: int = 4096


QUICK = Task(signal=24, measured=16, layers=4, steps=12, batch=32, rates=(1e-2,), seeds=(0,), held_out=256)


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
    entries = task.layers * task.signal * task.measured
    once = 16 if ":model" in form else 0
    return parse_format(form).bits_per_weight(task.signal, task.measured) + once / entries


def compare(task: Task) -> list[dict[str, Any]]:
    """Train every format on every problem; return a row per format."""
    rows = []
    for form in FORMATS:
        started = time.perf_counter()
        tried = [attempt(task, form, rate, task.seeds[0]) for rate in task.rates]  # (validation, held out)
        best = min(range(len(tried)), key=lambda i: tried[i][0])
        errors = [tried[best][1], *(attempt(task, form, task.rates[best], seed)[1] for seed in task.seeds[1:])]
        bits = bits_per_weight(form, task)
        rows.append(
            {
                "format": form,
                "bits_per_weight": round(bits, 4),
                "kilobytes": round(bits * task.layers * task.signal * task.measured / 8e3, 2),
                "error_db": [round(e, 2) for e in errors],
                "rate": task.rates[best],
                "seconds": round(time.perf_counter() - started, 1),
            }
        )
        print(f"{form:26s} {bits:7.4f} bits/weight  {rows[-1]['error_db']} dB  rate {task.rates[best]:g}", flush=True)
    return rows


def attempt(task: Task, form: str, rate: float, seed: int) -> tuple[float, float]:
    """Return the error in dB on validation and on held-out signals."""
    problem = Problem(task, seed)
    validation, held_out = problem.draw(task.held_out), problem.draw(task.held_out)
    net = network(problem, form)
    train(net, problem, rate)
    return decibel(relative_error(net, *validation)), decibel(relative_error(net, *held_out))


def algorithm(task: Task) -> list[float]:
    """Return the error in dB before any training: the algorithm itself with as many steps."""
    found = []
    for seed in task.seeds:
        problem = Problem(task, seed)
        found.append(decibel(relative_error(network(problem, "dense"), *problem.draw(task.held_out))))
    return [round(e, 2) for e in found]


@dataclass(frozen=True)
class Moment:
    """The network during training, in squared error per signal, on the same signals as its bounds."""

    step: int
    bounds: YesBounds

    @property
    def row(self) -> dict[str, Any]:
        """What is kept of it."""
        controls = self.bounds.controls
        assert controls is not None
        return {
            "step": self.step,
            "network": round(self.bounds.loss, 4),
            "cloud": self.bounds.cloud,
            "yes_0": round(self.bounds.yes_0, 4),
            "yes_last": round(self.bounds.bounds[-1], 4),
            "yes_last_on_fit": round(self.bounds.fit.bounds[-1], 4),
            "best_map": list(self.bounds.best_map[len(self.bounds.bounds) - 1]),
            "maps_visited": self.bounds.maps_visited,
            "untrained": round(min(controls.untrained), 4),
            "shuffled": round(min(controls.shuffled), 4),
            "last_layer_anew": round(controls.head_control, 4),
            "informative": self.bounds.informative[len(self.bounds.bounds) - 1],
        }


def cloud(task: Task, form: str, rate: float, samples: int, beam: int) -> list[Moment]:
    """Return the YES bounds of the network over its training, each with controls."""
    problem = Problem(task, task.seeds[0])
    y, x = problem.draw(samples)
    targets = torch.cat([x, y, -y], 1)
    watch: dict[int, Unrolled | None] = dict.fromkeys([0, *(s for s in (10, 50, 200) if s < task.steps), task.steps])
    train(network(problem, form), problem, rate, watch)
    untrained = chain_of(watch[0])
    found = []
    for step, net in watch.items():
        bounds = yes_bounds(chain_of(net), y, targets, untrained=untrained, beam_width=beam, seed=1)
        found.append(Moment(step, bounds))
        print(found[-1].row, flush=True)
    return found


def chain_of(net: Unrolled | None) -> nn.Sequential:
    assert net is not None
    return net.as_chain()


def own_form(problem: Problem, fit: tuple[Tensor, Tensor], report: tuple[Tensor, Tensor]) -> float:
    """Return the squared error on ``report`` of a stack that keeps the form of the network, each step fitted at once.

    ``W_k`` on its support and an offset are the least-squares solution for ``x - h`` from ``y - A h``: YES-0 with what
    is known of every step (``h``, ``A`` and the support) left in. Weights are full precision.
    """
    task, A = problem.task, problem.A.double()
    supports = (A.T != 0).split(task.signal // task.blocks)
    states = [(y.double(), x.double(), torch.zeros_like(x).double()) for y, x in (fit, report)]
    for k in range(task.layers):
        y, x, h = states[0]
        residual, gap = y - h @ A.T, x - h
        W = torch.cat(
            [
                _on_support(residual, part, on[0])
                for part, on in zip(gap.split(len(supports[0]), 1), supports, strict=True)
            ]
        )
        offset = (gap - residual @ W.T).mean(0)
        stepped = [(y, x, h + (y - h @ A.T) @ W.T + offset) for y, x, h in states]
        states = stepped if k == task.layers - 1 else [(y, x, h.clamp(min=0)) for y, x, h in stepped]
    _, x, h = states[1]
    return float((h - x).square().sum(1).mean())


def _on_support(a: Tensor, b: Tensor, on: Tensor) -> Tensor:
    """Return the least-squares map ``[b, a]`` from ``a [n, a]`` to ``b [n, b]``, both centred, with inputs ``on``."""
    a, b = a[:, on] - a[:, on].mean(0), b - b.mean(0)
    S = a.T @ a
    W = b.new_zeros(b.shape[1], len(on))
    W[:, on] = torch.linalg.solve(S + 1e-3 * S.diagonal().mean() * torch.eye(len(S), dtype=S.dtype), a.T @ b).T
    return W


def draw_formats(rows: list[dict[str, Any]], start: list[float], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6.8, 3.8))
    for row in rows:
        family = row["format"].partition(":")[0]
        support = "blocks" in row["format"]
        mean = sum(row["error_db"]) / len(row["error_db"])
        colour = {"dense": "k", "ternary": "C1", "binary": "C0"}[family]
        axes.plot([row["bits_per_weight"]] * len(row["error_db"]), row["error_db"], ".", color=colour, alpha=0.4)
        marker = "*" if row["format"] == ONE_BIT else "o" if support else "s"
        axes.plot(
            row["bits_per_weight"], mean, marker, color=colour, fillstyle="full" if support else "none", markersize=8
        )
        dx, dy, side = LABELS.get(row["format"], (7, 5, "left"))
        place = (row["bits_per_weight"], mean)
        axes.annotate(row["format"], place, (dx, dy), textcoords="offset points", fontsize=7, ha=side)
    axes.axhline(sum(start) / len(start), color="C7", linestyle=":", label="the algorithm itself, not trained")
    axes.set(
        xscale="log",
        xlim=(0.18, 45),
        xlabel="bits per weight, zeros counted as weights",
        ylabel="error on held-out signals, dB",
    )
    axes.set_title("Sparse recovery by twelve unrolled steps")
    save(figure, axes, path)


def draw_cloud(found: list[Moment], own: float, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6.8, 3.8))
    steps = [max(m.step, 1) for m in found]
    for moment, left, right in zip(found, steps, [*steps[1:], steps[-1] * 1.2], strict=True):
        axes.axvspan(left, right, color=COLOURS[moment.bounds.cloud], linewidth=0)
    rows = [m.row for m in found]
    axes.plot(steps, [r["network"] for r in rows], "k-o", markersize=3, label="one-bit network")
    axes.plot(steps, [r["yes_0"] for r in rows], "C3", label="YES-0")
    axes.plot(steps, [r["yes_last"] for r in rows], "C0--", label=f"YES-{len(rows[0]['best_map']) - 1}")
    axes.plot(steps, [r["last_layer_anew"] for r in rows], "C2", linewidth=0.9, label="control: last layer fitted anew")
    axes.plot(steps, [r["untrained"] for r in rows], "C7:", label="control: untrained")
    axes.plot(steps, [r["shuffled"] for r in rows], "C1:", label="control: shuffled")
    axes.axhline(own, color="C4", linestyle="-.", label="fitted step by step in the network's own form")
    axes.set(xscale="log", yscale="log", xlabel="Adam steps", ylabel="squared error per signal")
    axes.set_title("YES bounds of the one-bit network over training")
    save(figure, axes, path)


def save(figure: plt.Figure, axes: plt.Axes, path: Path) -> None:
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description="Compare weight formats of an unrolled network for sparse recovery.")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "figures", help="folder of the figures")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the numbers")
    parser.add_argument("--quick", action="store_true", help="a small problem, a few steps")
    options = parser.parse_args(arguments)
    for folder in (options.out, options.results):
        folder.mkdir(parents=True, exist_ok=True)
    task = QUICK if options.quick else Task()
    samples, beam = (600, 2) if options.quick else (4000, 3)
    start, rows = algorithm(task), compare(task)
    rate = {row["format"]: row["rate"] for row in rows}
    found = cloud(task, ONE_BIT, rate[ONE_BIT], samples, beam)
    problem = Problem(task, task.seeds[0])
    own = own_form(problem, problem.draw(samples), problem.draw(samples))
    print(f"fitted step by step in the network's own form: {own:.4g}")
    result = {
        "task": asdict(task),
        "algorithm_db": start,
        "formats": rows,
        "one_bit": [moment.row for moment in found],
        "own_form": round(own, 4),
    }
    (options.results / "one_bit_recovery.json").write_text(json.dumps(result, indent=1) + "\n")
    draw_formats(rows, start, options.out / "one-bit-formats.svg")
    draw_cloud(found, own, options.out / "one-bit-yes.svg")
    return result


if __name__ == "__main__":
    main()
