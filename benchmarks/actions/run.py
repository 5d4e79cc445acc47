"""Which actions help at equal measured cost? Trains every arm, each at its own best rate, on several seeds.

    python benchmarks/actions/run.py [--size small] [--seeds 11 12 13] [--arms NAME ..]
    python benchmarks/actions/render.py

Resumable: every finished training is a line of ``out/actions/SIZE/runs.jsonl``. An arm's rate is the best of a grid on
a development seed, extended while the best is at its end; that of an arm in the result file is known, and so are costs
that are in it (``--again`` measures everything anew). Arms are trained in the order in which ``--arms`` names them.
``render.py`` makes the result file and the page.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from arms import ARMS, Arm, Running, optimizer_of
from costs import Costs, planned_steps
from measures import ablations

from peelwise.act import BlockSchedule
from render import recorded
from training import ROOT, SIZES, Loop, Size, fresh, held_out_losses

DEVELOPMENT_SEED = 1
GRID = (2e-3, 4e-3, 8e-3)
MOST_RATES = 5
SHORT = 0.8  # of the budget: the goal


class Runs:
    """All trainings of one size: those that are done, and how to do others."""

    def __init__(self, size: Size, folder: Path, record: dict[str, Any]) -> None:
        self.size, self.folder = size, folder
        self.file = folder / "runs.jsonl"
        self.rates = {each["arm"]: each["rate"] for each in record.get("arms", ())}
        self.short_known = {each["arm"] for each in record.get("arms", ()) if each["at_0.8_against_uniform"]}
        self.costs = Costs(size, folder / "costs.json", record.get("costs", {}))
        text = self.file.read_text() if self.file.exists() else ""
        lines = text.splitlines()
        if text and not text.endswith("\n"):  # killed while it wrote: the next line must not be joined to that one
            self.file.write_text("".join(f"{line}\n" for line in lines[:-1]))
            lines = lines[:-1]
        self.done: dict[tuple[str, float, int, float], dict[str, Any]] = {}
        for line in lines:
            row = json.loads(line)
            self.done[row["arm"], row["rate"], row["seed"], row["budget"]] = row

    def get(self, arm: Arm, rate: float, seed: int, budget: float = 1.0) -> dict[str, Any]:
        """Return one training, done now unless it was before."""
        key = arm.name, rate, seed, budget
        if key not in self.done:
            row = self._train(arm, rate, seed, budget)
            self.done[key] = row
            self.folder.mkdir(parents=True, exist_ok=True)
            with self.file.open("a") as out:
                out.write(json.dumps(row) + "\n")
            what = f"{arm.name} | rate {rate:g} seed {seed} budget {budget:g}"
            done = f"{row['steps']} steps, {row['processor_seconds']:.1f} s, {row['held_out']:.4f}"
            print(f"{time.strftime('%H:%M:%S')} {what}: {done}", flush=True)
        return self.done[key]

    def best_rate(self, arm: Arm) -> float:
        """Return the rate that is best on the development seed."""
        if arm.name in self.rates:
            return self.rates[arm.name]
        rates = list(GRID)
        while True:
            losses = {rate: self.get(arm, rate, DEVELOPMENT_SEED)["held_out"] for rate in sorted(rates)}
            best = min(losses, key=losses.__getitem__)
            if min(rates) < best < max(rates) or len(rates) >= MOST_RATES:
                self.rates[arm.name] = best
                return best
            rates.append(best / 2 if best == min(rates) else best * 2)

    @cache  # noqa: B019  # one object a process
    def importance(self) -> tuple[float, ...]:
        """Return what skipping each block costs the uniform model of the development seed at its end."""
        file = self.folder / "importance.json"
        if not file.exists():
            uniform = ARMS[0]
            rate = self.best_rate(uniform)
            model = fresh(self.size, DEVELOPMENT_SEED)
            Loop(model, optimizer_of(uniform, model, rate), self.size, DEVELOPMENT_SEED, self.size.steps).run()
            self.folder.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(ablations(model, self.size, 16_384, 0)) + "\n")
        return tuple(json.loads(file.read_text()))

    def _train(self, arm: Arm, rate: float, seed: int, budget: float) -> dict[str, Any]:
        importance = self.importance() if arm.needs_importance else ()
        steps = planned_steps(arm, self.size, budget * self.size.steps, self.costs,
                              lambda steps, step: self._drawn(arm, seed, steps, importance)[step])  # fmt: skip
        model = fresh(self.size, seed)
        optimizer = optimizer_of(arm, model, rate, seed)
        running = Running(arm, model, optimizer, self.size, seed, steps, importance)
        loop = Loop(model, optimizer, self.size, seed, steps)
        curve = loop.run(running.after_backward, running.after_step)
        running.schedule.close()
        losses = held_out_losses(model, loop.test)
        row = {"arm": arm.name, "rate": rate, "seed": seed, "budget": budget, "steps": steps,
               "processor_seconds": loop.processor, "wall_seconds": loop.wall, "held_out": float(losses.mean()),
               "curve": curve} | running.record()  # fmt: skip
        return row | {"by_window": [round(x, 5) for x in losses.tolist()]}

    @cache  # noqa: B019
    def _drawn(self, arm: Arm, seed: int, steps: int, importance: tuple[float, ...]) -> list[tuple[int, ...]]:
        assert arm.rule is not None
        model = fresh(self.size, seed)
        rule = arm.rule(self.size, seed, steps, importance)
        schedule = BlockSchedule(model, optimizer_of(arm, model, 1e-3), rule, outer=arm.outer, every=arm.held,
                                 seed=seed, steps=steps)  # fmt: skip
        drawn = [schedule.drawn(step // arm.held * arm.held) for step in range(steps)]
        schedule.close()
        return drawn


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="small")
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13])
    parser.add_argument("--arms", nargs="+", choices=[arm.name for arm in ARMS], help="default: all")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "actions")
    parser.add_argument("--again", action="store_true", help="use no rate and no cost of the result file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    record = {} if options.again else recorded(options.size)
    runs = Runs(SIZES[options.size], options.out / options.size, record)
    by_name = {arm.name: arm for arm in ARMS}
    for arm in [by_name[name] for name in options.arms or by_name]:
        rate = runs.best_rate(arm)
        for seed in options.seeds:
            runs.get(arm, rate, seed)
            if arm.name in runs.short_known:
                continue
            if arm.name == "uniform" or _better(runs, arm, rate, options.seeds):
                runs.get(arm, rate, seed, SHORT)


def _better(runs: Runs, arm: Arm, rate: float, seeds: Sequence[int]) -> bool:
    """Whether an arm is below uniform on the seeds that are done: only then is its shorter training worth its time."""
    uniform = runs.best_rate(ARMS[0])
    done = [seed for seed in seeds if (arm.name, rate, seed, 1.0) in runs.done]
    pairs = [(runs.get(arm, rate, seed)["held_out"], runs.get(ARMS[0], uniform, seed)["held_out"]) for seed in done]
    return all(own < other for own, other in pairs)


if __name__ == "__main__":
    main()
