"""Layer-wise learning rates: one monotone map from a number per block to a factor on the base rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, distributed, nn

from peelwise.act.blocks import block_parameters, checked_index
from peelwise.errors import OptionError

Scale = Literal["linear", "log", "rank"]
Weights = Mapping[int, float] | Sequence[float]


def factors_of(
    weights: Weights, count: int | None = None, *, span: tuple[float, float] = (1.0, 5.0), scale: Scale = "linear"
) -> list[float]:
    """Return the factor of every block: ``low + (high - low) (v - min v) / (max v - min v)``, monotone in the weight.

    ``v`` is the weight, its logarithm, or its rank (ties share their mean rank). The largest weight gets ``span[1]``,
    the smallest ``span[0]``; equal weights all get the middle. The linear map onto [1, 5] of the tail index of
    the weights is that of arXiv:2605.22297. A ``span`` that falls turns the map round.

    Args:
        weights: one positive number per block, by index or in order.
        count: how many blocks there are; default: as many as weights.
        span: factors of the smallest and of the largest weight, positive.
        scale: what is mapped linearly.

    Returns:
        One factor per block, no unit.

    Raises:
        OptionError: If a block has no weight, does not exist, or its weight is not positive and finite.
    """
    low, high = _checked_span(span)
    values = [_scaled(v, scale) for v in _positive(weights, len(weights) if count is None else count)]
    if scale == "rank":
        values = [sum(w < v for w in values) + (sum(w == v for w in values) - 1) / 2 for v in values]
    least, most = min(values), max(values)
    if most == least:
        return [(low + high) / 2] * len(values)
    return [low + (high - low) * ((v - least) / (most - least)) for v in values]


def param_groups(
    model: nn.Module,
    weights_of_blocks: Weights,
    *,
    base_lr: float,
    span: tuple[float, float] = (1.0, 5.0),
    scale: Scale = "linear",
    outside: float = 1.0,
    weight_decay: float | None = None,
    blocks: Sequence[nn.Module] | None = None,
) -> list[dict[str, Any]]:
    """Return parameter groups for any torch optimiser, each block with its own learning rate.

    ``lr = base_lr * factor``, see `factors_of`; parameters outside of the blocks (embedding, final norm, head) have
    the factor ``outside``. Every trainable parameter is in one group, a tied one once. A group also holds ``block``
    (``None`` outside) and ``factor``, which an optimiser keeps and saves.

    Args:
        model: any module with a list of blocks.
        weights_of_blocks: a positive number per block, by index or in order; see `weights_from`.
        base_lr: rate of factor 1.
        span: factors of the smallest and of the largest weight.
        scale: ``"linear"``, ``"log"`` or ``"rank"``; the last does not depend on how far weights lie apart.
        outside: factor of what lies outside of the blocks. At 1 an embedding has the rate of the block that gets least,
            which can cost more than any map gains (docs/actions.md).
        weight_decay: of parameters with two or more dimensions, 0 for the others; ``None`` leaves it to the optimiser.
        blocks: the blocks, where they are not the largest ``nn.ModuleList``.

    Raises:
        OptionError: If a weight, the span or the rate is not allowed; if two blocks share a parameter.
        UnsupportedModelError: If no blocks are found.

    Example:
        >>> groups = param_groups(model, [2.9, 3.4, 4.1], base_lr=3e-4, span=(1, 5))
        >>> optimizer = torch.optim.AdamW(groups)
    """
    if not (math.isfinite(base_lr) and base_lr > 0):
        raise OptionError(f"base_lr: expected a positive number, got {base_lr}.")
    if not (math.isfinite(outside) and outside > 0):
        raise OptionError(f"outside: expected a positive factor, got {outside}.")
    members = block_parameters(model, blocks)
    factors = factors_of(weights_of_blocks, len(members), span=span, scale=scale)
    inside = {id(p) for each in members for p in each}
    others = [p for p in model.parameters() if id(p) not in inside]
    groups: list[dict[str, Any]] = []
    for block, factor, params in [(None, outside, others), *zip(range(len(members)), factors, members, strict=True)]:
        for part, decay in _by_decay([p for p in params if p.requires_grad], weight_decay):
            groups.append({"params": part, "lr": base_lr * factor, "block": block, "factor": factor} | decay)
    check_groups(model, groups)
    return groups


def check_groups(model: nn.Module, groups: Iterable[Mapping[str, Any]]) -> None:
    """Refuse parameter groups that leave out a trainable parameter of the model, or hold one twice.

    Args:
        model: whose parameters they should be.
        groups: dictionaries with ``params``, such as ``optimizer.param_groups``.

    Raises:
        OptionError: If so; the message names the parameter.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    held: set[int] = set()
    for p in (p for group in groups for p in group["params"]):
        if id(p) in held:
            raise OptionError(f"Parameter groups hold {names.get(id(p), 'a parameter')} twice: leave it in one group.")
        held.add(id(p))
    missing = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held]
    if missing:
        raise OptionError(
            f"Parameter groups leave out {len(missing)} trainable parameters, the first is {missing[0]}. Add them, or "
            "freeze them with requires_grad_(False)."
        )


