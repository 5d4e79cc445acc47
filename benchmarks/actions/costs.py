"""What a step and a measurement cost, in units of a step that updates everything; measured side by side.

A training's budget is so many of these units. They are measured once, interleaved with the full step, so that all arms
of a machine are charged alike however busy it was when they ran.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import measures
import torch
from arms import NORM_TAIL, WITNESS_TOKENS, Arm

from peelwise.act import BlockSchedule, all_blocks, param_groups
from training import Loop, Size, fresh

REPETITIONS = 15


class Costs:
    """Costs measured when they are first asked for, and kept in a file; some are known from a record."""

    def __init__(self, size: Size, file: Path, known: Mapping[str, float] = MappingProxyType({})) -> None:
        self.size, self.file = size, file
        self.known = dict(known) | (json.loads(file.read_text()) if file.exists() else {})

    def of_step(self, active: Sequence[int], outer: str) -> float:
        """Return the cost of a step that updates some blocks: by how many they are, and how deep the lowest lies."""
        active = tuple(sorted(active))
        if len(active) == self.size.blocks:
            return 1.0
        lowest = active[0] if outer == "cut" else 0
        return self._kept(f"step {outer} lowest {lowest} of {len(active)}", lambda: self._measured_step(active, outer))

    def of_map(self, fed: str) -> float:
        """Return the cost of measuring what a map is fed with, once."""
        if fed == "permutation":
            return 0.0
        return self._kept(f"map {fed}", lambda: self._measured_call(self._measure(fed)))

    def of_witness(self) -> float:
        """Return the cost of finding and applying one witness."""
        return self._kept("witness", lambda: self._measured_call(
            lambda loop: measures.joint_witness(loop.model, self.size, WITNESS_TOKENS, loop.step)))  # fmt: skip

    def _measure(self, fed: str) -> Callable[[Loop], object]:
        if fed == "gradient norm":
            return lambda loop: [measures.gradient_norms(loop.model) for _ in range(NORM_TAIL)]
        return {"natural-gradient score": measures.natural_gradient_score, "ablation": measures.ablation,
                "Hill alpha": measures.tail_index}[fed]  # fmt: skip

    def _kept(self, key: str, measure: Callable[[], float]) -> float:
        if key not in self.known:
            self.known[key] = measure()
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_text(json.dumps(self.known, indent=1) + "\n")
            print(f"cost of {key}: {self.known[key]:.3f} steps", flush=True)
        return self.known[key]

    def _loop(self, active: Sequence[int] | None = None, outer: str = "always") -> tuple[Loop, BlockSchedule]:
        model = fresh(self.size, 0)
        groups = param_groups(model, [1.0] * self.size.blocks, base_lr=1e-3, span=(1, 1), weight_decay=0.1)
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
        chosen = active if active is not None else range(self.size.blocks)
        rule = all_blocks if active is None else lambda step, blocks, generator: chosen
        schedule = BlockSchedule(model, optimizer, rule, outer=outer, never=True)  # type: ignore[arg-type]
        return Loop(model, optimizer, self.size, 0, 10_000), schedule

    def _measured_step(self, active: Sequence[int], outer: str) -> float:
        (full, own), (part, some) = self._loop(), self._loop(active, outer)
        ratios = []
        for repetition in range(REPETITIONS + 2):
            a = _seconds(lambda: (full.advance(), own.step()))
            b = _seconds(lambda: (part.advance(), some.step()))
            if repetition > 1:
                ratios.append(b / a)
        return statistics.median(ratios)

    def _measured_call(self, work: Callable[[Loop], object]) -> float:
        loop, schedule = self._loop()
        ratios = []
        for repetition in range(6):
            a = _seconds(lambda: [(loop.advance(), schedule.step()) for _ in range(5)]) / 5
            b = _seconds(lambda: work(loop))
            if repetition > 0:
                ratios.append(b / a)
        return statistics.median(ratios)


def planned_steps(arm: Arm, size: Size, budget: float, costs: Costs, drawn: Callable[[int, int], Sequence[int]]) -> int:
    """Return the most steps of an arm that cost no more than ``budget`` full steps.

    Args:
        arm: which.
        size: of everything.
        budget: full steps.
        costs: measured.
        drawn: (steps in all, step) -> blocks that are updated.
    """
    extra = costs.of_witness() * len(arm.witness) if arm.witness else 0.0
    per_map = costs.of_map(arm.fed) if arm.fed else 0.0

    def cost(steps: int) -> float:
        of_steps = float(steps) if arm.rule is None else sum(
            costs.of_step(drawn(steps, step), arm.outer) for step in range(steps))  # fmt: skip
        return of_steps + extra + per_map * ((steps - 1) // size.every)

    low, high = 1, int(8 * budget)
    while low < high:  # the largest number of steps that fits
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle - 1)
    return low


def _seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began
