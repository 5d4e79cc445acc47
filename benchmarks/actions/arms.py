"""The arms: what each changes of the uniform training. A new one is a row of `ARMS`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import measures
import torch
from torch import nn

from peelwise.act import (
    BlockSchedule,
    RateMap,
    all_blocks,
    apply_witness_,
    block_modules,
    by_importance,
    growth,
    param_groups,
    random_blocks,
)
from training import Loop, Size

Fed = Literal["natural-gradient score", "Hill alpha", "gradient norm", "ablation", "permutation"]
Kinds = Literal["own", "shuffled", "embedding"]
SPAN, MIDDLE, DECAY = (1.0, 5.0), 3.0, 0.1
WITNESS_TOKENS = 6_144
NORM_TAIL = 5  # steps before a map over which gradient norms are averaged
KINDS = {"norm": 1.0, "v_proj": 4.0, "o_proj": 4.0, "gate_proj": 6.0, "up_proj": 6.0, "down_proj": 6.0,
         "q_proj": 8.0, "k_proj": 8.0, "embed": 10.0}  # arXiv:2502.19002 # fmt: skip
EMBEDDING_TWICE = {"embed": 10.0, "": 5.0}  # the empty name is part of every name


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: on the page.
        fed: statistic that the map of rates is fed with.
        mean: whether every block gets the mean of the map's factors instead of its own: the control of that map.
        outside: factor of the embedding and the final norm.
        kinds: whether rates go by the kind of matrix: by its own factor, by one of the same factors shuffled over the
            kinds, or by whether it is the embedding alone.
        rule: makes the rule of a `BlockSchedule` from size, seed, steps and importance.
        outer, held: how the schedule treats the embedding, and for how many steps a set is kept.
        witness: at which shares of the steps a witness is applied.
        nominal: what the tuned rate is divided by, so that all arms search in the same range.
        source, control: for the page.
    """

    name: str
    fed: Fed | None = None
    mean: bool = False
    outside: float = 1.0
    kinds: Kinds | None = None
    rule: Callable[[Size, int, int, Sequence[float]], Any] | None = None
    outer: Literal["always", "cut"] = "cut"
    held: int = 1
    witness: tuple[float, ...] = field(default=())
    nominal: float = 1.0
    source: str = ""
    control: bool = False

    @property
    def needs_importance(self) -> bool:
        """Whether it is told what a finished training says of the blocks, at no cost: more than it could know."""
        return self.name.startswith(("growth", "importance"))


def _order(seed: int, count: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(977 + seed)).tolist()


