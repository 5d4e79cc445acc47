"""The cases: models of which it is known which block is at fault, or that none is."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from torch import nn

import training
from training import ROOT, RunName

sys.path.insert(0, str(ROOT / "tests"))

import damage
from peelwise.model.checkpoints import open_model
from peelwise.probe.probe import SHARES, Probe
from peelwise.probe.texts import reference_prose

Group = Literal["healthy", "after training", "during training"]
CHECKPOINTS = ROOT / "examples" / "small_gpt" / "checkpoints"
SMALL, LARGE = "small GPT", "SmolLM2-135M"
KEPT_SEED = 20261  # the run whose stages are in the repository
FRESH_TOKENS = 12_288
# (seed, step, earlier step for the stale block, blocks that are damaged)
DAMAGED_STAGES = (
    (101, 800, 200, (0, 3)),
    (102, 400, 200, (2, 5)),
    (103, 800, 400, (1, 4)),
    (KEPT_SEED, 2400, 600, (2, 3)),
)
HEALTHY_STAGES = tuple((seed, step) for seed in training.SEEDS for step in (200, 400, 800)) + tuple(
    (KEPT_SEED, step) for step in (100, 600, 2400)
)
# Kinds of damage of SmolLM2, each in one block.
LARGE_DAMAGES = {
    "sign flip": 15,
    "reset": 20,
    "noise 0.3": 15,
    "gains shifted": 18,
    "copy of neighbour": 15,
    "head zeroed": 12,
    "neurons permuted": 10,
    "scale 1.3": 7,
    "3 bits": 22,
    "scale 0.7": 25,
    "2 bits": 9,
}


@dataclass(frozen=True)
class Case:
    """One model to diagnose; ``block`` is the one at fault, ``None`` if the model is healthy."""

    family: str
    group: Group
    kind: str
    seed: int
    step: int
    block: int | None = None

    @property
    def name(self) -> str:
        """A name that is also a file's."""
        family = "smollm2" if self.family == LARGE else f"seed{self.seed}-step{self.step}"
        fault = "" if self.block is None else f"-block{self.block}"
        return f"{family}-{self.kind}{fault}".replace(" / ", "-over-").replace(" ", "-")

    def model(self) -> nn.Module:
        """Return the model to be diagnosed."""
        if self.group == "during training":
            return training.opened(_run(self), self.step)
        healthy = self.healthy()
        if self.block is None:
            return healthy
        earlier = _earlier(self.seed, self.step) if self.kind == "stale" else healthy
        return damage.STANDARD[self.kind](healthy, self.block, earlier)

    def healthy(self) -> nn.Module:
        """Return what the model would be without its fault."""
        return _healthy(self.family, self.seed, self.step)

    def initial(self) -> nn.Module | None:
        """Return the model at its initialisation, where that is known."""
        if self.family == LARGE:
            return None
        return training.opened(_run(self), 0) if self.seed != KEPT_SEED else training.initial_of_kept(self.seed)


def all_cases() -> Iterator[Case]:
    """Yield every case, healthy ones first."""
    yield from small_cases()
    yield from large_cases()


def small_cases() -> Iterator[Case]:
    """Yield the cases of the small GPT."""
    for seed, step in HEALTHY_STAGES:
        yield Case(SMALL, "healthy", "healthy", seed, step)
    for number, kind in enumerate(damage.STANDARD):
        for seed, step, _, blocks in DAMAGED_STAGES:
            yield Case(SMALL, "after training", kind, seed, step, blocks[number % 2])
    for run in training.all_runs():
        if run.fault is not None and run.block is not None:
            yield Case(SMALL, "during training", run.fault.name, run.seed, training.RECIPE.steps, run.block)


def large_cases() -> Iterator[Case]:
    """Yield the cases of SmolLM2."""
    yield Case(LARGE, "healthy", "healthy", 0, 0)
    for kind, block in LARGE_DAMAGES.items():
        yield Case(LARGE, "after training", kind, 0, 0, block)


@cache
def probe_of(family: str, tokens: int, *, seed: int = 0, shares: tuple[float, float, float] = SHARES) -> Probe:
    """Return the text of an audit: training text for the small GPT, foreign prose for SmolLM2."""
    own = family == SMALL
    text = training.training_documents() if own else reference_prose()
    return Probe.from_text(text, tokenizer(family), tokens=tokens, in_distribution=own, seed=seed, shares=shares)


@cache
def tokenizer(family: str) -> object:
    """Return the family's tokenizer."""
    return open_model(CHECKPOINTS / "step-02400" if family == SMALL else "smollm2").tokenizer


def _run(case: Case) -> RunName:
    fault = next((f for f in training.FAULTS if f.name == case.kind), None)
    return RunName(case.seed, fault, case.block if fault else None)


@cache
def _healthy(family: str, seed: int, step: int) -> nn.Module:
    if family == LARGE:
        return open_model("smollm2").model
    if seed == KEPT_SEED:
        return open_model(_kept(step)).model
    return training.opened(RunName(seed), step)


def _earlier(seed: int, step: int) -> nn.Module:
    (earlier,) = (e for s, at, e, _ in DAMAGED_STAGES if (s, at) == (seed, step))
    return _healthy(SMALL, seed, earlier)


def _kept(step: int) -> Path:
    return CHECKPOINTS / f"step-{step:05d}"
