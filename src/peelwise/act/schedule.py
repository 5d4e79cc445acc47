"""Which blocks are updated at a step, with the savings that come of it, and a count of what was done."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from peelwise.act.blocks import block_modules, block_parameters, checked_index, unwrapped
from peelwise.act.rates import check_groups, saved_count
from peelwise.act.rules import Rule, all_blocks
from peelwise.errors import OptionError, PeelwiseWarning

LOOK_AHEAD = 1_000  # draws in which a block must come up, where the length of the training is not known

Outer = Literal["always", "cut"]


class NeverUpdatedWarning(PeelwiseWarning):
    """A schedule leaves blocks as they are for the whole training; it was asked to."""


class BlockSchedule:
    """Freezes and thaws blocks from step to step. Call ``step()`` after ``optimizer.step()``, like a rate schedule.

    Frozen parameters have ``requires_grad`` false, so their gradients are not computed, and ``grad`` is ``None``, so
    the optimiser neither moves nor decays them; moments stay as they were unless ``forget``. Backward passes
    end at the lowest active block if nothing below it wants gradients: that is the case with ``outer="cut"``,
    which cuts the graph in front of the first block while that one is frozen. An embedding is then updated only at
    steps at which the first block is; one that is tied to the head, at the others by the head's part of its gradient.
    ``outer="always"`` gives the embedding its whole gradient, and saves only the products that make weight gradients.

    ``torch.compile``: a graph is compiled for every set of flags that it meets. Compile the blocks, not the model
    (``for block in blocks: block.compile()``): a block meets four at most, however many sets are drawn. A model
    compiled as a whole meets one per set: give ``distinct``, or a larger ``every``.

    DDP: make it in all processes with the same seed, after DDP, which needs ``find_unused_parameters=True``.

    Args:
        model: any module with a list of blocks.
        optimizer: holds every trainable parameter of the model.
        rule: which blocks; see `peelwise.act.rules`.
        blocks: the blocks, where they are not the largest ``nn.ModuleList``.
        outer: what becomes of parameters before the blocks, see above.
        every: steps for which a set is kept (arXiv:2403.17919 keeps it for several).
        distinct: most different sets that are ever drawn; ``None`` for no limit.
        seed: of the draws.
        steps: of the whole training, to tell whether a block is never updated; default: what the rule says, or 1,000
            draws.
        never: whether some blocks may never be updated; that is then said once.
        forget: drop the optimiser's state of a block when it is frozen: less memory, cold moments later
            (arXiv:2404.02827).

    Raises:
        OptionError: If the optimiser leaves out a parameter, a rule draws no block or an unknown one, or a block is
            never updated and ``never`` is false.

    Attributes:
        active: blocks that the next step updates.
        steps: that were taken.
        block_steps: per block, at how many of them it was updated.
        seconds: wall time from the first ``step()``'s beginning, between calls, all in all.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        rule: Rule = all_blocks,
        *,
        blocks: Sequence[nn.Module] | None = None,
        outer: Outer = "always",
        every: int = 1,
        distinct: int | None = None,
        seed: int = 0,
        steps: int | None = None,
        never: bool = False,
        forget: bool = False,
    ) -> None:
        if outer not in ("always", "cut"):
            raise OptionError(f'outer: expected "always" or "cut", got {outer!r}.')
        if every < 1 or (distinct is not None and distinct < 1):
            raise OptionError(f"every and distinct: expected at least 1, got {every} and {distinct}.")
        model = unwrapped(model)
        found = tuple(blocks) if blocks is not None else block_modules(model)
        check_groups(model, optimizer.param_groups)
        self.optimizer, self.rule, self.outer, self.every = optimizer, rule, outer, every
        self.distinct, self.seed, self.forget = distinct, seed, forget
        # What was frozen before stays so.
        self._members = [[p for p in each if p.requires_grad] for each in block_parameters(model, found)]
        self._check_reach(steps, never)
        self.steps, self.seconds = 0, 0.0
        self.block_steps = [0] * len(found)
        self.active: tuple[int, ...] = tuple(range(len(found)))
        self._since = time.perf_counter()
        self._cut = False
        self._handles: list[Any] = [
            found[0].register_forward_pre_hook(self._before_blocks, with_kwargs=True),
            optimizer.register_step_pre_hook(self._drop_gradients),
        ]
        self._turn_to(self.drawn(0))

    def drawn(self, step: int) -> tuple[int, ...]:
        """Return the blocks that are updated at a step, in order.

        Raises:
            OptionError: If the rule draws none, or one that does not exist.
        """
        count = len(self._members)
        draw = step // self.every
        if self.distinct is not None:
            draw %= self.distinct
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + draw)
        found = sorted(
            {checked_index(index, count, "rule") for index in self.rule(draw * self.every, count, generator)}
        )
        if not found:
            raise OptionError(f"rule: no block is updated at step {step}. Draw at least one.")
        return tuple(found)

    def step(self) -> None:
        """Count the step that is done and choose the blocks of the next one; after ``optimizer.step()``."""
        now = time.perf_counter()
        self.seconds, self._since = self.seconds + now - self._since, now
        for index in self.active:
            self.block_steps[index] += 1
        self.steps += 1
        if self.steps % self.every == 0:
            self._turn_to(self.drawn(self.steps))

    def record(self) -> dict[str, Any]:
        """Return what was done: steps, block-steps per block and in all, measured seconds, as plain values."""
        return {
            "steps": self.steps,
            "block_steps": list(self.block_steps),
            "block_steps_in_all": sum(self.block_steps),
            "seconds": self.seconds,
            "outer": self.outer,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to go on from here with the same draws; save it beside the optimiser's own."""
        drawn = {"seed": self.seed, "every": self.every, "distinct": self.distinct}
        return self.record() | {"active": list(self.active)} | drawn

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            OptionError: If it is none, or of another number of blocks, seed, ``every``, ``distinct`` or ``outer``: the
                draws or what they do would be others.
        """
        steps = saved_count(state, "steps", "schedule of blocks")
        own = {"seed": self.seed, "every": self.every, "distinct": self.distinct, "outer": self.outer}
        for name, value in own.items():
            if state.get(name, value) != value:
                raise OptionError(
                    f"The saved schedule has {name} {state[name]}, this one {value}: draws, or what they do, would "
                    "differ."
                )
        saved = state.get("block_steps", ())
        if len(saved) != len(self._members):
            raise OptionError(f"The saved schedule is of {len(saved)} blocks, the model has {len(self._members)}.")
        self.steps, self.seconds = steps, float(state["seconds"])
        self.block_steps = list(state["block_steps"])
        self._since = time.perf_counter()
        self._turn_to(tuple(state["active"]), forget=False)

    def close(self) -> None:
        """Thaw everything that the schedule froze, and take its hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._turn_to(tuple(range(len(self._members))), forget=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _turn_to(self, active: tuple[int, ...], *, forget: bool = True) -> None:
        for index, members in enumerate(self._members):
            wanted = index in active
            for p in members:
                if p.requires_grad != wanted:
                    p.requires_grad_(wanted)
                if not wanted:
                    p.grad = None
                    if self.forget and forget:
                        self.optimizer.state.pop(p, None)
        self.active, self._cut = active, self.outer == "cut" and 0 not in active

    def _before_blocks(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        return tree_map(_detached, (args, kwargs)) if self._cut else None

    def _drop_gradients(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Keep frozen blocks still even where a wrapper made gradients for them all the same."""
        for index, members in enumerate(self._members):
            if index not in self.active:
                for p in members:
                    p.grad = None

    def _check_reach(self, steps: int | None, never: bool) -> None:
        length = steps or getattr(self.rule, "steps", None) or LOOK_AHEAD * self.every
        left = set(range(len(self._members)))
        for step in range(0, length, self.every):
            left -= set(self.drawn(step))
            if not left:
                return
        if not never:
            raise OptionError(
                f"The schedule never updates blocks {sorted(left)} in {length} steps. Change it, or say never=True."
            )
        warnings.warn(f"Blocks {sorted(left)} are never updated.", NeverUpdatedWarning, stacklevel=3)


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