def _growth(size: Size, seed: int, steps: int, importance: Sequence[float]) -> Any:
    counts = [max(1, size.blocks // 4), max(1, size.blocks // 2), size.blocks]
    return growth(importance, counts, steps=steps)


def _growth_shuffled(size: Size, seed: int, steps: int, importance: Sequence[float]) -> Any:
    return _growth(size, seed, steps, [importance[i] for i in _order(seed, size.blocks)])


def _growth_from_below(size: Size, seed: int, steps: int, importance: Sequence[float]) -> Any:
    """Keep the most important block first, which the shuffled phases of growth do not, and shuffle the others."""
    first = max(range(size.blocks), key=importance.__getitem__)
    others = [i for i in range(size.blocks) if i != first]
    values = [importance[others[place]] for place in _order(seed, len(others))]
    shuffled = dict(zip(others, values, strict=True)) | {first: importance[first]}
    return _growth(size, seed, steps, [shuffled[i] for i in range(size.blocks)])


def _half_at_random(size: Size, seed: int, steps: int, importance: Sequence[float]) -> Any:
    return random_blocks(max(1, size.blocks // 2))


def _half_by_importance(size: Size, seed: int, steps: int, importance: Sequence[float]) -> Any:
    return by_importance(max(1, size.blocks // 2), importance)


def _half_with_the_first(size: Size, seed: int, steps: int, importance: Sequence[float]) -> Any:
    others = max(1, size.blocks // 2 - 1)

    def draw(step: int, blocks: int, generator: torch.Generator) -> list[int]:
        return [0, *(1 + torch.randperm(blocks - 1, generator=generator)[:others]).tolist()]

    return draw


def _quarter_at_random(size: Size, seed: int, steps: int, importance: Sequence[float]) -> Any:
    return random_blocks(max(1, size.blocks // 4))


def _mapped(fed: Fed, source: str = "", control: bool = False) -> list[Arm]:
    of = Arm(f"map [1, 5] by {fed}", fed=fed, outside=MIDDLE, nominal=MIDDLE, source=source, control=control)
    return [of, replace(of, name=f"constant at the mean of the map by {fed}", mean=True, control=True)]


_HILL, _HILL_MEAN = _mapped("Hill alpha", "arXiv:2605.22297")
_SCORE, _SCORE_MEAN = _mapped("natural-gradient score")

ARMS = (  # in the order in which they are trained: every idea soon followed by its control
    Arm("uniform"),
    replace(_HILL, name="map [1, 5] by Hill alpha, embedding at 1", outside=1.0),
    _HILL,
    _mapped("permutation", control=True)[0],
    Arm("growth by importance", rule=_growth, source="arXiv:2603.19348"),
    Arm("growth by shuffled importance", rule=_growth_shuffled, control=True),
    Arm("random half of the blocks per step", rule=_half_at_random, source="arXiv:2510.02239"),
    _SCORE,
    Arm("witness once, at half of the steps", witness=(0.5,)),
    _HILL_MEAN,
    _SCORE_MEAN,
    Arm("blockwise rates by kind", kinds="own", nominal=5.0, source="arXiv:2502.19002"),
    Arm("the same rates, kinds shuffled", kinds="shuffled", nominal=5.0, control=True),
    Arm("twice the rate for the embedding alone", kinds="embedding", nominal=5.0, control=True),
    Arm("a quarter of the blocks for 5 steps each, embedding always", rule=_quarter_at_random, outer="always", held=5,
        source="arXiv:2403.17919"),
    Arm("importance-sampled half of the blocks per step", rule=_half_by_importance),
    *_mapped("gradient norm"),
    *_mapped("ablation"),
    Arm("growth by importance shuffled above the first block", rule=_growth_from_below, control=True),
    Arm("random half of the blocks per step, the first always", rule=_half_with_the_first, control=True),
    Arm("witness every eighth of the steps", witness=tuple(i / 8 for i in range(1, 8))),
)  # fmt: skip


def optimizer_of(arm: Arm, model: nn.Module, rate: float, seed: int = 0) -> torch.optim.AdamW:
    """Return the optimiser of an arm at a tuned rate."""
    if arm.kinds is not None:
        groups = _by_kind(model, rate / arm.nominal, factors_by_kind(arm.kinds, seed))
    else:
        weights, middle = [1.0] * len(block_modules(model)), MIDDLE if arm.fed else 1.0
        span = (middle, middle)
        groups = param_groups(
            model, weights, base_lr=rate / arm.nominal, span=span, outside=arm.outside, weight_decay=DECAY
        )
    return torch.optim.AdamW(groups, betas=(0.9, 0.95))


def factors_by_kind(kinds: Kinds, seed: int) -> dict[str, float]:
    """Return the factor of every kind of matrix, by a part of its name."""
    if kinds == "embedding":
        return EMBEDDING_TWICE
    if kinds == "own":
        return KINDS
    values = list(KINDS.values())
    return dict(zip(KINDS, (values[place] for place in _order(seed, len(values))), strict=True))


def _by_kind(model: nn.Module, base: float, factors: dict[str, float]) -> list[dict[str, Any]]:
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        factor = next((f for kind, f in factors.items() if kind in name), 1.0)
        groups.setdefault((factor, DECAY if p.dim() > 1 else 0.0), []).append(p)
    return [{"params": ps, "lr": base * factor, "weight_decay": decay} for (factor, decay), ps in groups.items()]


class Running:
    """An arm on a model: what is called behind a backward pass, and behind a step."""

    def __init__(self, arm: Arm, model: nn.Module, optimizer: torch.optim.Optimizer, size: Size, seed: int,
                 steps: int, importance: Sequence[float]) -> None:  # fmt: skip
        self.arm, self.size, self.seed, self.steps = arm, size, seed, steps
        self.norms: list[list[float]] = []
        self.factors: list[list[float]] = []
        self.witnesses: list[dict[str, Any]] = []
        self.maps = RateMap(optimizer, lambda: None, every=10**9, span=SPAN) if arm.fed else None
        rule = all_blocks if arm.rule is None else arm.rule(size, seed, steps, importance)
        self.schedule = BlockSchedule(model, optimizer, rule, outer="always" if arm.rule is None else arm.outer,
                                      every=arm.held, seed=seed, steps=steps)  # fmt: skip
        self.witness_steps = {round(share * steps) for share in arm.witness}

    def after_backward(self, loop: Loop) -> None:
        """Note gradient norms in the steps before a map."""
        if self.arm.fed == "gradient norm" and (loop.step + NORM_TAIL) % self.size.every < NORM_TAIL:
            self.norms.append(measures.gradient_norms(loop.model))

    def after_step(self, loop: Loop) -> None:
        """Turn the schedule, map rates again, apply a witness."""
        self.schedule.step()
        if self.maps is not None and loop.step % self.size.every == 0 and loop.step < self.steps:
            self._remap(loop)
        if loop.step in self.witness_steps:
            change = measures.joint_witness(loop.model, self.size, WITNESS_TOKENS, loop.step)
            if change:
                apply_witness_(loop.model, change, loop.optimizer)
            self.witnesses.append({"step": loop.step, "applied": bool(change)})

    def _remap(self, loop: Loop) -> None:
        assert self.maps is not None
        self.maps.remap(self._weights(loop))
        factors = self.maps.factors
        if self.arm.mean:
            mean = sum(factors) / len(factors)
            for group in loop.optimizer.param_groups:
                if group["block"] is not None:
                    group["relative"] = mean / group["factor"]
        self.factors.append([round(f, 3) for f in factors])

    def _weights(self, loop: Loop) -> list[float]:
        fed = self.arm.fed
        if fed == "natural-gradient score":
            return measures.natural_gradient_score(loop)
        if fed == "Hill alpha":
            return measures.tail_index(loop)
        if fed == "ablation":
            return measures.ablation(loop)
        if fed == "gradient norm":
            of_blocks, self.norms = list(zip(*self.norms, strict=True)), []
            return [sum(each) / len(each) for each in of_blocks]
        return [float(1 + place) for place in _order(self.seed, self.size.blocks)]

    def record(self) -> dict[str, Any]:
        """Return what was done, as plain values."""
        done = self.schedule.record()
        return {"block_steps": done["block_steps"], "factors": self.factors, "witnesses": self.witnesses}
