"""Speed of the YES bounds: against the plain algorithm, over depth and samples, beam against all maps.

    python benchmarks/yes_speed.py [--quick] [--out benchmarks/results/yes_speed.json]

Everything runs in one process on one thread, except the memory of the sample sweep, for which each size is a
process of its own. One thread, because the machine may be shared and idle threads that spin distort ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peelwise.references.least_squares import DAMPINGS
from peelwise.references.maps import MapPlan
from peelwise.tasks.yes.bounds import yes_bounds
from peelwise.tasks.yes.chain import Chain, read_chain
from peelwise.tasks.yes.samples import checked_samples
from peelwise.tasks.yes.streamed import StreamedStacks, StreamOptions

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from yes_reference import yes_reference  # noqa: E402

Row = dict[str, Any]


def network(inputs: int, width: int, layers: int) -> nn.Sequential:
    modules: list[nn.Module] = []
    for i in range(layers):
        modules += [nn.Linear(inputs if i == 0 else width, width), nn.ReLU()]
    return nn.Sequential(*modules[:-1]).double()


def phase_task(inputs: int, outputs: int, samples: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(samples, inputs, dtype=dtype)
    return x, (x @ torch.randn(outputs, inputs, dtype=dtype).T).abs()


def train(net: nn.Module, x: Tensor, y: Tensor, steps: int) -> None:
    optimiser = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(steps):
        optimiser.zero_grad()
        (net(x) - y).square().sum(1).mean().backward()
        optimiser.step()


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def against_plain(inputs: int, width: int, layers: int, samples: int, stages: tuple[int, ...]) -> list[Row]:
    x, y = phase_task(inputs, width, samples)
    net, rows, done = network(inputs, width, layers), [], 0
    for stage in stages:
        train(net, x, y, stage - done)
        done = stage
        fast, found = timed(lambda: yes_bounds(net, x, y, mode="published", controls=False))
        slow, (yes_0, yes_k, _) = timed(lambda: yes_reference(net, x, y))
        pairs = zip(found.bounds, (yes_0, *yes_k), strict=True)
        rows.append(
            {
                "layers": layers,
                "width": width,
                "samples": samples,
                "adam_steps": stage,
                "plain_seconds": slow,
                "published_mode_seconds": fast,
                "ratio": slow / fast,
                "largest_relative_difference": max(abs(a - b) / b for a, b in pairs),
            }
        )
        print(rows[-1], flush=True)
    return rows


def over_depth(depths: tuple[int, ...]) -> list[Row]:
    rows = []
    for layers in depths:
        x, y = phase_task(16, 24, 2000)
        net = network(16, 24, layers)
        train(net, x, y, 30)
        seconds, found = timed(lambda: yes_bounds(net, x, y, controls=False, beam_width=16))  # noqa: B023
        rows.append(
            {
                "layers": layers,
                "seconds": seconds,
                "maps_total": found.maps_total,
                "maps_visited": found.maps_visited,
                "beam_width": found.beam_width,
            }
        )
        print(rows[-1], flush=True)
    return rows


def one_size(samples: int) -> Row:
    """Time and memory of one call, memory counted above what the data and the libraries take."""
    torch.set_num_threads(1)
    warm = phase_task(16, 24, 1000, torch.float32)
    net = network(16, 24, 4)
    yes_bounds(net, *warm, controls=False)
    x, y = phase_task(16, 24, samples, torch.float32)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak that making the data has left
    before = _kilobytes("VmHWM")
    seconds, _ = timed(lambda: yes_bounds(net, x, y, controls=False))
    added = (_kilobytes("VmHWM") - before) / 1024
    return {"samples": samples, "seconds": seconds, "added_peak_megabytes": round(added, 1)}


def _kilobytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def over_samples(sizes: tuple[int, ...]) -> list[Row]:
    rows = []
    for size in sizes:
        text = subprocess.run(
            [sys.executable, __file__, "--one-size", str(size)], capture_output=True, text=True, check=True
        ).stdout
        rows.append(json.loads(text))
        print(rows[-1], flush=True)
    return rows


def beam_misses(layers: int, widths: tuple[int, ...], seeds: int) -> list[Row]:
    """How often the beam's best map is worse on select than the best of all maps, and by how much."""
    found: dict[int, list[tuple[float, int]]] = {w: [] for w in widths}
    for seed in range(2 * seeds):
        x, y = phase_task(10, 16, 1000)
        if seed % 2:  # every other network has targets of both signs, and a harder choice of maps
            y = torch.sin(y) * x[:, :1].sign() + x[:, 1:2]
        torch.manual_seed(seed)
        net = network(10, 16, layers)
        for steps in (0, 50, 300):
            train(net, x, y, steps)
            chain = read_chain(net)
            best, _ = _best(chain, x, y, None)
            for width in widths:
                value, visited = _best(chain, x, y, width)
                found[width].append((value / best - 1, visited))
    rows = []
    for width, misses in found.items():
        excess = [e for e, _ in misses]
        rows.append(
            {
                "layers": layers,
                "beam_width": width,
                "cases": len(misses),
                "maps_total": 2 ** (layers - 1),
                "maps_visited_mean": sum(v for _, v in misses) / len(misses),
                "missed": sum(e > 1e-9 for e in excess),
                "mean_excess": sum(excess) / len(excess),
                "largest_excess": max(excess),
            }
        )
        print(rows[-1], flush=True)
    return rows


def _best(chain: Chain, x: Tensor, y: Tensor, width: int | None) -> tuple[float, int]:
    samples = checked_samples(chain, x, y, loss="squared", split=(0.6, 0.2, 0.2), seed=0, batch_size=4096)
    stacks = StreamedStacks(chain, samples, MapPlan(len(chain)), StreamOptions(DAMPINGS, width))
    return stacks.fit()[-1][0], stacks.maps_visited


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="small sizes only, for a look")
    parser.add_argument("--one-size", type=int)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "yes_speed.json")
    options = parser.parse_args()
    if options.one_size:
        print(json.dumps(one_size(options.one_size)))
        return
    torch.set_num_threads(1)
    quick = options.quick
    result = {
        "command": "python benchmarks/yes_speed.py" + (" --quick" if quick else ""),
        "machine": {
            "cpus": os.cpu_count(),
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
        },
        "load_average_at_start": os.getloadavg(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "against_plain": [
            *against_plain(20, 100, 5, 800, (0, 200)),
            *against_plain(10, 20, 8, 400, (0, 200)),
            *([] if quick else against_plain(80, 400, 5, 5000, (0, 30))),
        ],
        "default_mode_over_depth": over_depth((3, 5, 8, 12) if quick else (3, 5, 8, 11, 12, 16, 20)),
        "default_mode_over_samples": over_samples((10**3, 10**4) if quick else (10**3, 10**4, 10**5, 10**6)),
        "beam_against_all_maps": beam_misses(6 if quick else 8, (1, 4, 16), 1 if quick else 4),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