class RateMap:
    """Maps rates again during a training: every n steps a function says the weights of the blocks anew.

    Composes with any learning-rate schedule: the rates that the schedule sets stay in ``param_groups``, and the ratio
    of the new factor to the one that the groups were made with is multiplied in for the length of
    ``optimizer.step()`` alone. The ratio is in the groups (``relative``), so ``optimizer.state_dict()`` carries it.

    Where several processes train one model, make it and call ``step()`` in all of them: rates go by the weights of the
    first, since what each measures on its own batches differs, and copies of the model must not.

    ``torch.compile``: a compiled model meets no rate. A compiled ``optimizer.step`` is not compiled anew where the
    rates are tensors (``group["lr"] = torch.tensor(group["lr"])`` before the optimiser is made); where they are numbers
    it is a few times, as under any schedule of rates.

    Args:
        optimizer: made from `param_groups`.
        weights: called without arguments; returns a positive number per block, or ``None`` to leave the rates.
        every: steps from one call to the next; the first is after so many steps.
        span, scale: of the map, as in `param_groups`.

    Raises:
        OptionError: If the optimiser's groups are not from `param_groups`, or ``every`` is below 1.

    Attributes:
        factors: of the blocks, as they are now.
        steps: how many were taken.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        weights: Callable[[], Weights | None],
        *,
        every: int = 100,
        span: tuple[float, float] = (1.0, 5.0),
        scale: Scale = "linear",
    ) -> None:
        if every < 1:
            raise OptionError(f"every: expected at least 1, got {every}.")
        if not all("factor" in group and "block" in group for group in optimizer.param_groups):
            raise OptionError(
                "RateMap needs an optimizer made from peelwise.act.param_groups(..): block, factor missing."
            )
        _checked_span(span)
        self.optimizer, self.weights, self.every, self.span, self.scale = optimizer, weights, every, span, scale
        self.steps = 0
        self._plain: list[float | Tensor] | None = None
        # Not compiled: every new factor would be a constant of another compiled step.
        hidden: Callable[[Any], Any] = torch.compiler.disable
        self._handles = [
            optimizer.register_step_pre_hook(hidden(self._multiply)),
            optimizer.register_step_post_hook(hidden(self._restore)),
        ]

    @property
    def factors(self) -> list[float]:
        """The factor of every block that has trainable parameters, in order."""
        found = {g["block"]: g["factor"] * g.get("relative", 1.0) for g in self.optimizer.param_groups}
        return [found[block] for block in sorted(block for block in found if block is not None)]

    def step(self) -> bool:
        """Count a step, after ``optimizer.step()``; every so many, map again. Returns whether it did."""
        self.steps += 1
        if self.steps % self.every:
            return False
        weights = self.weights()
        if weights is None:
            return False
        self.remap(weights)
        return True

    def remap(self, weights: Weights) -> None:
        """Map now, in all processes if there are several.

        Raises:
            OptionError: If a weight is not allowed; the rates are then as before.
        """
        weights = _of_first_process(weights)
        count = 1 + max(group["block"] for group in self.optimizer.param_groups if group["block"] is not None)
        factors = factors_of(weights, count, span=self.span, scale=self.scale)
        for group in self.optimizer.param_groups:
            if group["block"] is not None:
                group["relative"] = factors[group["block"]] / group["factor"]

    def close(self) -> None:
        """Take the hooks off the optimiser: rates are those of its groups again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def state_dict(self) -> dict[str, int]:
        """Return the count of steps; the factors are in the optimiser's own state."""
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from a saved count.

        Raises:
            OptionError: If this is no state of a map.
        """
        self.steps = saved_count(state, "steps", "map of rates")

    def _multiply(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._restore(optimizer, args, kwargs)  # a step that failed has left them multiplied
        rates = [group["lr"] for group in optimizer.param_groups]
        self._plain = [rate.clone() if isinstance(rate, Tensor) else rate for rate in rates]
        for group in optimizer.param_groups:
            _set_rate(group, group["lr"] * group.get("relative", 1.0))

    def _restore(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._plain is not None:
            for group, rate in zip(optimizer.param_groups, self._plain, strict=True):
                _set_rate(group, rate)
        self._plain = None


def _set_rate(group: dict[str, Any], rate: float | Tensor) -> None:
    """Set a group's rate; a tensor stays the same one, which compiled steps have been compiled for."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def saved_count(state: Mapping[str, Any], name: str, what: str) -> int:
    """Return a count from a saved state.

    Raises:
        OptionError: If it is not there, or is none.
    """
    value = state.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise OptionError(f"This is no saved state of a {what}: {name} is {value!r}.")
    return value


