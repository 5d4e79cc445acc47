"""What every benchmark shares: the machine's description, medians of repetitions, and the result file."""

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from peelwise.engine.provenance import versions

RESULTS = Path(__file__).parent / "results"


def seconds(work: Callable[[], Any]) -> float:
    """Return the wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def interleaved(works: dict[str, Callable[[], Any]], repetitions: int) -> dict[str, list[float]]:
    """Time several things in turn, so that a busy minute of the machine hits all of them; one warm-up each."""
    for work in works.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repetitions):
        for name, work in works.items():
            times[name].append(seconds(work))
    return times


def median_ratio(times: dict[str, list[float]], name: str, base: str) -> float:
    """Return the median over repetitions of time(name) / time(base)."""
    return statistics.median(a / b for a, b in zip(times[name], times[base], strict=True))


def earlier(name: str) -> dict[str, Any]:
    """Return the result file as it stands."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def environment(before: str | None = None) -> dict[str, Any]:
    """Return the command (after the one of the other parts), the machine and the versions."""
    command = " ".join([Path(sys.executable).name, *sys.argv])
    return {
        "command": f"{before}; {command}" if before else command,
        "machine": {
            "processor": platform.machine(),
            "threads": torch.get_num_threads(),
            "cuda": torch.cuda.is_available(),
        },
        "versions": versions(),
    }


def write(name: str, result: dict[str, Any], *, before: str | None = None, show: bool = True) -> None:
    """Write the result with machine, versions and the command (after the one of the other parts), and print it."""
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(environment(before) | result, indent=2)
    (RESULTS / f"{name}.json").write_text(text + "\n")
    if show:
        print(text)


def rounded(value: Any) -> Any:
    """Return nested plain data with numbers to five significant digits, tuples as lists."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value
