"""YES bounds over the training of a small network, published and default form, with their controls.

    python examples/yes_bounds.py [--out docs/figures] [--quick]

Makes three figures and prints every number that docs/yes-bounds.md quotes. About a minute on two cores.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import torch
from torch import Tensor, nn

from peelwise.api.yes import YesBounds, yes_bounds
from peelwise.records.yes import YesRow
from peelwise.tasks.yes.bounds import YesMonitor

matplotlib.use("Agg")
from matplotlib import pyplot as plt

matplotlib.rcParams["svg.hashsalt"] = "peelwise"  # the same file at every run
LAYERS, INPUTS, OUTPUTS, SAMPLES = 4, 10, 30, 800
COLOURS = {"red": "#f2c9c4", "yellow": "#f6e8b8", "green": "#cfe6cf"}


def network(layers: int = LAYERS, inputs: int = INPUTS, width: int = OUTPUTS) -> nn.Sequential:
    modules: list[nn.Module] = []
    for i in range(layers):
        modules += [nn.Linear(inputs if i == 0 else width, width), nn.ReLU()]
    return nn.Sequential(*modules[:-1])


def phase_task(samples: int = SAMPLES) -> tuple[Tensor, Tensor]:
    """Magnitudes of linear measurements: positive targets."""
    x = torch.randn(samples, INPUTS)
    return x, (x @ torch.randn(OUTPUTS, INPUTS).T).abs()


def signed_task(samples: int = SAMPLES) -> tuple[Tensor, Tensor]:
    """The same without the magnitude, and a cubic bend: targets of both signs."""
    x = torch.randn(samples, INPUTS)
    z = x @ torch.randn(OUTPUTS, INPUTS).T
    return x, z + 0.05 * z**3


def follow(stages: list[int]) -> tuple[list[YesRow], list[YesBounds], tuple[float, ...]]:
    """Train with Adam; return published rows, default bounds and the untrained published bounds."""
    x, y = phase_task()
    net = network()
    untrained = network()
    untrained.load_state_dict(net.state_dict())
    optimiser = torch.optim.Adam(net.parameters(), 2e-3)
    monitor, default = YesMonitor(net, x, y, mode="published"), []
    for step in range(stages[-1] + 1):
        if step in stages:
            monitor.step(step)
            default.append(yes_bounds(net, x, y, untrained=untrained))
        optimiser.zero_grad()
        # All samples: report is unseen by the references, not by the network, which favours the network.
        (net(x) - y).square().sum(1).mean().backward()
        optimiser.step()
    assert monitor.untrained is not None
    return monitor.rows, default, monitor.untrained


def draw_cloud(rows: list[YesRow], untrained: tuple[float, ...], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6.4, 3.6))
    steps = [max(r.step, 1) for r in rows]
    last = LAYERS - 1
    for row, left, right in zip(rows, steps, [*steps[1:], steps[-1] * 1.2], strict=True):
        axes.axvspan(left, right, color=COLOURS[row.cloud], linewidth=0)
    axes.plot(steps, [r.loss for r in rows], "k", label="network")
    axes.plot(steps, [r.yes_0 for r in rows], "C3", label="YES-0")
    axes.plot(steps, [r.present[last] for r in rows], "C0", label=f"YES-{last}, present")
    axes.plot(steps, [r.running[last] for r in rows], "C0--", label=f"YES-{last}, running minimum")
    axes.axhline(min(untrained), color="C7", linestyle=":", label="best untrained bound")
    axes.set(xscale="log", yscale="log", xlabel="Adam steps", ylabel="squared error per sample", title="Published")
    save(figure, axes, path)


def draw_default(stages: list[int], found: list[YesBounds], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6.4, 3.6))
    steps = [max(s, 1) for s in stages]
    last = LAYERS - 1
    controls = [b.controls for b in found]
    axes.plot(steps, [b.loss for b in found], "k", label="network")
    low = [b.loss + b.gap[last].low for b in found]
    high = [b.loss + b.gap[last].high for b in found]
    axes.fill_between(steps, low, high, alpha=0.3)
    axes.plot(steps, [b.yes_k[last] for b in found], "C0", label=f"YES-{last}, 95 % paired")
    axes.plot(steps, [c.head_control for c in controls if c], "C2", label="last layer fitted anew")
    axes.plot(steps, [min(c.untrained) for c in controls if c], "C7:", label="untrained")
    axes.plot(steps, [min(c.shuffled) for c in controls if c], "C1:", label="shuffled")
    axes.set(xscale="log", yscale="log", xlabel="Adam steps", ylabel="squared error per sample", title="Default")
    save(figure, axes, path)


def draw_depth(depths: list[int], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6.4, 3.2))
    for name, task in (("positive targets |Ax|", phase_task), ("signed targets", signed_task)):
        x, y = task()
        values = []
        for depth in depths:
            bounds = yes_bounds(network(depth), x, y, mode="published", maps=[[depth] * depth], controls=False)
            values.append(bounds.yes_0)
        energy = float((y - y.mean(0)).square().sum(1).mean())
        shares = [v / energy for v in values]
        print("YES-0 by depth,", name, [round(s, 4) for s in shares])
        axes.plot(depths, shares, "o-", label=name)
    axes.set(xlabel="layers", ylabel="YES-0 / variance of Y", ylim=(0, 1.05), title="Depth in YES-0")
    save(figure, axes, path)


def save(figure: plt.Figure, axes: plt.Axes, path: Path) -> None:
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "docs" / "figures")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    stages = [0, 10, 30] if options.quick else [0, 10, 30, 100, 300, 1000, 3000]
    rows, default, untrained = follow(stages)
    print("untrained, published:", [round(u, 2) for u in untrained])
    for row, bounds in zip(rows, default, strict=True):
        published = [row.yes_0, *row.present.values()]
        print(f"step {row.step}: loss {row.loss:.4g}, {row.cloud}, YES-k {[round(v, 2) for v in published]},")
        print(f"  running {[round(v, 2) for v in row.running.values()]}, map {row.best_map[LAYERS - 1]}")
        print(bounds)
    draw_cloud(rows, untrained, options.out / "yes-published.svg")
    draw_default(stages, default, options.out / "yes-default.svg")
    draw_depth([2, 3] if options.quick else [2, 3, 4, 6, 8, 12], options.out / "yes-depth.svg")


if __name__ == "__main__":
    main()