def _of_first_process(weights: Weights) -> Weights:
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return weights
    told: list[Any] = [weights if isinstance(weights, Mapping) else list(weights)]
    distributed.broadcast_object_list(told, src=0)
    first: Weights = told[0]
    return first


def _positive(weights: Weights, count: int) -> list[float]:
    given = dict(weights) if isinstance(weights, Mapping) else dict(enumerate(weights))
    for index in given:
        checked_index(index, count, "weights_of_blocks")
    missing = [index for index in range(count) if index not in given]
    if missing or not count:
        raise OptionError(f"weights_of_blocks: {count} blocks need one number each; there is none for {missing}.")
    values = [float(given[index]) for index in range(count)]
    for index, value in enumerate(values):
        if not (math.isfinite(value) and value > 0):
            raise OptionError(f"weights_of_blocks: expected positive numbers, got {value} for block {index}.")
    return values


def _scaled(value: float, scale: Scale) -> float:
    if scale not in ("linear", "log", "rank"):
        raise OptionError(f'scale: expected "linear", "log" or "rank", got {scale!r}.')
    return math.log(value) if scale == "log" else value


def _checked_span(span: tuple[float, float]) -> tuple[float, float]:
    if len(span) != 2 or not all(math.isfinite(end) and end > 0 for end in span):
        raise OptionError(f"span: expected two positive factors, got {span}.")
    return float(span[0]), float(span[1])


def _by_decay(params: list[nn.Parameter], decay: float | None) -> list[tuple[list[nn.Parameter], dict[str, float]]]:
    """Return the parts that are not empty, each with what it adds to its group."""
    if decay is None:
        return [(params, {})] if params else []
    matrices, others = [p for p in params if p.dim() > 1], [p for p in params if p.dim() < 2]
    return [(part, {"weight_decay": d}) for part, d in ((matrices, decay), (others, 0.0)) if part]
