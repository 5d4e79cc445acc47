"""Rules of a `BlockSchedule`: functions that say which blocks are updated at a step.

A rule is called as ``rule(step, blocks, generator)`` and returns indices; randomness comes from ``generator`` alone,
which is seeded by the schedule's seed and the step, so that a resumed training, and every process, draws the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

import torch

from peelwise.errors import OptionError

Rule = Callable[[int, int, torch.Generator], Collection[int]]


def all_blocks(step: int, blocks: int, generator: torch.Generator) -> Collection[int]:
    """Update all blocks at every step."""
    return range(blocks)


def random_blocks(count: int) -> Rule:
    """Update a uniform random subset of ``count`` blocks (arXiv:2510.02239; with few, arXiv:2403.17919).

    Raises:
        OptionError: If ``count`` is below 1; and, when drawn, above the number of blocks.
    """
    _check_count(count)

    def draw(step: int, blocks: int, generator: torch.Generator) -> Collection[int]:
        _check_most(count, blocks)
        return sorted(torch.randperm(blocks, generator=generator)[:count].tolist())

    return draw


def by_importance(count: int, weights: Sequence[float]) -> Rule:
    """Update ``count`` blocks drawn without replacement, each draw in proportion to the weights that are left.

    Raises:
        OptionError: If ``count`` or a weight is not allowed.
    """
    _check_count(count)
    chances = torch.tensor(_checked(weights), dtype=torch.float64)

    def draw(step: int, blocks: int, generator: torch.Generator) -> Collection[int]:
        _check_length(weights, blocks)
        _check_most(count, blocks)
        return sorted(torch.multinomial(chances, count, generator=generator).tolist())

    return draw


def growth(importance: Sequence[float], counts: Sequence[int], *, steps: int) -> Rule:
    """Train in phases of equal length, in phase k the ``counts[k]`` most important blocks (arXiv:2603.19348).

    Important blocks are in more phases; after the last phase its set stays.

    Args:
        importance: one positive number per block, such as what skipping it costs.
        counts: how many blocks train in each phase.
        steps: of the whole training.

    Raises:
        OptionError: If a number is not allowed, or there are more phases than steps.
    """
    order = sorted(range(len(importance)), key=lambda index: -_checked(importance)[index])
    for count in counts:
        _check_count(count)
    if not counts or len(counts) > steps:
        raise OptionError(f"growth: expected one to {steps} phases, got {len(counts)}.")

    def draw(step: int, blocks: int, generator: torch.Generator) -> Collection[int]:
        _check_length(importance, blocks)
        count = counts[min(step * len(counts) // steps, len(counts) - 1)]
        _check_most(count, blocks)
        return sorted(order[:count])

    draw.steps = steps  # type: ignore[attr-defined]  # how far a schedule looks for blocks that are never updated
    return draw


def _checked(weights: Sequence[float]) -> list[float]:
    values = [float(value) for value in weights]
    for index, value in enumerate(values):
        if not (math.isfinite(value) and value > 0):
            raise OptionError(f"weights: expected positive numbers, got {value} for block {index}.")
    return values


def _check_count(count: int) -> None:
    if count < 1:
        raise OptionError(f"count: expected at least one block, got {count}.")


def _check_most(count: int, blocks: int) -> None:
    if count > blocks:
        raise OptionError(f"count: {count} blocks were asked for, the model has {blocks}.")


def _check_length(weights: Sequence[float], blocks: int) -> None:
    if len(weights) != blocks:
        raise OptionError(f"weights: expected one number for each of {blocks} blocks, got {len(weights)}.")
